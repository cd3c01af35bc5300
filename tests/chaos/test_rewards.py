"""Rewards that fail cost their samples, not the run; a run that cannot go on ends soon, with one line that says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from envs.types import Restoration
from rewards.registry import REWARDS, find_reward
from rewards.rubric import Rubric
from rlrestore.actors.cluster import fetch
from rlrestore.actors.crew import RayCrew
from rlrestore.build import all_terms, build_algorithm, build_crew, build_env, build_scorer
from rlrestore.cli import _guard, app
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import Scored, StageTimes
from rlrestore.iteration.stages import assign_credit, combine, make_chunks, rollout_chain, update_requests
from rlrestore.types import Chunk
from tests import faulty_rewards
from tests.faulty_rewards import FAULTY, fails
from tests.tiny import tiny_config, train_tiny, write_tiny

RATE, SALT = 0.2, "a"
FAILED = 70


@pytest.fixture
def _faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "faulty", FAULTY["faulty"])


def faulty_options(mode: str, budget: float) -> list[str]:
    return [
        "rewards.faulty.weight=1", f"rewards.faulty.params.mode={mode}", f"rewards.faulty.params.rate={RATE}",
        f"rewards.faulty.params.salt={SALT}", "rewards.faulty.timeout_s=3", f"reward_budget.max_fraction={budget}",
        "reward_budget.min_scores=1", "run.steps=1",
    ]  # fmt: skip


def chunks_of(config: TrainConfig, iteration: int = 0) -> list[Chunk]:
    tasks = build_env(config.env).draw(iteration, config.rollout.groups)
    return make_chunks(tasks, config.rollout.samples, config.rollout.batch, config.run.seed, iteration)


def failing_rows(chunk: Chunk) -> list[bool]:
    rows = [Restoration(chunk.tasks[row.group], chunk.tasks[row.group].lq, row.seed) for row in chunk.rows]
    return [fails(row, RATE, SALT) for row in rows]


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# -- in this process -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_faulty")
@pytest.mark.parametrize("mode", ["nan", "raises", "hangs"])
def test_failed_samples_are_masked_and_counted(tmp_path: Path, mode: str) -> None:
    """What fails is known beforehand: NaN and errors cost their row; a call that hangs takes its chunk with it."""
    config = tiny_config(tmp_path, "nft", faulty_options(mode, budget=1.0))
    per_chunk = [failing_rows(chunk) for chunk in chunks_of(config)]
    failed = sum(len(rows) * any(rows) if mode == "hangs" else sum(rows) for rows in per_chunk)
    assert 0 < failed < 16  # else this would show nothing
    run, rows = train_tiny(config)
    first = next(record for record in records(run) if record["step"] == 1)
    assert first["reward/failed_frac/faulty"] == pytest.approx(failed / 16)
    assert first["group/masked_samples"] == failed
    assert first["reward/failed_frac/ssim_rgb"] == 0  # its neighbours are not touched
    assert first["train/grad_norm"] > 0
    assert rows["ssim_rgb"].n == config.evaluate.tasks
    assert (run / "result.json").is_file()


@pytest.mark.usefixtures("_faulty")
def test_a_reward_that_always_fails_while_evaluating_leaves_a_result(tmp_path: Path) -> None:
    """A watched metric without one value: null in result.json, because JSON has no NaN; the run is not lost."""
    gold = ["evaluate.gold.broken.kind=faulty", "evaluate.gold.broken.params.rate=1", "run.steps=1"]
    run, rows = train_tiny(tiny_config(tmp_path, "nft", gold))
    assert rows["broken"].n == 0
    saved = json.loads((run / "result.json").read_text())["metrics"]
    assert saved["broken"]["tuned"] is None and saved["broken"]["ci95"] == [None, None]
    assert saved["ssim_rgb"]["n"] == 2


@pytest.mark.usefixtures("_faulty")
def test_past_its_budget_the_run_stops_and_names_the_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(["train", str(write_tiny(tmp_path)), *faulty_options("raises", budget=0.01)])
    assert stop.value.code == FAILED
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: RewardBudgetError: reward 'faulty' failed on ")
    assert "asked to raise" in last and "1.0% is allowed" in last
    facts = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())
    assert facts["exit"].startswith("RewardBudgetError") and not (tmp_path / "runs" / "tiny" / "result.json").exists()


# -- on Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The faulty reward as a third party would install it: Ray's workers find it by its entry point."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copy(faulty_rewards.__file__, folder / "faulty_plugin.py")
    with (folder / "faulty_plugin.py").open("a") as module:
        module.write('\nPAIR = FAULTY["faulty"]\n')
    info = folder / "faulty_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlrestore.rewards]\nfaulty = faulty_plugin:PAIR\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        assert find_reward("faulty")[1].__name__ == "FaultyReward"
        yield folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, plugin: Path) -> TrainConfig:
    options = [
        *faulty_options("hangs", budget=1.0), "placement.kind=colocated", "placement.ranks=2",
        "placement.reward_workers=2", "placement.rank_cpus=0.5", "placement.reward_cpus=0.5", "placement.threads=1",
        "placement.start_timeout_s=900", "placement.stage_timeout_s=300", "ray.object_store_mb=80",
    ]  # fmt: skip
    return tiny_config(tmp_path_factory.mktemp("ray"), "nft", options)


@pytest.fixture(scope="module")
def crew(config: TrainConfig) -> Iterator[RayCrew]:
    crew = build_crew(config, StageTimes())
    assert isinstance(crew, RayCrew)
    yield crew
    crew.close()
    ray.shutdown()


def roll_out(crew: RayCrew, config: TrainConfig) -> list[Scored]:
    return list(
        crew.roll_out(
            chunks_of(config), rollout_chain(config.sampling, config.run.seed, 0, build_algorithm(config.algorithm))
        )
    )


def assert_scores_as_expected(config: TrainConfig, scored: list[Scored]) -> None:
    """Chunks in order; a chunk with a hanging row has no 'faulty' score; all else is what this process would score."""
    local = build_scorer({"ssim_rgb": all_terms(config)["ssim_rgb"]})
    assert [part.chunk.index for part in scored] == [0, 1, 2, 3]
    for part in scored:
        hangs = any(failing_rows(part.chunk))
        assert part.scores["faulty"].valid_N.tolist() == [not hangs] * 4, part.scores["faulty"].reason_N
        assert not hangs or "within timeout_s=3" in part.scores["faulty"].reason_N[0]
        again = local.score(part.images.restorations(part.chunk))["ssim_rgb"]
        assert part.scores["ssim_rgb"].value_N.tolist() == pytest.approx(again.value_N.tolist(), abs=1e-6)


def test_a_hanging_reward_has_its_worker_replaced(crew: RayCrew, config: TrainConfig) -> None:
    scored = roll_out(crew, config)
    assert_scores_as_expected(config, scored)
    hung = sum(any(failing_rows(chunk)) for chunk in chunks_of(config))
    assert 1 <= crew.rewards.replaced <= hung  # their hung threads went with them


def test_a_reward_worker_killed_in_use_is_replaced(
    crew: RayCrew, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = fetch([worker.pid.remote() for worker in crew.rewards.workers], 300, "reward workers")
    replaced, submit = crew.rewards.replaced, crew.rewards.submit
    queued: list[int] = []

    def submit_then_kill(key: int, *arguments: object) -> None:
        submit(key, *arguments)
        queued.append(key)  # keys go on from one rollout to the next
        if len(queued) == 4:  # all four chunks are queued, two on each worker
            os.kill(pids[0], signal.SIGKILL)

    monkeypatch.setattr(crew.rewards, "submit", submit_then_kill)
    scored = roll_out(crew, config)
    assert crew.rewards.replaced > replaced
    assert_scores_as_expected(config, scored)
    assert not set(fetch([worker.pid.remote() for worker in crew.rewards.workers], 300, "reward workers")) & {pids[0]}


def test_a_trainer_rank_killed_ends_the_run_with_one_line(
    crew: RayCrew, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 dies before the update in which rank 0 waits for its gradient. Comes last: the crew is lost."""
    scored = roll_out(crew, config)
    scores = combine(scored, Rubric(list(config.rewards.values())))
    credit = assign_credit(scores, config.credit, config.rollout.groups, config.run.seed, 0)
    requests = update_requests(chunks_of(config), credit, 2, config.engine.micro_batch, 1, config.run.seed, 0)
    chain = rollout_chain(config.sampling, config.run.seed, 0, build_algorithm(config.algorithm))
    ray.kill(crew.trainers[1])
    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        _guard(lambda: crew.update(requests, chain) and None)
    assert time.monotonic() - started < 60
    assert stop.value.code == FAILED
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: WorkerLostError: "), lines
    assert "the update of iteration 0" in lines[0]
