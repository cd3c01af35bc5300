"""The method on one page: draw, roll out, score, credit, update, publish; then evaluate and save when they are due.

Logging and timing are in `_report` and in the callees, never between the stages. Everything random is a function of
(run.seed, iteration), so the loop continues from a checkpoint as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from envs.base import Env
from envs.types import Task
from rewards.rubric import FailureBudget, Rubric, RubricScores
from rlrestore.algorithms.base import Algorithm
from rlrestore.board import log_groups, log_histograms, matrix_picture
from rlrestore.checkpoint import new_checkpoint, read_json, retain, write_json_atomic
from rlrestore.clock import Clock, bare_seconds
from rlrestore.config import TrainConfig
from rlrestore.config_files import config_hash
from rlrestore.credit import Credit
from rlrestore.crew import Crew, Scored, StageTimes
from rlrestore.curriculum import Curriculum
from rlrestore.evaluate import Evaluation, Measured, MetricRow, compare
from rlrestore.history import RewardHistory
from rlrestore.log import RunLog
from rlrestore.rundir import RunDir, versions
from rlrestore.stages import (
    assign_credit,
    combine,
    cost_metrics,
    make_chunks,
    policy_metrics,
    reward_metrics,
    rollout_chain,
    update_requests,
)
from rlrestore.types import UpdateReport


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
    history: RewardHistory | None = None  # of `credit.baseline: history`
    first: int = 0  # iterations done before this process
    seconds_before: float = 0.0  # that earlier processes spent


def train(run: Run) -> dict[str, MetricRow]:
    """All iterations that are left, then the table of base against tuned, which is also written to result.json."""
    config, crew = run.config, run.crew
    seed, groups = config.run.seed, config.rollout.groups
    clock = Clock(run.times, run.seconds_before)
    print(f"evaluating the base on {run.evaluation.images} held-out images, then measuring speed", flush=True)
    base = run.evaluation.measure(crew, "base")
    if run.first == 0:
        _log_rows(run, compare(base, base, run.evaluation.rubric), 0)  # where the held-out curves start
    _probe(run, clock)
    # closed on an error, too, so that its message has a line of its own
    with tqdm(total=config.run.steps, initial=run.first, desc=config.run.name, unit="it", smoothing=0.1) as progress:
        for iteration in range(run.first, config.run.steps):
            clock.start()
            tasks = run.curriculum.draw(run.env, iteration, groups)
            chain = rollout_chain(config.sampling, seed, iteration, run.algorithm)
            chunks = make_chunks(
                tasks,
                config.rollout.samples,
                config.rollout.batch,
                seed,
                iteration,
                temperature=config.sampling.temperature,
            )
            rollouts = list(crew.roll_out(chunks, chain))
            scores = combine(rollouts, run.rubric)
            _spend_budget(run.budget, rollouts)
            run.curriculum.learn(tasks, scores)
            credit = assign_credit(
                scores, config.credit, groups, seed, iteration, run.history, [task.photo for task in tasks]
            )
            requests = update_requests(
                chunks, credit, crew.ranks, config.engine.micro_batch, run.algorithm.updates, seed, iteration
            )
            reports = crew.update(requests, chain)
            crew.publish()

            done = iteration + 1
            _report(run, done, tasks, scores, credit, reports, rollouts, clock)
            if _due(done, config.evaluate.every) or done in (1, config.run.steps):
                log_groups(run.log, done, tasks, rollouts, scores, credit)
            _show(progress, scores)
            if _due(done, config.evaluate.every) and done < config.run.steps:
                _evaluate(run, base, done)
            if _due(done, config.checkpoint.every) or done == config.run.steps:
                _save(run, done, clock)
    return _finish(run, base, clock)


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


def _spend_budget(budget: FailureBudget, rollouts: list[Scored]) -> None:
    for part in rollouts:
        budget.update(part.scores)
    budget.check()


def _report(
    run: Run,
    done: int,
    tasks: list[Task],
    scores: RubricScores,
    credit: Credit,
    reports: list[UpdateReport],
    rollouts: list[Scored],
    clock: Clock,
) -> None:
    images = [part.images for part in rollouts]
    run.log.scalars(
        done,
        {
            **reward_metrics(scores, run.config.rollout.groups),
            **run.curriculum.metrics(tasks),
            **{f"group/{name}": value for name, value in credit.stats.items()},
            **policy_metrics(reports),
            **cost_metrics(images, reports, len(scores.valid_N)),
            "x0/latent_mean": sum(item.z0_mean for item in images) / len(images),
            "x0/latent_rms": sum(item.z0_rms for item in images) / len(images),
            "sync/unchanged": float(run.crew.unchanged),
            "x0/colour_drift": sum(item.colour_drift for item in images) / len(images),
            **clock.stop(run.config.rollout.groups * run.config.rollout.samples),
        },
    )
    log_histograms(run.log, done, credit, reports)


def _show(progress: tqdm, scores: RubricScores) -> None:
    mix = scores.mix_N[scores.valid_N]
    progress.set_postfix(mix=f"{float(mix.mean()):+.3f}" if len(mix) else "none")
    progress.update()


def _evaluate(run: Run, base: Measured, done: int) -> tuple[dict[str, MetricRow], str]:
    tuned = run.evaluation.measure(run.crew, run.config.evaluate.weights)
    rows = compare(base, tuned, run.evaluation.rubric)
    _log_rows(run, rows, done)
    picture = run.log.image(done, "eval/lq_base_tuned_gt", run.evaluation.grid(base, tuned))
    if run.config.evaluate.samples > 1:
        agreement, names = run.evaluation.agreement(tuned)
        run.log.image(done, "eval/correlation", matrix_picture(agreement, names))
    return rows, str(picture)


def _log_rows(run: Run, rows: dict[str, MetricRow], done: int) -> None:
    scalars: dict[str, float] = {}
    for name, row in rows.items():
        if row.n:
            scalars |= {f"eval/{row.role}/{name}/tuned": row.tuned, f"eval/{row.role}/{name}/delta": row.delta}
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
                "seconds": clock.total_s(),
            },
        )
    retain(run.folder.path, run.config.checkpoint.keep)


def resume(run: Run) -> None:
    """Bring a freshly built run to where its checkpoint left it."""
    folder = run.folder.resume_from
    if folder is None:
        return
    run.crew.load(folder)
    run.crew.publish()
    state = read_json(folder / "loop.json")
    run.first, run.seconds_before = state["iteration"], state["seconds"]
    run.budget.load_state_dict(state["budget"])
    run.curriculum.load_state_dict(state["curriculum"])
    if run.history is not None:
        run.history.load_state_dict(state["history"])


def _finish(run: Run, base: Measured, clock: Clock) -> dict[str, MetricRow]:
    rows, picture = _evaluate(run, base, run.config.run.steps)
    config = run.config
    result = result_json(
        config, rows, config.run.steps, clock.total_s(), clock.stage_seconds, clock.efficiency(), run.budget.summary()
    )
    run.folder.write_result(result)
    run.folder.write_facts(samples=picture, exit="done")
    run.log.close()
    return rows


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


def _plain_row(row: MetricRow) -> dict[str, Any]:
    """For JSON, which has no NaN: what could not be measured (no score, or too few tasks for an interval) is null."""
    plain = dataclasses.asdict(row)
    finite = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}
    return {**finite, "ci95": [None if math.isnan(bound) else bound for bound in row.ci95]}
