"""Base against tuned on held-out tasks, at equal noise: the table that a run ends with.

Every metric is measured on the same tasks with the same seeds for both weights; the difference of a task is averaged over
its seeds, and the interval is a bootstrap over tasks. Metrics are named with their colour space; *gold* ones were never
rewarded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.types import Task
from rewards.constraints import ConstraintConfig, hard_values
from rewards.rubric import Rubric
from rlrestore.crew import Crew, Scored
from rlrestore.diffusion.sampling import Chain
from rlrestore.evaluation.statistics import bootstrap_ci
from rlrestore.iteration.stages import combine, make_chunks
from rlrestore.reporting.board import correlation_RR
from rlrestore.reporting.pictures import grid

EVALUATION_SEED = 977  # noise of evaluation: one for all runs, so that runs can be compared


FEW_PHOTOS = 10  # below it a bootstrap interval is too narrow (rlrestore.evaluation.statistics)


@dataclass(frozen=True)
class Measured:
    """One set of weights on all held-out tasks."""

    values: dict[str, Tensor]  # metric -> [tasks, samples] raw, NaN where scoring failed; "mix" included
    pictures: list[Tensor]  # first sample of each task, [3, H, W] uint8

    def picture(self, index: int) -> Tensor:
        """[3, H, W] in [0, 1]."""
        return self.pictures[index].float() / 255


@dataclass(frozen=True)
class MetricRow:
    """One line of the table, as `result.json` has it."""

    role: str  # "reward" or "gold"; "gate" or "constraint" for a term that only serves one
    higher_is_better: bool
    base: float
    tuned: float
    delta: float
    ci95: tuple[float, float]
    n: int  # tasks

    @property
    def verdict(self) -> str:
        """better / worse if the interval excludes 0, else within noise."""
        low, high = self.ci95 if self.higher_is_better else (-self.ci95[1], -self.ci95[0])
        return "better" if low > 0 else "worse" if high < 0 else "within noise"


@dataclass(frozen=True)
class ConstraintRow:
    """What a constraint bounds, on the held-out tasks with the tuned weights, as `result.json` has it."""

    kind: str  # "mean" of the raw value, or "rate": share of restorations beyond the threshold
    bound: float  # tolerance included
    base: float
    measured: float
    ci95: tuple[float, float]  # of `measured`; where the base is the bound, of the paired difference, from the base
    n: int  # tasks
    held: bool  # not violated beyond noise


class Evaluation:
    """Fixed tasks and noise; `measure` any weights on them."""

    def __init__(self, tasks: Sequence[Task], rubric: Rubric, chain: Chain, samples: int, batch: int, pictures: int):
        self.tasks, self.rubric, self.chain, self.samples = list(tasks), rubric, chain, samples
        self.chunks = make_chunks(self.tasks, samples, batch, EVALUATION_SEED)
        self.pictures = min(pictures, len(self.tasks))

    @property
    def images(self) -> int:
        return len(self.tasks) * self.samples

    def measure(self, crew: Crew, which: str) -> Measured:
        """Sample and score with weights base | ema | current."""
        scored = list(crew.generate(self.chunks, self.chain, which))
        table = combine(scored, self.rubric)
        shape = (len(self.tasks), self.samples)
        values = {name: table.raw_RN[index].reshape(shape) for index, name in enumerate(table.names)}
        values["mix"] = table.mix_N.reshape(shape)
        return Measured(values, self._first_samples(scored))

    def agreement(self, measured: Measured) -> tuple[Tensor, list[str]]:
        """How the mix, rewards and gold metrics agree over the seeds of a task ([R, R], names); higher is better in all."""
        signs = dict(zip(self.rubric.names, self.rubric.sign_R.tolist(), strict=True))
        names = ["mix", *self.rubric.names]
        return correlation_RR(torch.stack([signs.get(name, 1.0) * measured.values[name] for name in names])), names

    def grid(self, base: Measured, tuned: Measured) -> Tensor:
        """LQ | base | tuned | GT at equal noise."""
        has_gt = all(task.gt is not None for task in self.tasks)
        rows = [
            [
                task.lq,
                base.picture(index),
                tuned.picture(index),
                *([task.gt] if task.gt is not None and has_gt else []),
            ]
            for index, task in enumerate(self.tasks[: self.pictures])
        ]
        titles = ["LQ", "base", "tuned", *(["GT"] if has_gt else [])]
        return grid(rows, titles, [task.id.split("@")[0] for task in self.tasks[: self.pictures]])

    def _first_samples(self, scored: Sequence[Scored]) -> list[Tensor]:
        first: dict[int, Tensor] = {}
        for part in scored:
            for index, row in enumerate(part.chunk.rows):
                if row.member == 0:
                    first[row.group] = part.images.pixels[index].clone()
        return [first[index] for index in range(len(self.tasks))]


def compare(base: Measured, tuned: Measured, rubric: Rubric) -> dict[str, MetricRow]:
    """One row a metric; the mix first, then rewards, then gold."""
    roles = {name: (term.role, spec) for name, term, spec in zip(rubric.names, rubric.terms, rubric.specs, strict=True)}
    rows = {"mix": _row(base.values["mix"], tuned.values["mix"], "reward", True)}
    for name, (role, spec) in sorted(
        roles.items(), key=lambda item: (item[1][0] == "gold", list(roles).index(item[0]))
    ):
        rows[name] = _row(base.values[name], tuned.values[name], role, spec.higher_is_better)
    return rows


def _row(base: Tensor, tuned: Tensor, role: str, higher_is_better: bool) -> MetricRow:
    """Only (task, seed) pairs that both weights have a score for."""
    both = base.isfinite() & tuned.isfinite()
    if not bool(both.any()):
        return MetricRow(role, higher_is_better, float("nan"), float("nan"), float("nan"), (float("nan"),) * 2, 0)
    nan = torch.full_like(base, float("nan"))
    interval = bootstrap_ci(torch.where(both, tuned - base, nan).double().numpy())
    kept = both.any(1)

    def mean(values: Tensor) -> float:
        return float(np.nanmean(np.nanmean(torch.where(both, values, nan)[kept].double().numpy(), axis=1)))

    return MetricRow(
        role, higher_is_better, mean(base), mean(tuned), interval.mean, (interval.low, interval.high), int(kept.sum())
    )


def constraint_rows(
    constraints: Mapping[str, ConstraintConfig], base: Measured, tuned: Measured, rubric: Rubric
) -> dict[str, ConstraintRow]:
    """One row a constraint; the interval is a bootstrap over tasks."""
    specs = dict(zip(rubric.names, rubric.specs, strict=True))
    return {
        name: _constraint_row(constraint, base.values[name], tuned.values[name], specs[name].higher_is_better)
        for name, constraint in constraints.items()
    }


def _constraint_row(constraint: ConstraintConfig, base: Tensor, tuned: Tensor, higher_is_better: bool) -> ConstraintRow:
    nan, is_rate = float("nan"), constraint.threshold is not None
    kind, worse_is_higher = "rate" if is_rate else "mean", is_rate or not higher_is_better
    both = base.isfinite() & tuned.isfinite()
    if not bool(both.any()):
        return ConstraintRow(kind, nan, nan, nan, (nan, nan), 0, False)
    before, now = (
        torch.where(both, hard_values(values, constraint.threshold, higher_is_better), nan) for values in (base, tuned)
    )
    base_mean, measured = (bootstrap_ci(values.double().numpy()).mean for values in (before, now))
    slack = constraint.tolerance if worse_is_higher else -constraint.tolerance
    bound = (base_mean if constraint.bound is None else constraint.bound) + slack
    # what is held against the base is a difference on equal tasks, which is known better than either side
    moved = now - before if constraint.bound is None else now
    interval = bootstrap_ci(moved.double().numpy())
    offset = base_mean if constraint.bound is None else 0.0
    low, high = interval.low + offset, interval.high + offset
    held = not (low > bound if worse_is_higher else high < bound)  # an unknown end (one task) shows no violation
    return ConstraintRow(kind, bound, base_mean, measured, (low, high), interval.units, held)


def table(rows: Mapping[str, MetricRow]) -> str:
    """The rows as text, aligned for a terminal."""
    header = ("metric", "role", "base", "tuned", "delta", "95% interval", "n", "")
    body = [
        (
            name + (" (up)" if row.higher_is_better else " (down)"), row.role, _digits(row.base), _digits(row.tuned),
            _digits(row.delta, "+"), f"[{_digits(row.ci95[0], '+')}, {_digits(row.ci95[1], '+')}]", str(row.n), row.verdict,
        )
        for name, row in rows.items()
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *body)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def constraint_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a constraint of `result.json`, for a terminal."""
    return [
        f"constraint {name}: {row['kind']} {row['measured']:.4g} [{_ends(row['ci95'])}], bound {row['bound']:.4g}, base "
        f"{row['base']:.4g}: {'held' if row['held'] else 'VIOLATED'}"
        if row["n"]
        else f"constraint {name}: not measured, every score failed"
        for name, row in rows.items()
    ]


def _ends(ci95: Sequence[float | None]) -> str:
    return ", ".join("-" if end is None else f"{end:.4g}" for end in ci95)


def _digits(value: float, sign: str = "") -> str:
    """Four decimals; of what would be lost in them, two significant digits."""
    return f"{value:{sign}.1e}" if 0 < abs(value) < 1e-3 else f"{value:{sign}.4f}"


def caveats(tasks: Sequence[Task]) -> list[str]:
    """What a reader must know of the intervals of a table over these tasks."""
    return caveats_of([task.photo for task in tasks])


def caveats_of(photo_of: Sequence[str]) -> list[str]:
    """The same from the photo of each task."""
    photos = len(set(photo_of))
    lines = []
    if photos < len(photo_of):
        lines.append(
            f"note: the {len(photo_of)} tasks are crops of {photos} photos; intervals take them as independent"
        )
    if photos < FEW_PHOTOS:
        lines.append(
            f"note: {photos} photos are too few for a bootstrap interval, which is then too narrow: take at least "
            f"{FEW_PHOTOS} (evaluate.tasks=N, env.held_out_folder=FOLDER)"
        )
    return lines
