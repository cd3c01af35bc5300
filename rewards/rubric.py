"""The mix: which rewards count, how much, and how many failures are tolerated.

In : one `Scores` a term (raw values, N rows, the same restorations in the same order). Out: `RubricScores`: raw values,
utilities (aligned so that higher is better, divided by the term's scale), weights and masks. Normalising inside a group
and making advantages is the learner's credit module: it takes `utility_RN`, `weight_R`, `floor_R` and `valid_RN`.
`mix_N` is the plain weighted sum, for curves and tables.

Weights: the terms of a block share its mass by their `weight`; the blocks that are present share 1 equally (rewards.md
6.1: fidelity has its own half, however many quality terms there are), unless `block_mass` says otherwise. Gold terms
are scored and logged, with weight 0; so are the terms of gates and constraints, whose failures do mask a rollout.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import RewardSpec, Scores
from rewards.normalisers import NORMALISERS
from rewards.registry import reward_spec

ROLES = ("reward", "gold", "gate", "constraint")


@dataclass(frozen=True)
class TermConfig:
    """One reward of a run."""

    kind: str  # a key of rewards.registry.REWARDS
    name: str | None = None  # default: the spec's name; must be unique in a rubric
    weight: float = 1.0  # relative to the other terms of its block
    scale: float | None = None  # raw units a unit of utility; None: the spec's
    floor: float = 0.1  # smallest in-group std, in utility units, that normalisation divides by
    params: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0  # limit of one scoring call; past it its rows are invalid ("infra: timeout")
    required: bool = True  # an invalid required score masks the rollout; an optional one is neutral
    normalise: str | None = None  # a key of rewards.normalisers.NORMALISERS; None: the learner's credit.normalise
    # gold: watched, never optimised. gate, constraint: scored for one (rewards.gates, rewards.constraints), weight 0
    role: Literal["reward", "gold", "gate", "constraint"] = "reward"


@dataclass(frozen=True)
class RubricScores:
    """What the rubric makes of one batch of N restorations and R terms."""

    names: tuple[str, ...]  # R names, in the order of the config
    raw_RN: Tensor  # [R, N] float32, raw unit and direction, NaN where invalid
    utility_RN: Tensor  # [R, N] float32, higher is better, in scales, NaN where invalid
    weight_R: Tensor  # [R] float32, sums to 1 over reward terms, 0 for gold terms
    floor_R: Tensor  # [R] float32, utility units
    valid_RN: Tensor  # [R, N] bool
    required_R: Tensor  # [R] bool, True for required terms that are not gold
    valid_N: Tensor  # [N] bool, every required reward term is valid
    mix_N: Tensor  # [N] float32, weighted sum of utilities, NaN where not valid_N
    reason_RN: tuple[tuple[str, ...], ...]  # "" where valid
    specs: tuple[RewardSpec, ...]  # R
    scale_R: Tensor  # [R] float32, raw units of one unit of utility
    normalise_R: tuple[str | None, ...]  # R names of normalisers


class Rubric:
    """The terms of a run with their specs, weights and scales. Loads no weights: specs come from `reward_spec`."""

    def __init__(
        self,
        terms: Sequence[TermConfig],
        block_mass: Mapping[str, float] | None = None,
        specs: Sequence[RewardSpec] | None = None,
    ) -> None:
        """`specs` replaces the registry's for rewards that are not in it (tests); same order as `terms`."""
        if not terms:
            raise ValueError("a rubric needs at least one term, e.g. terms: [{kind: nss}, {kind: low_frequency}]")
        self.terms = tuple(terms)
        self.specs = tuple(specs) if specs is not None else tuple(reward_spec(t.kind, t.params) for t in terms)
        self.names = tuple(t.name or s.name for t, s in zip(self.terms, self.specs, strict=True))
        check_terms(self.terms, self.names)
        self.weight_R = term_weights(self.terms, self.specs, self.names, block_mass)
        self.scale_R = torch.tensor([t.scale or s.scale for t, s in zip(self.terms, self.specs, strict=True)])
        self.sign_R = torch.tensor([1.0 if s.higher_is_better else -1.0 for s in self.specs])
        self.floor_R = torch.tensor([t.floor for t in self.terms])
        self.required_R = torch.tensor([t.required and t.role != "gold" for t in self.terms])

    @property
    def needs(self) -> frozenset[str]:
        """Union of what all terms need of a task (gold terms too)."""
        return frozenset().union(*(s.needs for s in self.specs))

    def combine(self, scores_by_name: Mapping[str, Scores]) -> RubricScores:
        """Align, scale and mask one batch. KeyError if a term is missing: a dead worker owes `Scores.failed`."""
        scores = [scores_by_name[name] for name in self.names]
        raw_RN = torch.stack([s.value_N for s in scores]).float()
        valid_RN = torch.stack([s.valid_N for s in scores])
        utility_RN = self.sign_R[:, None] * raw_RN / self.scale_R[:, None]
        utility_RN = utility_RN.masked_fill(~valid_RN, math.nan)
        valid_N = (valid_RN | ~self.required_R[:, None]).all(0)
        return RubricScores(
            self.names,
            raw_RN,
            utility_RN,
            self.weight_R,
            self.floor_R,
            valid_RN,
            self.required_R,
            valid_N,
            mixed(utility_RN, self.weight_R, valid_RN, valid_N),
            tuple(s.reason_N for s in scores),
            self.specs,
            self.scale_R,
            tuple(t.normalise for t in self.terms),
        )


def mixed(utility_RN: Tensor, weight_R: Tensor, valid_RN: Tensor, valid_N: Tensor) -> Tensor:
    """`sum_k weight_k utility_k` `[N]`, NaN where not `valid_N`.

    A missing optional utility counts as the mean of its valid rows, so that it moves nobody up or down; 0 if it has
    none.
    """
    known_RN = utility_RN.masked_fill(~valid_RN, 0.0)
    mean_R1 = known_RN.sum(1, keepdim=True) / valid_RN.sum(1, keepdim=True).clamp_min(1)
    mix_N = (weight_R[:, None] * torch.where(valid_RN, known_RN, mean_R1)).sum(0)
    return mix_N.masked_fill(~valid_N, math.nan)


def check_terms(terms: Sequence[TermConfig], names: Sequence[str]) -> None:
    """ValueError for repeated names and for numbers that make no sense."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} reward terms are called {name!r}; give them different names (name: ...)")
    for name, term in zip(names, terms, strict=True):
        if term.role not in ROLES:
            raise ValueError(f"term {name!r} has role {term.role!r}; it is one of {', '.join(ROLES)}")
        if term.normalise is not None and term.normalise not in NORMALISERS:
            raise ValueError(f"term {name!r} has normalise {term.normalise!r}; it is one of {', '.join(NORMALISERS)}")
        if not (math.isfinite(term.weight) and term.weight >= 0):
            raise ValueError(
                f"term {name!r} has weight {term.weight}; a weight is >= 0 (the direction comes from the reward)"
            )
        if term.scale is not None and not (math.isfinite(term.scale) and term.scale > 0):
            raise ValueError(f"term {name!r} has scale {term.scale}; a scale is finite and > 0")
        if not (math.isfinite(term.floor) and term.floor > 0):
            raise ValueError(
                f"term {name!r} has floor {term.floor}; a floor is > 0, else a tied group turns noise into advantages"
            )
        if not term.timeout_s > 0:
            raise ValueError(f"term {name!r} has timeout_s {term.timeout_s}; give seconds > 0")
    if not any(t.role == "reward" for t in terms):
        raise ValueError("no term of the rubric is optimised; at least one needs role: reward")


def term_weights(
    terms: Sequence[TermConfig],
    specs: Sequence[RewardSpec],
    names: Sequence[str],
    block_mass: Mapping[str, float] | None,
) -> Tensor:
    """Normalised weights `[R]`: see the module docstring. ValueError for a block without weight or mass."""
    block_weight: dict[str, float] = {}
    for term, spec in zip(terms, specs, strict=True):
        if term.role == "reward":
            block_weight[spec.block] = block_weight.get(spec.block, 0.0) + term.weight
    mass = dict(block_mass) if block_mass else dict.fromkeys(block_weight, 1.0)
    if unknown := set(mass) - {"quality", "fidelity"}:
        raise ValueError(f"block_mass names {sorted(unknown)}; the blocks are 'quality' and 'fidelity'")
    for block, weight in block_weight.items():
        members = [n for n, t, s in zip(names, terms, specs, strict=True) if s.block == block and t.role == "reward"]
        if weight <= 0:
            raise ValueError(
                f"the weights of block {block!r} ({', '.join(members)}) sum to {weight}; give one of them a weight > 0"
            )
        if mass.get(block, 0.0) <= 0:
            raise ValueError(
                f"block_mass gives {block!r} {mass.get(block, 0.0)}, but {', '.join(members)} belong to it; "
                "give it a mass > 0 or make these terms role: gold"
            )
    total = sum(mass[block] for block in block_weight)
    return torch.tensor(
        [
            mass[s.block] / total * t.weight / block_weight[s.block] if t.role == "reward" else 0.0
            for t, s in zip(terms, specs, strict=True)
        ]
    )


class RewardBudgetError(RuntimeError):
    """A reward failed more often than the run allows."""


class FailureBudget:
    """Counts failures by reward and reason over the last `window` batches; `check` stops a run past its budget.

    `min_scores` is the smallest denominator: with 100, the first five failures are forgiven at `max_fraction` 0.05, so
    that one bad photo in a first batch of 8 does not stop a run, while a reward that fails always stops it within a few
    batches.
    """

    def __init__(self, max_fraction: float = 0.05, window: int = 50, min_scores: int = 100) -> None:
        if not 0 <= max_fraction <= 1 or window < 1 or min_scores < 1:
            raise ValueError(
                "failure budget wants 0 <= max_fraction <= 1, window >= 1, min_scores >= 1; "
                f"got {max_fraction}, {window}, {min_scores}"
            )
        self.max_fraction, self.window, self.min_scores = max_fraction, window, min_scores
        self._batches: dict[str, deque[tuple[int, dict[str, int]]]] = {}
        self.total: dict[str, Counter[str]] = {}  # failures since the start, by reward and reason (for the log)

    def add(self, name: str, scores: Scores) -> None:
        """Count one batch of one reward."""
        reasons = Counter(reason for reason, ok in zip(scores.reason_N, scores.valid_N.tolist(), strict=True) if not ok)
        self._batches.setdefault(name, deque(maxlen=self.window)).append((len(scores.reason_N), dict(reasons)))
        self.total.setdefault(name, Counter()).update(reasons)

    def update(self, scores_by_name: Mapping[str, Scores]) -> None:
        """Count one batch of every reward."""
        for name, scores in scores_by_name.items():
            self.add(name, scores)

    def recent(self, name: str) -> tuple[int, int, Counter[str]]:
        """(failed, scored, failures by reason) of one reward within the window."""
        batches = self._batches.get(name, deque())
        reasons: Counter[str] = Counter()
        for _, failed in batches:
            reasons.update(failed)
        return sum(reasons.values()), sum(n for n, _ in batches), reasons

    def fractions(self) -> dict[str, float]:
        """Failed share of every reward within the window."""
        recent = {name: self.recent(name) for name in self._batches}
        return {name: failed / max(scored, 1) for name, (failed, scored, _) in recent.items()}

    def summary(self, reasons: int = 5) -> dict[str, Any]:
        """For result.json: rows of training that failed since the start, by reward, with the commonest reasons."""
        return {
            name: {"failed": counts.total(), "reasons": dict(counts.most_common(reasons))}
            for name, counts in self.total.items()
        }

    def check(self) -> None:
        """Raise `RewardBudgetError` for a reward past its budget, with its commonest reason and both numbers."""
        for name in self._batches:
            failed, scored, reasons = self.recent(name)
            allowed = self.max_fraction * max(scored, self.min_scores)
            if failed > allowed:
                reason, count = reasons.most_common(1)[0]
                raise RewardBudgetError(
                    f"reward {name!r} failed on {failed} of its last {scored} scores ({failed / scored:.1%}); "
                    f"{self.max_fraction:.1%} is allowed. Most often ({count}x): {reason}. "
                    "Mend the reward, raise max_fraction, or take the term out of the mix."
                )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for resume."""
        return {
            "batches": {name: [[n, dict(r)] for n, r in batches] for name, batches in self._batches.items()},
            "total": {name: dict(counter) for name, counter in self.total.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches = {
            name: deque(((int(n), dict(r)) for n, r in batches), maxlen=self.window)
            for name, batches in state["batches"].items()
        }
        self.total = {name: Counter(counts) for name, counts in state["total"].items()}
