"""Levels of the base: asked for once a task, kept exactly, and never kept where a score failed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from envs.types import Task
from rewards.base import Scores, checked_scores
from rewards.constraints import ConstraintConfig
from rewards.gates import GateConfig
from rewards.rubric import FailureBudget, TermConfig
from rlrestore.crew import Scored
from rlrestore.diffusion.sampling import Chain
from rlrestore.iteration.levels import LevelKeeper, Wanted
from rlrestore.types import Chunk, Images

CHAIN = Chain((1.0, 0.5, 0.0))


def task(name: str) -> Task:
    return Task(f"photos/{name}@1", torch.full((3, 4, 4), 0.5), ())


class Stub:
    """A crew whose base scores its seed and whose LQ scores 7; names in `fails` fail."""

    def __init__(self) -> None:
        self.sampled: list[str] = []
        self.fails: set[str] = set()

    def generate(self, chunks: Sequence[Chunk], chain: Chain, which: str, names: Sequence[str]) -> Iterator[Scored]:
        assert which == "base" and chain is CHAIN
        for chunk in chunks:
            (one,) = chunk.tasks.values()
            self.sampled.append(one.id)
            raw = torch.tensor([row.seed % 1000 / 1000 for row in chunk.rows])
            scores = {n: _failed(len(raw)) if n in self.fails else checked_scores(raw, (None, None)) for n in names}
            images = Images(
                chunk.index, torch.zeros(len(raw), 3, 4, 4, dtype=torch.uint8), 0.0, 0.0, 0.0, 2 * len(raw), 0.0
            )
            yield Scored(chunk, images, scores)

    def score(self, chunks: Sequence[Chunk], images: Sequence[Images], names: Sequence[str]) -> list[dict[str, Scores]]:
        assert all(int(item.pixels[0, 0, 0, 0]) == 128 for item in images)  # 0.5 rounded half to even: the LQ as a file
        return [{name: checked_scores(torch.tensor([7.0]), (None, None)) for name in names} for _ in chunks]


def _failed(n: int) -> Scores:
    return Scores.failed(n, "infra: planted")


def keeper(base: tuple[str, ...] = ("fid",), lq: tuple[str, ...] = ("q",)) -> LevelKeeper:
    return LevelKeeper(Wanted(base, lq), 2, CHAIN, 3, FailureBudget())


def test_who_asks_for_what() -> None:
    term = TermConfig("x")
    gates = {
        "a": GateConfig(term),
        "b": GateConfig(term, against="lq"),
        "c": GateConfig(term, against="absolute", level=1.0, form="oars", acts_on=("nss",)),
    }
    constraints = {"d": ConstraintConfig(term), "e": ConstraintConfig(term, bound=1.0)}
    assert Wanted.by(gates, constraints) == Wanted(("a", "d"), ("b", "nss"))
    crew = Stub()
    none = keeper((), ())
    assert none.of(crew, [task("a")]).base == {} and none.metrics(8) == {} and crew.sampled == []  # type: ignore[arg-type]


def test_a_task_is_sampled_once_and_its_level_does_not_depend_on_company() -> None:
    crew, kept = Stub(), keeper()
    first: Any = kept.of(crew, [task("a"), task("b"), task("a")])  # type: ignore[arg-type]
    assert crew.sampled == ["photos/a@1", "photos/b@1"]
    assert first.base["fid"].shape == (3, 2) and torch.equal(first.base["fid"][0], first.base["fid"][2])
    assert first.lq["q"].tolist() == [7.0, 7.0, 7.0]
    # 2 tasks x 2 samples x 2 forwards over 24 rollouts
    assert {k: v for k, v in kept.metrics(24).items() if k != "time/levels_s"} == {
        "cost/base_forwards": 8 / 24,
        "cost/base_known_frac": 0.0,
    }
    second = kept.of(crew, [task("c"), task("b")])  # type: ignore[arg-type]
    assert crew.sampled == ["photos/a@1", "photos/b@1", "photos/c@1"]
    assert kept.metrics(24)["cost/base_known_frac"] == 0.5
    alone = keeper().of(crew, [task("b")])  # type: ignore[arg-type]
    assert torch.equal(second.base["fid"][1], alone.base["fid"][0])


def test_the_memory_survives_a_checkpoint_exactly() -> None:
    crew, kept = Stub(), keeper()
    before = kept.of(crew, [task("a"), task("b")])  # type: ignore[arg-type]
    again = keeper()
    again.load_state_dict(json.loads(json.dumps(kept.state_dict(), allow_nan=False)))
    after = again.of(crew, [task("a"), task("b")])  # type: ignore[arg-type]
    assert len(crew.sampled) == 2 and torch.equal(before.base["fid"], after.base["fid"])
    assert again.state_dict() == kept.state_dict()


def test_a_failure_is_counted_unknown_and_asked_again() -> None:
    crew, kept = Stub(), keeper()
    crew.fails = {"fid"}
    levels = kept.of(crew, [task("a")])  # type: ignore[arg-type]
    assert all(map(math.isnan, levels.base["fid"][0].tolist()))
    assert kept.budget.recent("fid")[:2] == (2, 2)  # failed, scored
    assert kept.state_dict() == []
    crew.fails = set()
    assert kept.of(crew, [task("a")]).base["fid"].isfinite().all() and len(crew.sampled) == 2  # type: ignore[arg-type]
