"""Which row a place in a run gets: a pure function of (seed, step, position), balanced over classes.

Two orders. `Draws` takes each place independently, with replacement. `Epochs` numbers the places of a run (`per_step`
of them a step) and goes through each class in a new permutation every time, so that n places of a class visit each of its
n rows once before any row comes twice; it resumes from the step's number as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from envs.rng import generator_for

_CYCLE = 1000  # places after which the order of classes repeats; weights are kept to 1/1000
_ORDER, _PERMUTATION = 2**63 + 1, 2**63 + 2  # counters that no step uses


class Classes:
    """Rows by class, with the probability of each class."""

    def __init__(self, labels: Sequence[str], rows: Sequence[int], weights: Mapping[str, float]) -> None:
        """labels: of all rows of the index; rows: those to sample. weights: by class; empty: rows are equally likely.

        ValueError for a weight of a class that has no row, or if no weight is positive.
        """
        by_class: dict[str, list[int]] = {}
        for row in rows:
            by_class.setdefault(labels[row] if weights else "", []).append(row)
        unknown = sorted(set(weights) - set(by_class))
        if unknown:
            raise ValueError(
                f"env.balance names {unknown[0]!r}, of which there is no row: known are {sorted(by_class)}"
            )
        self.names = sorted(name for name in by_class if weights.get(name, 0.0 if weights else 1.0) > 0)
        if not self.names or min(weights.values(), default=0.0) < 0:
            raise ValueError(f"env.balance must have weights of 0 or more, one of them positive, got {dict(weights)}")
        self.rows = [np.array(by_class[name], dtype=np.int64) for name in self.names]
        share = np.array([weights.get(name, 1.0) for name in self.names], dtype=np.float64)
        self.share = share / share.sum()


class Draws:
    """Independent places."""

    def __init__(self, classes: Classes, seed: int) -> None:
        self.classes, self.seed = classes, seed

    def row(self, step: int, position: int, attempt: int = 0) -> int:
        """attempt: 0; 1, 2, ... are substitutes for rows that cannot be read."""
        rng = generator_for(self.seed, step, position, attempt)
        chosen = int(np.searchsorted(np.cumsum(self.classes.share)[:-1], rng.random(), side="right"))
        rows = self.classes.rows[chosen]
        return int(rows[rng.integers(len(rows))])


class Epochs:
    """Places numbered through, each class in permutations. A substitute is an independent draw."""

    def __init__(self, classes: Classes, seed: int, per_step: int) -> None:
        self.classes, self.seed, self.per_step = classes, seed, per_step
        self.cycle, self.before, self.counts = _cycle(classes.share, seed)
        self._permutation = lru_cache(maxsize=2 * len(classes.rows))(self._permute)
        self._spare = Draws(classes, seed)

    def __reduce__(self) -> tuple[type[Epochs], tuple[Classes, int, int]]:
        return Epochs, (self.classes, self.seed, self.per_step)

    def row(self, step: int, position: int, attempt: int = 0) -> int:
        """ValueError for a position beyond `per_step`, which would be a place of the next step."""
        if position >= self.per_step:
            raise ValueError(
                f"env.per_step={self.per_step} and position {position} of a step is drawn: set env.per_step to the tasks "
                "of a step (rollout.groups, or optimiser.batch), or to 0"
            )
        if attempt:
            return self._spare.row(step, position, attempt)
        cycles, place = divmod(step * self.per_step + position, len(self.cycle))
        chosen = int(self.cycle[place])
        number = cycles * int(self.counts[chosen]) + int(self.before[place])
        epoch, index = divmod(number, len(self.classes.rows[chosen]))
        return int(self._permutation(chosen, epoch)[index])

    def _permute(self, chosen: int, epoch: int) -> np.ndarray:
        return generator_for(self.seed, _PERMUTATION, chosen, epoch).permutation(self.classes.rows[chosen])


def _cycle(share: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(class of each place, how many earlier places of the cycle are of that class, places a class), shuffled."""
    length = max(_CYCLE, len(share)) if len(share) > 1 else 1
    counts = np.maximum(1, np.floor(share * length).astype(np.int64))
    cycle = generator_for(seed, _ORDER).permutation(np.repeat(np.arange(len(share)), counts))
    before = np.zeros(len(cycle), dtype=np.int64)
    for chosen in range(len(share)):
        mine = cycle == chosen
        before[mine] = np.arange(int(mine.sum()))
    return cycle, before, counts
