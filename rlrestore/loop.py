"""The method on one page: draw, roll out, score, credit, update, publish; then evaluate and save when they are due.

Logging and timing are in `_report` and in the callees, never between the stages. Everything random is a function of
(run.seed, iteration), so the loop continues from a checkpoint as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from envs.base import Env
from envs.types import Task
from rewards.constraints import Multipliers
from rewards.gates import gate_metrics
from rewards.rubric import FailureBudget, Rubric, RubricScores
from rlrestore.algorithms.base import Algorithm
from rlrestore.checkpoint import checkpoint_path, new_checkpoint, read_json, retain, set_aside, write_json_atomic
from rlrestore.clock import Clock, bare_seconds
from rlrestore.config.files import config_hash
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import Crew, Scored, StageTimes
from rlrestore.evaluation.alarm import Alarm, Verdict
from rlrestore.evaluation.evaluate import ConstraintRow, Evaluation, Measured, MetricRow, compare, constraint_rows
from rlrestore.iteration.asynchrony import Draft, Pipeline, correct
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.curriculum import Curriculum
from rlrestore.iteration.history import RewardHistory
from rlrestore.iteration.levels import LevelKeeper
from rlrestore.iteration.refill import Gathered, Judged, gather
from rlrestore.iteration.stages import (
    as_judged,
    assign_credit,
    combine,
    cost_metrics,
    guard,
    make_chunks,
    policy_metrics,
    recorded_scores,
    reward_metrics,
    rollout_chain,
    update_requests,
)
from rlrestore.reporting.board import log_groups, log_histograms, matrix_picture
from rlrestore.reporting.log import RunLog
from rlrestore.reporting.panel import write_panel
from rlrestore.rundir import RunDir, versions
from rlrestore.stopping import Stop, StopRequested
from rlrestore.types import Chunk, UpdateReport


@dataclass
class Run:
    """The built parts of one run."""

    config: TrainConfig
    env: Env
    rubric: Rubric
    crew: Crew
    evaluation: Evaluation
    folder: RunDir
    log: RunLog
    budget: FailureBudget
    times: StageTimes
    algorithm: Algorithm  # what it needs and where it trains; the learners have their own
    curriculum: Curriculum
    levels: LevelKeeper
    multipliers: Multipliers
    alarm: Alarm
    history: RewardHistory | None = None  # of `credit.baseline: history`
    first: int = 0  # iterations done before this process
    seconds_before: float = 0.0  # that earlier processes spent
    stop: Stop = field(default_factory=Stop)

    def __post_init__(self) -> None:
        self.pipeline = Pipeline(self.config, self.env, self.curriculum, self.crew, self.algorithm)


def train(run: Run) -> dict[str, MetricRow]:
    """All iterations that are left, then the table of base against tuned, which is also written to result.json."""
    config, crew = run.config, run.crew
    seed = config.run.seed
    clock = Clock(run.times, run.seconds_before)
    print(f"evaluating the base on {run.evaluation.images} held-out images, then measuring speed", flush=True)
    base = run.evaluation.measure(crew, "base")
    if run.first == 0:
        _log_rows(run, compare(base, base, run.evaluation.rubric), 0)  # where the held-out curves start
    if run.first == 0 and config.alarm.action == "rollback":
        _save(run, 0, clock)  # the best so far is the base
    _probe(run, clock)
    run.stop.hold(clock.bare_iteration_s)
    done = run.first
    # closed on an error, too, so that its message has a line of its own
    with tqdm(total=config.run.steps, initial=run.first, desc=config.run.name, unit="it", smoothing=0.1) as progress:
        for iteration in range(run.first, run.first if run.alarm.ends_run else config.run.steps):
            clock.start()
            draft, rollouts = run.pipeline.take(iteration)  # sampled and scored now, or while earlier ones trained
            found = _judged(run, draft, rollouts)
            run.curriculum.learn(found.tasks, found.scores)
            run.pipeline.look_ahead(iteration)  # samplers go on while this iteration is trained on
            prices = run.multipliers.ascend(found.scores, found.levels.base)
            credit = correct(found.credit, crew.importance(found.chunks), config.asynchrony)
            requests = update_requests(
                found.chunks, credit, crew.ranks, config.engine.micro_batch, run.algorithm.updates, seed, iteration
            )
            reports = crew.update(requests, draft.chain)
            crew.publish()

            done = iteration + 1
            _report(run, done, found, credit, reports, clock, {**gate_metrics(found.gated), **prices})
            if _due(done, config.evaluate.every) or done in (1, config.run.steps):
                log_groups(run.log, done, found.tasks, found.rollouts, found.scores, credit)
            _show(progress, found.scores)
            if _due(done, config.evaluate.every) and done < config.run.steps:
                _evaluate(run, base, done)
            stop = run.stop.due()
            if _due(done, config.checkpoint.every) or done == config.run.steps or stop or _alarm_saves(run, done):
                _save(run, done, clock)
            if run.alarm.ends_run:
                break
            if stop and done < config.run.steps:
                raise StopRequested(f"{stop}: saved after iteration {done} of {config.run.steps}")
    return _finish(run, base, clock, done)


def _judged(run: Run, draft: Draft, rollouts: list[Scored]) -> Gathered:
    """Scores and credit of an iteration's rollouts, with groups that teach nothing replaced if the config says so."""
    config, groups, iteration = run.config, run.config.rollout.groups, draft.iteration
    offered = groups * config.curriculum.candidates  # to the curriculum
    first_levels = run.levels.of(run.crew, draft.tasks)

    def roll_out(chunks: Sequence[Chunk], of: int) -> list[Scored]:
        found = list(run.crew.roll_out(chunks, draft.chain, of)) if of else rollouts
        for part in found:
            run.budget.update(part.scores)
        run.budget.check()
        return found

    def judge(tasks: Sequence[Task], rollouts: Sequence[Scored]) -> Judged:
        same = all(new is drawn for new, drawn in zip(tasks, draft.tasks, strict=True))
        known = first_levels if same else run.levels.of(run.crew, tasks)
        scores, recorded_N = combine(rollouts, run.rubric), recorded_scores(tasks)
        gated = guard(scores, config.gates, run.multipliers, known, groups)
        credit = assign_credit(
            as_judged(scores, recorded_N), config.credit, groups, config.run.seed, iteration, run.history,
            [task.photo for task in tasks], gated if recorded_N is None else None,
        )  # fmt: skip
        return Judged(scores, credit, gated, known)

    def more_tasks(n: int, skip: int) -> Sequence[Task]:
        return run.env.draw(iteration, offered + skip + n)[offered + skip :]

    return gather(draft.tasks, draft.chunks, config.rollout.refill, roll_out, judge, more_tasks, run.curriculum.learn)


def _probe(run: Run, clock: Clock) -> None:
    """Measure what the networks alone would need for an iteration, on a chunk of the first one."""
    config, rollout = run.config, run.config.rollout
    if run.first >= config.run.steps:
        return
    chain = rollout_chain(config.sampling, config.run.seed, 0, run.algorithm)
    chunks = make_chunks(run.env.draw(0, rollout.groups), rollout.samples, rollout.batch, config.run.seed, 0)
    clock.bare_iteration_s = bare_seconds(
        run.crew.probe(chunks[0], chain),
        rollout.groups,
        [len(chunk.rows) for chunk in chunks],
        run.crew.samplers,
        run.crew.ranks,
        config.engine.micro_batch,
        len(run.algorithm.points(chain, 0)),
    )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _report(
    run: Run,
    done: int,
    found: Gathered,
    credit: Credit,
    reports: list[UpdateReport],
    clock: Clock,
    guards: dict[str, float],
) -> None:
    images = found.images
    rollouts = run.config.rollout.groups * run.config.rollout.samples
    run.log.scalars(
        done,
        {
            **reward_metrics(found.scores, run.config.rollout.groups),
            **guards,
            **run.levels.metrics(rollouts),
            **run.curriculum.metrics(found.tasks),
            **{f"group/{name}": value for name, value in credit.stats.items()},
            "group/replaced": float(found.replaced),
            **policy_metrics(reports),
            **cost_metrics(images, reports, rollouts),
            "x0/latent_mean": sum(item.z0_mean for item in images) / len(images),
            "x0/latent_rms": sum(item.z0_rms for item in images) / len(images),
            "sync/unchanged": float(run.crew.unchanged),
            "x0/colour_drift": sum(item.colour_drift for item in images) / len(images),
            **clock.stop(rollouts),
        },
    )
    log_histograms(run.log, done, credit, reports)


def _show(progress: tqdm, scores: RubricScores) -> None:
    mix = scores.mix_N[scores.valid_N]
    progress.set_postfix(mix=f"{float(mix.mean()):+.3f}" if len(mix) else "none")
    progress.update()


@dataclass(frozen=True)
class Evaluated:
    """Base against the weights at one step."""

    rows: dict[str, MetricRow]
    constraints: dict[str, ConstraintRow]
    picture: str  # path of the sample grid
    tuned: Measured


def _evaluate(run: Run, base: Measured, done: int, judge: bool = True) -> Evaluated:
    """Measure, log, and let the alarm judge, unless it has ended the run already."""
    tuned = run.evaluation.measure(run.crew, run.config.evaluate.weights)
    rows = compare(base, tuned, run.evaluation.rubric)
    held = constraint_rows(run.config.constraints, base, tuned, run.evaluation.rubric)
    _log_rows(run, rows, done, held)
    if judge:
        _sound(run, done, run.alarm.judge(done, base.values, tuned.values))
    picture = run.log.image(done, "eval/lq_base_tuned_gt", run.evaluation.grid(base, tuned))
    if run.config.evaluate.samples > 1:
        agreement, names = run.evaluation.agreement(tuned)
        run.log.image(done, "eval/correlation", matrix_picture(agreement, names))
    return Evaluated(rows, held, str(picture), tuned)


def _sound(run: Run, done: int, verdict: Verdict) -> None:
    run.log.scalars(
        done, {"alarm/ringing": float(verdict.ring is not None), "alarm/fired": float(bool(run.alarm.fired))}
    )
    if verdict.ring is not None and verdict.fires:
        message = f"ALARM at step {done}: {verdict.ring.text}"
        run.log.text(done, "alarm", message)
        tqdm.write(message, file=sys.stderr)


def _alarm_saves(run: Run, done: int) -> bool:
    """Its end of the run, and the best evaluation so far if that is what it would return to."""
    return run.alarm.ends_run or (run.config.alarm.action == "rollback" and run.alarm.best_step == done)


def _log_rows(
    run: Run, rows: dict[str, MetricRow], done: int, constraints: Mapping[str, ConstraintRow] | None = None
) -> None:
    scalars: dict[str, float] = {}
    for name, row in rows.items():
        if row.n:
            scalars |= {f"eval/{row.role}/{name}/tuned": row.tuned, f"eval/{row.role}/{name}/delta": row.delta}
    for name, held in (constraints or {}).items():
        if held.n:
            scalars |= {f"eval/held/{name}/measured": held.measured, f"eval/held/{name}/bound": held.bound}
    run.log.scalars(done, scalars)


def _save(run: Run, done: int, clock: Clock) -> None:
    meta = {
        "kind": "train",
        "config_hash": config_hash(run.config),
        "data": run.env.fingerprint(),
        "versions": versions(),
    }
    with new_checkpoint(run.folder.path, done, meta) as folder:
        run.crew.save(folder)
        run.crew.export(folder / "restorer", run.config.evaluate.weights)
        write_json_atomic(
            folder / "loop.json",
            {
                "iteration": done,
                "budget": run.budget.state_dict(),
                "curriculum": run.curriculum.state_dict(),
                "history": run.history and run.history.state_dict(),
                "levels": run.levels.state_dict(),
                "multipliers": run.multipliers.state_dict(),
                "alarm": run.alarm.state_dict(),
                "seconds": clock.total_s(),
                "flying": run.pipeline.state_dict(),
            },
        )
    keep_best = {run.alarm.best_step} if run.config.alarm.action == "rollback" else set()
    retain(run.folder.path, run.config.checkpoint.keep, keep_best)


def resume(run: Run) -> None:
    """Bring a freshly built run to where its checkpoint left it."""
    folder = run.folder.resume_from
    if folder is None:
        return
    run.crew.load(folder)
    state = read_json(folder / "loop.json")
    run.first, run.seconds_before = state["iteration"], state["seconds"]
    run.budget.load_state_dict(state["budget"])
    run.curriculum.load_state_dict(state["curriculum"])
    run.levels.load_state_dict(state["levels"])
    run.multipliers.load_state_dict(state["multipliers"])
    run.alarm.load_state_dict(state["alarm"])
    if run.history is not None:
        run.history.load_state_dict(state["history"])
    for iteration, version in state.get("flying", []):  # sampled again, by the weights that sampled them
        run.crew.republish(folder, version)
        run.pipeline.submit(iteration)
    run.crew.publish()


def _finish(run: Run, base: Measured, clock: Clock, done: int) -> dict[str, MetricRow]:
    """The last evaluation and the result; of the best checkpoint, if the alarm says so."""
    config, alarm = run.config, run.alarm
    final = _evaluate(run, base, done, judge=not alarm.ends_run)
    if alarm.ends_run and config.alarm.action == "rollback" and _roll_back(run):
        done = alarm.best_step
        final = _evaluate(run, base, done, judge=False)
    elif alarm.ends_run:
        alarm.stopped_at = done
    write_panel(run.folder.path, run.evaluation, base, final.tuned, done, config.evaluate.weights)
    result = result_json(
        config, final.rows, done, clock.total_s(), clock.stage_seconds, clock.efficiency(), run.budget.summary()
    )
    run.folder.write_result({**result, **guards_json(final.constraints, run.multipliers.value, alarm.result())})
    run.folder.write_facts(samples=final.picture, exit="done")
    run.log.close()
    return final.rows


def _roll_back(run: Run) -> bool:
    """Load the best checkpoint and set the later ones aside, so that it is what the run left; False if it is not there.

    Nothing is published: evaluation and export are the trainers', and rollout actors refuse to go back.
    """
    folder = checkpoint_path(run.folder.path, run.alarm.best_step)
    if not folder.is_dir():  # alarm.action was another one when it was due
        print(f"{folder} was not kept: the run stops where it is", file=sys.stderr)
        return False
    run.crew.load(folder)
    set_aside(run.folder.path, run.alarm.best_step)
    run.alarm.returned_to = run.alarm.best_step
    return True


def guards_json(
    constraints: Mapping[str, ConstraintRow], multipliers: Mapping[str, float], alarm: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `result.json` says of constraints and of the alarm, beside `result_json`."""
    rows = {name: {**_plain_row(row), "lambda": multipliers.get(name)} for name, row in constraints.items()}
    return {"constraints": rows, "alarm": dict(alarm) if alarm else None}


def result_json(
    config: TrainConfig,
    rows: dict[str, MetricRow],
    iterations: int,
    wall_s: float,
    stages_s: dict[str, float],
    efficiency: float,
    failures: Mapping[str, Any],
) -> dict[str, Any]:
    """The contract of result.json: keep it stable, others read it. `iterations` made the tuned weights."""
    return {
        "metrics": {name: _plain_row(row) for name, row in rows.items()},
        "images": images_trained(config, iterations),
        "wall_s": wall_s,
        "stages_s": stages_s,
        "efficiency": efficiency,
        "reward_failures": dict(failures),
        "versions": versions(),
        "seed": config.run.seed,
    }


def images_trained(config: TrainConfig, iterations: int) -> int:
    return iterations * config.rollout.groups * config.rollout.samples


def _plain_row(row: MetricRow | ConstraintRow) -> dict[str, Any]:
    """For JSON, which has no NaN: what could not be measured (no score, or too few tasks for an interval) is null."""
    plain = dataclasses.asdict(row)
    finite = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}
    return {**finite, "ci95": [None if math.isnan(bound) else bound for bound in row.ci95]}
