"""What the frozen base makes of the photos of an iteration, and what their LQs score: the levels that gates compare with.

The base is sampled once a task, `samples` times, on the chain of evaluation (the ODE, full noise: a level must not depend on
how bold this iteration's rollouts are), and scored with the terms that ask for it, not with the whole mix. That costs
`samples / K` of an iteration's sampling, counted in `cost/base_forwards`; the LQ costs a score and no forward.

Levels are kept by task id (same id, same bytes): an env whose tasks come back pays once. The noise of a task is a function of
(seed, task id, sample) and every task is a chunk of its own, so that a kept level is bit for bit what sampling again, in any
company, would give. The memory is part of a checkpoint, for the sake of the counters alone.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.types import Task
from rewards.base import Scores
from rewards.constraints import ConstraintConfig
from rewards.gates import GateConfig, Levels
from rewards.rubric import FailureBudget
from rlrestore.crew import Crew
from rlrestore.diffusion.sampling import Chain
from rlrestore.iteration.rollout import to_pixels
from rlrestore.seeds import derive_seed
from rlrestore.types import Chunk, Images, Row

REMEMBERED = 4096  # tasks; the least recently drawn ones are forgotten


@dataclass(frozen=True)
class Wanted:
    """Names of the terms whose level is asked for."""

    base: tuple[str, ...]
    lq: tuple[str, ...]

    @staticmethod
    def by(gates: Mapping[str, GateConfig], constraints: Mapping[str, ConstraintConfig]) -> Wanted:
        base = {name for name, gate in gates.items() if gate.against == "base"}
        base |= {name for name, constraint in constraints.items() if constraint.bound is None}
        lq = {name for name, gate in gates.items() if gate.against == "lq"}
        lq |= {term for gate in gates.values() if gate.form == "oars" for term in gate.acts_on}
        return Wanted(tuple(sorted(base)), tuple(sorted(lq)))


@dataclass(frozen=True)
class Level:
    """Of one task. Raw values, NaN where scoring failed."""

    base: dict[str, list[float]]  # term -> `samples` values
    lq: dict[str, float]

    @property
    def has_failed(self) -> bool:
        return any(map(math.isnan, (*(v for values in self.base.values() for v in values), *self.lq.values())))


class LevelKeeper:
    def __init__(self, wanted: Wanted, samples: int, chain: Chain, seed: int, budget: FailureBudget):
        self.wanted, self.samples, self.chain, self.seed, self.budget = wanted, samples, chain, seed, budget
        self._known: OrderedDict[str, Level] = OrderedDict()
        self._forwards = self._hits = self._asked = 0  # of the last `of`
        self._seconds = 0.0

    def of(self, crew: Crew, tasks: Sequence[Task]) -> Levels:
        """Levels of G tasks, in order; samples and scores what is not known yet."""
        if not (self.wanted.base or self.wanted.lq):
            return Levels()
        start = time.perf_counter()
        new = list({task.id: task for task in tasks if task.id not in self._known}.values())
        self._forwards, self._asked, self._hits = 0, len(tasks), sum(task.id in self._known for task in tasks)
        if new:
            base, lq = self._base(crew, new), self._lq(crew, new)
            for index, task in enumerate(new):
                self._known[task.id] = Level(
                    {name: base[name][index].tolist() for name in base},
                    {name: float(lq[name][index]) for name in lq},
                )
        for task in tasks:
            self._known.move_to_end(task.id)
        levels = [self._known[task.id] for task in tasks]
        self._forget()
        self._seconds = time.perf_counter() - start
        return Levels(
            {name: torch.tensor([level.base[name] for level in levels]) for name in self.wanted.base},
            {name: torch.tensor([level.lq[name] for level in levels]) for name in self.wanted.lq},
        )

    def metrics(self, rollouts: int) -> dict[str, float]:
        """Of the last call: forwards of the base a rollout, the share of tasks whose level was known, and the time."""
        if not self._asked:
            return {}
        return {
            "cost/base_forwards": self._forwards / rollouts,
            "cost/base_known_frac": self._hits / self._asked,
            "time/levels_s": self._seconds,
        }

    def _base(self, crew: Crew, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """term -> [tasks, samples]."""
        if not self.wanted.base:
            return {}
        chunks = [self._chunk(index, task, self.samples) for index, task in enumerate(tasks)]
        scored = list(crew.generate(chunks, self.chain, "base", self.wanted.base))
        self._count([part.scores for part in scored], self.wanted.base)
        self._forwards = sum(part.images.forwards for part in scored)
        return {name: torch.stack([_raw(part.scores[name]) for part in scored]) for name in self.wanted.base}

    def _lq(self, crew: Crew, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """term -> [tasks]."""
        if not self.wanted.lq:
            return {}
        chunks = [self._chunk(index, task, 1) for index, task in enumerate(tasks)]
        images = [Images(index, to_pixels(task.lq[None]), 0.0, 0.0, 0.0, 0, 0.0) for index, task in enumerate(tasks)]
        scored = crew.score(chunks, images, self.wanted.lq)
        self._count(scored, self.wanted.lq)
        return {name: torch.cat([_raw(part[name]) for part in scored]) for name in self.wanted.lq}

    def _count(self, scored: Sequence[Mapping[str, Scores]], names: Sequence[str]) -> None:
        """One batch of each term, however many tasks: the budget's window is counted in batches."""
        self.budget.update({name: Scores.cat([part[name] for part in scored]) for name in names})

    def _forget(self) -> None:
        """The oldest ones, and those with a score that failed: it may succeed the next time."""
        for key in [key for key, level in self._known.items() if level.has_failed]:
            del self._known[key]
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _chunk(self, index: int, task: Task, samples: int) -> Chunk:
        rows = tuple(Row(0, member, derive_seed(self.seed, f"base {task.id}", member)) for member in range(samples))
        return Chunk(index, rows, {0: task})

    def state_dict(self) -> list[list[object]]:
        """[task id, base, lq] from the least to the most recently drawn; null for NaN, which JSON has not."""
        return [
            [key, {name: [_null(v) for v in values] for name, values in level.base.items()},
             {name: _null(v) for name, v in level.lq.items()}]
            for key, level in self._known.items()
        ]  # fmt: skip

    def load_state_dict(self, state: Sequence[Sequence[object]]) -> None:
        self._known = OrderedDict(
            (str(key), Level({n: [_nan(v) for v in vs] for n, vs in base.items()}, {n: _nan(v) for n, v in lq.items()}))  # type: ignore[attr-defined]
            for key, base, lq in state
        )


def _raw(scores: Scores) -> Tensor:
    return scores.value_N.masked_fill(~scores.valid_N, math.nan)


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
