"""What a reward is: it declares its nature, it scores a batch of restorations, and a failure is invalid, never 0.

In : `Sequence[Restoration]` (images `[3, H, W]` float32 RGB in [0, 1]); sizes may differ between items.
Out: `Scores`, one row an item, raw values in the metric's own unit and direction. Aligning, scaling and mixing are the
rubric's.
Refuses: programming errors (`PROGRAMMING_ERRORS`) are raised. Everything else that fails makes the row invalid, with
its reason: `non-finite`, `out of range` (never clamped: that would dress a broken score up as a judgement) or
`data: ...`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from envs.types import Restoration

Block = Literal["quality", "fidelity"]
NEEDS = frozenset({"lq", "gt", "text"})
# These mean that the code is wrong, not the photo: they stop the run. NotImplementedError and the like are
# RuntimeErrors in Python's tree, so they are named here.
PROGRAMMING_ERRORS = (
    TypeError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    ImportError,
    NotImplementedError,
    SyntaxError,
)
RANGE_SLACK = 1e-5  # of the range (or of 1 when it is open): float32 rounding is not "out of range"


@dataclass(frozen=True)
class RewardSpec:
    """The nature of a reward. `version` changes whenever any score could change (weights, resize rule, constants)."""

    name: str  # unique within a rubric unless the term renames it; carries the colour space where one matters
    version: str
    higher_is_better: bool  # of the raw value; the rubric aligns, the reward never flips
    range: tuple[float | None, float | None]  # hard bounds of the raw value, None where open
    needs: frozenset[str]  # subset of NEEDS
    block: Block  # which half of the mix it belongs to
    scale: float  # a difference of this size is one unit of utility: about the std over the outputs of a base restorer
    differentiable: bool  # True only if `measure` gives a useful gradient with respect to the image
    deterministic: bool  # same bytes in, same value out
    licence: str  # of the code and the weights behind the score
    licensed_types: frozenset[str] = frozenset()  # degradation types for which the penalised change is allowed

    def __post_init__(self) -> None:
        if unknown := self.needs - NEEDS:
            raise ValueError(f"reward {self.name!r} needs {sorted(unknown)}; known needs are {sorted(NEEDS)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"reward {self.name!r} has scale {self.scale}; a scale is finite and > 0")


@dataclass(frozen=True)
class Scores:
    """The result of scoring N restorations with one reward."""

    value_N: Tensor  # [N] float32, raw unit and direction, NaN where invalid (so that a forgotten mask shows)
    valid_N: Tensor  # [N] bool
    reason_N: tuple[str, ...]  # "" where valid

    def __post_init__(self) -> None:
        n = len(self.reason_N)
        if self.value_N.shape != (n,) or self.valid_N.shape != (n,):
            raise AssertionError(f"value {tuple(self.value_N.shape)}, valid {tuple(self.valid_N.shape)}, {n} reasons")

    @staticmethod
    def failed(n: int, reason: str) -> Scores:
        """N invalid rows, e.g. for a worker that died or ran past its limit: `Scores.failed(8, "infra: timeout")`."""
        return Scores(torch.full((n,), math.nan), torch.zeros(n, dtype=torch.bool), (reason,) * n)

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """Rows of several batches, in order."""
        return Scores(
            torch.cat([p.value_N for p in parts]) if parts else torch.empty(0),
            torch.cat([p.valid_N for p in parts]) if parts else torch.empty(0, dtype=torch.bool),
            tuple(reason for p in parts for reason in p.reason_N),
        )


def checked_scores(value_N: Tensor, bounds: tuple[float | None, float | None]) -> Scores:
    """Scores from raw values `[N]`: a non-finite or out-of-range value becomes an invalid row with its reason."""
    value_N = value_N.detach().to("cpu", torch.float32).reshape(-1)
    low, high = bounds
    slack = RANGE_SLACK * max(1.0, (high - low) if low is not None and high is not None else 1.0)
    finite_N = value_N.isfinite()
    inside_N = torch.ones_like(finite_N)
    if low is not None:
        inside_N &= value_N >= low - slack
    if high is not None:
        inside_N &= value_N <= high + slack
    valid_N = finite_N & inside_N
    reason_N = tuple(
        "" if ok else ("out of range" if finite else "non-finite")
        for ok, finite in zip(valid_N.tolist(), finite_N.tolist(), strict=True)
    )
    return Scores(torch.where(valid_N, value_N, torch.full_like(value_N, math.nan)), valid_N, reason_N)


class Reward(ABC):
    """One scorer. Built from a frozen dataclass of parameters; see `rewards.registry` for the dict of all."""

    spec: RewardSpec
    waits = False  # True if scoring waits for another machine: such rewards are asked beside the others

    @classmethod
    @abstractmethod
    def spec_for(cls, params: Any) -> RewardSpec:
        """The spec that an instance with these parameters would have; cheap, loads no weights (the driver calls it)."""

    @abstractmethod
    def score(self, items: Sequence[Restoration]) -> Scores:
        """Raw scores of N restorations, in order; see the module docstring for failures. Never modifies its input."""


class ImageReward(Reward):
    """A reward that measures a batch of equally large images at once.

    A subclass gives `spec_for` and `measure`. This class groups items by size, checks the needs, retries a failing
    batch one by one, and turns what fails into invalid rows.
    """

    # Pixels a `measure` call gets. Four 128 px images stay in a CPU's cache, eight take twice as long each; and memory
    # is bounded.
    chunk_pixels: int = 4 * 128 * 128

    def __init__(self, params: Any) -> None:
        self.params = params
        self.spec = self.spec_for(params)

    @abstractmethod
    def measure(self, items: Sequence[Restoration]) -> Tensor:
        """Raw values `[N]` of N >= 1 restorations of one size. May raise; must not modify the images."""

    @torch.no_grad()
    def score(self, items: Sequence[Restoration]) -> Scores:
        rows: list[Scores | None] = [None] * len(items)
        by_size: dict[tuple[int, ...], list[int]] = {}
        chunks: list[list[int]] = []
        for i, item in enumerate(items):
            if reason := missing_data(item, self.spec.needs):
                rows[i] = Scores.failed(1, reason)
            else:
                by_size.setdefault(tuple(item.image.shape), []).append(i)
        for shape, index in by_size.items():
            size = max(1, self.chunk_pixels // (shape[1] * shape[2]))
            chunks.extend(index[k : k + size] for k in range(0, len(index), size))
        for index in chunks:
            batch = measure_or_invalid(self.measure, [items[i] for i in index], self.spec)
            for row, i in enumerate(index):
                rows[i] = Scores(batch.value_N[row : row + 1], batch.valid_N[row : row + 1], (batch.reason_N[row],))
        return Scores.cat([row for row in rows if row is not None])


def missing_data(item: Restoration, needs: frozenset[str]) -> str:
    """Reason why this item cannot be scored by a reward with these needs, or ""."""
    shape = tuple(item.image.shape)
    if len(shape) != 3 or shape[0] != 3:
        return f"data: image has shape {shape}, wanted (3, H, W)"
    if not item.image.isfinite().all():
        return "data: the image holds non-finite values"
    if "gt" in needs and item.task.gt is None:
        return "data: the task has no reference (gt)"
    if "text" in needs and not item.task.prompt:
        return "data: the task has no text"
    for name, other in (("lq", item.task.lq), ("gt", item.task.gt)):
        if name in needs and other is not None and tuple(other.shape) != shape:
            return f"data: {name} has shape {tuple(other.shape)}, the image {shape}"
    return ""


def measure_or_invalid(
    measure: Callable[[Sequence[Restoration]], Tensor], items: Sequence[Restoration], spec: RewardSpec
) -> Scores:
    """Scores of a batch; if it raises a data error, of its items one by one, so that one bad photo costs one row."""
    try:
        value_N = measure(items)
    except PROGRAMMING_ERRORS:
        raise
    except Exception as error:
        if len(items) == 1:
            return Scores.failed(1, f"data: {type(error).__name__}: {first_line(error)}")
        return Scores.cat([measure_or_invalid(measure, [item], spec) for item in items])
    assert value_N.numel() == len(items), f"{spec.name} returned {value_N.numel()} values for {len(items)} items"
    return checked_scores(value_N, spec.range)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, short enough for a log line."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else ""


def stack_images(items: Sequence[Restoration]) -> Tensor:
    """Restored images `[N, 3, H, W]` float32, a copy."""
    return torch.stack([item.image for item in items]).float()


def stack_lq(items: Sequence[Restoration]) -> Tensor:
    """Degraded inputs `[N, 3, H, W]` float32, a copy."""
    return torch.stack([item.task.lq for item in items]).float()


def stack_gt(items: Sequence[Restoration]) -> Tensor:
    """References `[N, 3, H, W]` float32, a copy; every item has one (the spec's needs were checked)."""
    return torch.stack([item.task.gt for item in items if item.task.gt is not None]).float()
