"""Gates: a score that decides how much other scores may count, measured against what the photo allows.

A gate has a term of its own (any reward, weight 0) and a *level* of the same photo that it is compared with: the frozen
base's, the LQ's, or a fixed number. Its *shortfall* is how much worse than the level a restoration is, in the term's raw unit,
positive is worse. Four forms (docs/rewards.md):

    multiply   u' = z + g (u - z),  g = clip((limit - shortfall) / (limit - margin), 0, 1)
    oars       u' = F Q_lq + F^(Q_lq / gamma) (Q - Q_lq),  F = g above: OARS (arXiv 2603.12811)
    hinge      R = mix - price * relu(shortfall - margin) / scale
    veto       shortfall > margin: the rollout takes the worst advantage of its group

`multiply` and `oars` change the utilities of the terms that they act on, before these are normalised; `hinge` gives a penalty
that the credit subtracts after normalising, in utility units, so that a price keeps its meaning while spreads change.
Refuses: unknown levels and failed scores make a rollout unknown (`known_N`), which masks it; they never open or shut a gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.base import RewardSpec
from rewards.rubric import RubricScores, TermConfig

FORMS = ("hinge", "multiply", "oars", "veto")
LEVELS = ("absolute", "base", "lq")
LIMIT_SCALES = 2.0  # default width of a gate, in the term's scales: about two stds of a base restorer's outputs
OARS_LOW, OARS_HIGH = 1.0, 10.0  # OARS' quality lives there; gamma = 7 is meant for it


@dataclass(frozen=True)
class GateConfig:
    """One gate of a run. `margin`, `limit` and `level` are in the raw unit of its term."""

    term: TermConfig  # what is measured (kind, params, scale, timeout_s)
    form: str = "multiply"
    against: str = "base"
    level: float | None = None  # of `against: absolute`
    margin: float = 0.0  # so much worse than the level is free
    limit: float | None = None  # multiply, oars: so much worse shuts it; None is margin + 2 scales
    price: float = 1.0  # hinge: utility lost a scale of shortfall beyond the margin
    acts_on: tuple[str, ...] = ()  # multiply, oars: terms acted on; () is every reward of the quality block
    gamma: float = 7.0  # oars
    quality: tuple[float, ...] = ()  # oars: raw values of the term acted on that stand for 1 and for 10


@dataclass(frozen=True)
class Levels:
    """What the base and the LQ score on the tasks of an iteration. Raw, NaN where unknown."""

    base: Mapping[str, Tensor] = field(default_factory=dict)  # term -> [G, M] samples of the frozen base
    lq: Mapping[str, Tensor] = field(default_factory=dict)  # term -> [G] the LQ itself


@dataclass(frozen=True)
class Gated:
    """Scores after the gates: what credit works with. N rollouts in G groups of K, group-major."""

    utility_RN: Tensor  # [R, N] with multiplying gates applied; NaN where invalid
    penalty_N: Tensor  # [N] >= 0, utility units: hinges; 0 where unknown
    veto_N: Tensor  # [N] bool
    known_N: Tensor  # [N] bool: every gate knows its score and its level
    openness: Mapping[str, Tensor]  # gate -> [N] in [0, 1], 1 is open; NaN where unknown. For the log


# -- arithmetic --------------------------------------------------------------------------------------------------------


def shortfall(raw: Tensor, level: Tensor, higher_is_better: bool) -> Tensor:
    """How much worse than the level, in raw units; negative is better."""
    return level - raw if higher_is_better else raw - level


def openness(short: Tensor, margin: float, limit: float) -> Tensor:
    """1 up to `margin`, 0 from `limit` on, linear between."""
    return ((limit - short) / (limit - margin)).clamp(0, 1)


def multiplied(utility_GK: Tensor, open_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """`zero + g (u - zero)`: a shut gate takes all that a rollout has above zero.

    Utilities have no zero of their own, and a negative number times 0 would be a reward. Here it lies one unit below the
    group's worst valid utility: a shut rollout ranks below every open one, the worst included, and a group that is shut as a
    whole is tied.
    """
    zero_G1 = utility_GK.masked_fill(~valid_GK, math.inf).amin(-1, keepdim=True) - 1.0
    return torch.where(valid_GK, zero_G1 + open_GK * (utility_GK - zero_G1), math.nan)


def oars(quality: Tensor, quality_lq: Tensor, fidelity: Tensor, gamma: float) -> Tensor:
    """`F Q_lq + F^(Q_lq / gamma) (Q - Q_lq)`: the better the LQ, the more fidelity decides what an improvement is worth.

    The exponent is at least 0, which a LQ below the scale's end would leave.
    """
    return fidelity * quality_lq + fidelity ** (quality_lq.clamp_min(0) / gamma) * (quality - quality_lq)


def on_oars_scale(raw: Tensor, ends: Sequence[float]) -> Tensor:
    """Raw values on 1..10, linear through the raw values that stand for 1 and for 10; not clamped."""
    worst, best = ends
    return OARS_LOW + (raw - worst) * (OARS_HIGH - OARS_LOW) / (best - worst)


# -- gates on the scores of an iteration -------------------------------------------------------------------------------


def apply_gates(gates: Mapping[str, GateConfig], scores: RubricScores, levels: Levels, groups: int) -> Gated:
    """All gates: `oars` first, then what multiplies."""
    utility_RN, n = scores.utility_RN.clone(), len(scores.valid_N)
    penalty_N, veto_N = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    known_N = torch.ones(n, dtype=torch.bool)
    opened: dict[str, Tensor] = {}
    open_RN: dict[int, Tensor] = {}  # row of a term -> [N] product of the gates that multiply it
    for name, gate in gates.items():
        short_N = _shortfall(name, gate, scores, levels, groups)
        known_N &= short_N.isfinite()
        scale = float(scores.scale_R[scores.names.index(name)])
        if gate.form == "hinge":
            excess_N = (short_N - gate.margin).clamp_min(0) / scale
            penalty_N += gate.price * excess_N.nan_to_num(nan=0.0)
            opened[name] = torch.where(short_N.isfinite(), (excess_N == 0).float(), math.nan)
        elif gate.form == "veto":
            veto_N |= short_N > gate.margin
            opened[name] = torch.where(short_N.isfinite(), (short_N <= gate.margin).float(), math.nan)
        else:
            open_N = opened[name] = openness(short_N, gate.margin, gate_limit(gate, scale))
            for row in acted_on(gate, scores):
                if gate.form == "multiply":
                    open_RN[row] = open_RN.get(row, torch.ones(n)) * open_N
                else:
                    utility_RN[row] = _improve(gate, row, open_N, scores, levels, groups)
    for row, open_N in open_RN.items():  # gates of one term multiply, whatever their order
        utility_GK, open_GK = utility_RN[row].reshape(groups, -1), open_N.reshape(groups, -1)
        utility_RN[row] = multiplied(utility_GK, open_GK, utility_GK.isfinite() & open_GK.isfinite()).flatten()
    return Gated(utility_RN, penalty_N, veto_N, known_N, opened)


def gate_limit(gate: GateConfig, scale: float) -> float:
    return gate.margin + LIMIT_SCALES * scale if gate.limit is None else gate.limit


def acted_on(gate: GateConfig, scores: RubricScores) -> list[int]:
    """Rows of the terms whose utilities a gate changes."""
    if gate.acts_on:
        return [scores.names.index(name) for name in gate.acts_on]
    weights = zip(scores.specs, scores.weight_R.tolist(), strict=True)
    return [row for row, (spec, weight) in enumerate(weights) if spec.block == "quality" and weight > 0]


def _shortfall(name: str, gate: GateConfig, scores: RubricScores, levels: Levels, groups: int) -> Tensor:
    """[N] raw, NaN where the score or the level is unknown."""
    row = scores.names.index(name)
    raw_N = scores.raw_RN[row].masked_fill(~scores.valid_RN[row], math.nan)
    return shortfall(raw_N, _level_N(name, gate, levels, groups, len(raw_N)), scores.specs[row].higher_is_better)


def _level_N(name: str, gate: GateConfig, levels: Levels, groups: int, n: int) -> Tensor:
    if gate.against == "absolute":
        assert gate.level is not None, "checked when the config was loaded"
        return torch.full((n,), gate.level)
    level_G = levels.base[name].nanmean(1) if gate.against == "base" else levels.lq[name]
    return level_G.float().repeat_interleave(n // groups)


def _improve(gate: GateConfig, row: int, open_N: Tensor, scores: RubricScores, levels: Levels, groups: int) -> Tensor:
    """OARS, in units of utility again, so that the term's floor keeps its meaning."""
    lq_N = levels.lq[scores.names[row]].float().repeat_interleave(len(open_N) // groups)
    quality_N, quality_lq_N = (on_oars_scale(raw_N, gate.quality) for raw_N in (scores.raw_RN[row], lq_N))
    raw_units = abs(gate.quality[1] - gate.quality[0]) / (OARS_HIGH - OARS_LOW)
    return oars(quality_N, quality_lq_N, open_N, gate.gamma) * raw_units / float(scores.scale_R[row])


def gate_metrics(gated: Gated) -> dict[str, float]:
    """Mean openness of every gate over the rollouts that it knows, and how many it does not know."""
    metrics: dict[str, float] = {}
    for name, open_N in gated.openness.items():
        known = open_N.isfinite()
        if bool(known.any()):
            metrics[f"gate/open/{name}"] = float(open_N[known].mean())
            metrics[f"gate/shut_frac/{name}"] = float((open_N[known] == 0).float().mean())
        metrics[f"gate/unknown_frac/{name}"] = 1 - float(known.float().mean())
    return metrics


# -- checks ------------------------------------------------------------------------------------------------------------


def check_gate(gate: GateConfig, scale: float, known: Mapping[str, RewardSpec]) -> None:
    """ValueError for what a gate may not ask for; `known` maps the names of rewards to their specs."""
    if gate.form not in FORMS:
        raise ValueError(f"form {gate.form!r} is unknown: choose one of {', '.join(FORMS)}")
    if gate.against not in LEVELS:
        raise ValueError(f"against {gate.against!r} is unknown: choose one of {', '.join(LEVELS)}")
    if (gate.against == "absolute") != (gate.level is not None):
        raise ValueError(
            f"against={gate.against} with level={gate.level}: a level (raw unit) goes with against: absolute, and only there"
        )
    if gate.form in ("multiply", "oars") and not gate_limit(gate, scale) > gate.margin:
        raise ValueError(
            f"limit={gate.limit} must lie above margin={gate.margin}: both are raw units worse than the level"
        )
    if not (math.isfinite(gate.price) and gate.price >= 0):
        raise ValueError(f"price={gate.price} must be finite and >= 0")
    for term in gate.acts_on:
        if term not in known:
            raise ValueError(f"acts_on names {term!r}, which is no reward of this run: {', '.join(known)}")
    if gate.form == "oars":
        _check_oars(gate, known)
    elif gate.form == "multiply" and not gate.acts_on and all(spec.block != "quality" for spec in known.values()):
        raise ValueError(
            "no reward is of the quality block, so that it would act on nothing: name terms in acts_on: [...]"
        )


def _check_oars(gate: GateConfig, known: Mapping[str, RewardSpec]) -> None:
    if len(gate.acts_on) != 1:
        raise ValueError(f"form=oars acts on one term and acts_on={list(gate.acts_on)}: name one, e.g. acts_on: [nss]")
    if len(gate.quality) != 2 or gate.quality[0] == gate.quality[1]:
        raise ValueError(
            f"form=oars needs quality: [raw value that stands for 1, raw value that stands for 10], not {list(gate.quality)}"
        )
    if (gate.quality[1] > gate.quality[0]) != known[gate.acts_on[0]].higher_is_better:
        raise ValueError(
            f"quality={list(gate.quality)} has the worse raw value second: {gate.acts_on[0]} is better when "
            f"{'higher' if known[gate.acts_on[0]].higher_is_better else 'lower'}, and 10 is best"
        )
    if not gate.gamma > 0:
        raise ValueError(f"gamma={gate.gamma} must be positive; 7 is the paper's")
