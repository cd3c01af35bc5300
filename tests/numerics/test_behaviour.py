"""Who makes the rollouts, and which groups are trained on: the EMA as behaviour policy, groups that are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from envs.types import Task
from rlrestore.build import build_crew, build_env, load_train_config
from rlrestore.config.files import ConfigError
from rlrestore.crew import LocalCrew, Scored, StageTimes
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.refill import Judged, gather
from rlrestore.iteration.stages import make_chunks
from rlrestore.reporting.log import read_metrics
from rlrestore.types import Chunk
from tests.tiny import iterate, tiny_config, train_tiny


def task(name: str) -> Task:
    return Task(f"photos/{name}@1", torch.zeros(3, 4, 4), ())


def gathered(spreads: dict[str, float], rounds: int, batch: int = 4) -> tuple[Any, list[list[int]], list[str]]:
    """Four groups of two whose photos have these spreads; (result, chunks of each sampling, photos forgotten)."""
    names, sampled, forgotten = list(spreads), [], []
    tasks = [task(name) for name in names[:4]]

    def roll_out(chunks: Sequence[Chunk], of: int) -> list[Scored]:
        assert of == (0 if not sampled else 8 // batch)
        sampled.append([chunk.index for chunk in chunks])
        return [Scored(chunk, SimpleNamespace(chunk=chunk), {}) for chunk in chunks]  # type: ignore[arg-type]

    def judge(tasks: Sequence[Task], rollouts: Sequence[Scored]) -> Any:
        seen = [part.chunk.tasks[row.group] for part in rollouts for row in part.chunk.rows]
        assert [t.id for t in seen] == [
            t.id for t in tasks for _ in range(2)
        ]  # credit and rollouts agree on the photos
        weight = torch.tensor([float(spreads[t.photo.split("/")[1]] > 0) for t in seen])
        return Judged("scores", Credit(torch.zeros(8), weight, {}), None, None)  # type: ignore[arg-type]

    result = gather(
        tasks, make_chunks(tasks, 2, batch, 0, 0), rounds, roll_out, judge,
        lambda n, skip: [task(name) for name in names[4 + skip : 4 + skip + n]],
        lambda tasks, _, groups: forgotten.extend(tasks[group].photo for group in groups),
    )  # fmt: skip
    return result, sampled, forgotten


def test_groups_that_teach_nothing_are_replaced() -> None:
    """b and d are solved; e, which takes b's place, too; f takes d's, g e's."""
    spreads = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0, "e": 0.0, "f": 1.0, "g": 1.0}
    found, sampled, forgotten = gathered(spreads, 3)
    assert [t.photo for t in found.tasks] == ["photos/a", "photos/g", "photos/c", "photos/f"]
    assert sampled == [[0, 1], [0, 1], [0]]  # chunks of two groups: of a and b, of c and d
    assert forgotten == ["photos/b", "photos/d", "photos/e"]
    assert found.replaced == 3 and len(found.images) == 5
    assert [chunk.index for chunk in found.chunks] == [0, 1]
    rows = make_chunks(found.tasks, 2, 4, 0, 0)
    assert [chunk.rows for chunk in found.chunks] == [chunk.rows for chunk in rows]  # the same noise in every place


def test_refilling_ends() -> None:
    spreads = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0, "e": 0.0, "f": 1.0}
    found, sampled, _ = gathered(spreads, 1, batch=2)
    assert [t.photo for t in found.tasks] == ["photos/a", "photos/e", "photos/c", "photos/f"]
    assert sampled == [[0, 1, 2, 3], [1, 3]]  # a chunk a group: nothing else is sampled again
    assert found.credit.dropped(4) == [1]  # is left out, as without refilling
    found, sampled, _ = gathered(spreads, 0)
    assert sampled == [[0, 1]] and found.replaced == 0


def test_a_run_refills(tmp_path: Path) -> None:
    """No group is ever above a spread of 1e6 scales: one round replaces all four, and then nothing is trained."""
    folder, _ = train_tiny(tiny_config(tmp_path, "awm", ["rollout.refill=1", "credit.min_spread=1e6", "run.steps=1"]))
    (row,) = (row for row in read_metrics(folder / "metrics.jsonl") if "group/replaced" in row)
    assert row["group/replaced"] == 4 and row["group/dropped_groups"] == 4
    assert row["cost/sample_forwards"] == 2 * 4 and row["train/skipped_steps"] == 1


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_ema_makes_the_rollouts(tmp_path: Path, kind: str) -> None:
    config = tiny_config(tmp_path, kind, ["rollout.weights=ema", "engine.ema=0.9"])
    env, crew = build_env(config.env), build_crew(config, StageTimes())
    assert isinstance(crew, LocalCrew)
    learner = crew.learner
    iterate(crew, config, env, 0)
    ema, published = learner.weights("ema"), learner.weights("behaviour")  # the second is what `separate` publishes
    sampled_by = {name: value for name, value in learner.behaviour.named_parameters() if name in ema}
    assert all(
        torch.equal(value, ema[name]) and torch.equal(value, published[name]) for name, value in sampled_by.items()
    )
    current = learner.weights("current")
    assert any(not torch.equal(value, current[name]) for name, value in sampled_by.items())
    # resume: a new learner that loads the files samples from the same weights
    learner.save(tmp_path)
    again = build_crew(config, StageTimes())
    assert isinstance(again, LocalCrew)
    again.load(tmp_path)
    for name, value in again.learner.behaviour.named_parameters():
        if name in sampled_by:
            assert torch.equal(value, sampled_by[name])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nft", "rollout.weights=ema", "samples from an old policy of its own"),
        ("awm", "rollout.refill=2", "set min_spread"),
        ("awm", "sampling.tail=0.4", "shortens what follows a window"),
        ("grpo", "sampling.window_schedule=decay", "set window_every"),
        ("grpo", "credit={between: spread, baseline: history}", "credit.baseline=history has no groups"),
    ],
)
def test_impossible_combinations_are_refused(tmp_path: Path, kind: str, change: str, message: str) -> None:
    tiny_config(tmp_path, kind)
    with pytest.raises(ConfigError, match=message):
        load_train_config(tmp_path / f"tiny_{kind}.yaml", [change])
