"""Constraints: "the hallucination rate is at most x", "consistency is at least the base's", held by Lagrange multipliers.

Maximise E[mix] subject to E[badness] <= bound. The rollout pays `lambda * penalty` out of its credit, and lambda climbs the
violation: `lambda <- clip(lambda + step * violation, 0, cap)` (dual ascent). A constraint that holds costs nothing.

Two kinds. A *mean* bounds the mean raw value; the penalty is the aligned value in scales. A *rate* (`threshold` given) bounds the
share of rollouts beyond the threshold on the term's bad side; a share has no slope, so the penalty is the logistic function of
the distance to the threshold in scales, which is half at the threshold and teaches its neighbours too. The bound is a number, or
the frozen base's on the same photos. Measured is what was rolled out, counted hard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.rubric import RubricScores, TermConfig

RATE_UNIT = 0.1  # a violation of ten points counts like one of one scale


@dataclass(frozen=True)
class ConstraintConfig:
    """One constraint of a run."""

    term: TermConfig  # what is measured (kind, params, scale, timeout_s)
    threshold: float | None = None  # raw: bound the share beyond it; None: bound the mean
    bound: float | None = None  # raw for a mean, a share in [0, 1] for a rate; None: the base's on the same tasks
    tolerance: float = 0.0  # so much worse than the bound is free; unit of the bound
    step: float = 0.1  # of dual ascent, a scale (or ten points) of violation an iteration
    start: float = 0.0  # lambda at the first iteration
    cap: float = 10.0  # largest lambda, utility units


@dataclass(frozen=True)
class Reading:
    """One constraint on one batch."""

    measured: float  # raw mean, or share
    bound: float  # the same unit, tolerance included
    violation: float  # positive is violated; scales, or tens of points


def hard_values(raw: Tensor, threshold: float | None, higher_is_better: bool) -> Tensor:
    """What is averaged: raw itself, or 1 where it lies beyond the threshold on its bad side and 0 elsewhere; NaN stays."""
    if threshold is None:
        return raw
    beyond = raw < threshold if higher_is_better else raw > threshold
    return torch.where(raw.isfinite(), beyond.to(raw.dtype), math.nan)


def measure(raw: Tensor, threshold: float | None, higher_is_better: bool) -> float:
    """Mean, or share beyond the threshold, over finite values; NaN if there are none."""
    known = raw[raw.isfinite()]
    return float(hard_values(known, threshold, higher_is_better).double().mean()) if len(known) else math.nan


def read(
    constraint: ConstraintConfig, raw: Tensor, base: Tensor | None, higher_is_better: bool, scale: float
) -> Reading:
    """Raw values (any shape, NaN unknown) against the bound, or against the base's raw values of the same tasks."""
    measured = measure(raw, constraint.threshold, higher_is_better)
    is_rate = constraint.threshold is not None
    worse = 1.0 if is_rate or not higher_is_better else -1.0  # the direction in which raw (or the share) gets worse
    if constraint.bound is not None:
        bound = constraint.bound
    else:
        assert base is not None, "the loop measures the base where a constraint asks for it"
        bound = measure(base, constraint.threshold, higher_is_better)
    bound += worse * constraint.tolerance
    violation = worse * (measured - bound) / (RATE_UNIT if is_rate else scale)
    return Reading(measured, bound, violation)


def penalty(constraint: ConstraintConfig, raw_N: Tensor, higher_is_better: bool, scale: float) -> Tensor:
    """[N] what lambda multiplies, utility units, larger is worse; NaN where raw is."""
    bad_N = (-raw_N if higher_is_better else raw_N) / scale
    if constraint.threshold is None:
        return bad_N
    bad_threshold = (-constraint.threshold if higher_is_better else constraint.threshold) / scale
    return torch.sigmoid(bad_N - bad_threshold)


class Multipliers:
    """The multipliers of a run. State: one number a constraint, saved with every checkpoint."""

    def __init__(self, constraints: Mapping[str, ConstraintConfig]):
        self.constraints = dict(constraints)
        self.value = {name: constraint.start for name, constraint in self.constraints.items()}

    def penalty_N(self, scores: RubricScores) -> Tensor:
        """[N] sum of lambda * penalty; NaN where a constraint's own score is unknown."""
        total_N = torch.zeros(len(scores.valid_N))
        for name, constraint in self.constraints.items():
            total_N = total_N + self.value[name] * penalty(constraint, *_raw(scores, name))
        return total_N

    def ascend(self, scores: RubricScores, base: Mapping[str, Tensor]) -> dict[str, float]:
        """Measure the batch and move the multipliers; what to log, with the lambda that the next iteration pays."""
        metrics: dict[str, float] = {}
        for name, constraint in self.constraints.items():
            raw_N, higher_is_better, scale = _raw(scores, name)
            reading = read(constraint, raw_N, base.get(name), higher_is_better, scale)
            if math.isfinite(reading.violation):
                moved = self.value[name] + constraint.step * reading.violation
                self.value[name] = min(max(moved, 0.0), constraint.cap)
                metrics |= {
                    f"constraint/measured/{name}": reading.measured,
                    f"constraint/bound/{name}": reading.bound,
                    f"constraint/violation/{name}": reading.violation,
                }
            metrics[f"constraint/lambda/{name}"] = self.value[name]
        return metrics

    def state_dict(self) -> dict[str, float]:
        return dict(self.value)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = {name: float(state[name]) for name in self.constraints}


def _raw(scores: RubricScores, name: str) -> tuple[Tensor, bool, float]:
    """Raw values [N] with NaN where invalid, the direction, and the scale of a constraint's term."""
    row = scores.names.index(name)
    raw_N = scores.raw_RN[row].masked_fill(~scores.valid_RN[row], math.nan)
    return raw_N, scores.specs[row].higher_is_better, float(scores.scale_R[row])


def check_constraint(constraint: ConstraintConfig) -> None:
    """ValueError for numbers that make no sense."""
    if constraint.threshold is not None and constraint.bound is not None and not 0 <= constraint.bound <= 1:
        raise ValueError(f"bound={constraint.bound} with a threshold is a share of rollouts: give a number in [0, 1]")
    for key, value, good in (
        ("tolerance", constraint.tolerance, constraint.tolerance >= 0),
        ("step", constraint.step, constraint.step > 0),
        ("start", constraint.start, 0 <= constraint.start <= constraint.cap),
        ("cap", constraint.cap, constraint.cap > 0),
    ):
        if not (good and math.isfinite(value)):
            raise ValueError(
                f"{key}={value} must be finite, step and cap > 0, tolerance >= 0, start in [0, cap={constraint.cap}]"
            )
