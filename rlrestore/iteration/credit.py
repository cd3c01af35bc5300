"""From scores to credit: one advantage and one loss weight a rollout, group by group.

In: utilities (rewards turned so that higher is better), which of them are valid, and how to mix them. Out: `Credit`.
A failed score is missing, never 0: it enters no mean and no std, and if it is a required one the rollout gets advantage
0 and weight 0. The caller divides the loss by sum(weight_N), not by N. All statistics are float64 with population std.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rewards.normalisers import STD_EPS, group_mean, group_variance, normalised

ZERO_SPREAD = 1e-9  # below it, a group's utilities are the same number up to float noise

Normalise = Literal["pooled", "group", "global", "none"]
Fuse = Literal["normalise_then_sum", "sum_then_normalise"]
Baseline = Literal["mean", "leave_one_out"]
Between = Literal["equal", "spread"]


@dataclass(frozen=True)
class Credit:
    """What the learner needs of the scores of one iteration."""

    advantage_N: Tensor  # [N] float32, clamped; 0 where weight is 0
    weight_N: Tensor  # [N] float32, 0 for masked rollouts and dropped groups, else 1, or with `between: spread` about 1
    stats: dict[str, float]  # for the log; finite

    def dropped(self, groups: int) -> list[int]:
        """Groups of which no rollout is trained on."""
        return (self.weight_N.reshape(groups, -1) == 0).all(1).nonzero().flatten().tolist()


def group_credit(
    utility_RN: Tensor,
    weight_R: Tensor | Sequence[float],
    valid_RN: Tensor,
    required_R: Tensor | Sequence[bool],
    groups: int,
    *,
    normalise: Normalise = "pooled",
    baseline: Baseline = "mean",
    rank: bool = False,
    fuse: Fuse = "normalise_then_sum",
    floor_R: Tensor | Sequence[float] | None = None,
    clamp: float = 5.0,
    min_valid: int | None = None,
    min_spread: float = 0.0,
    normalise_R: Sequence[str | None] | None = None,
    penalty_N: Tensor | None = None,
    veto_N: Tensor | None = None,
    between: Between = "equal",
) -> Credit:
    """Advantages of N = groups * K rollouts, row-major by group, from R rewards.

    baseline    what is subtracted: "mean" of the group, or of its other members ("leave_one_out", RLOO, arXiv 2402.14740: n/(n-1)
                times as large, which the last step of "normalise_then_sum" takes away again unless `normalise` is "none")
    rank        each reward first becomes its rank inside the group, from -1 to 1; ties share their mean rank, and a group in which
                the reward's std is below its floor is one tie
    normalise   centre, then divide by (std + 1e-4): "pooled" sqrt(mean over groups of the variance),
                "group" that group's std, "global" std over the batch, "none" 1
    fuse        "normalise_then_sum" (GDPO, arXiv 2601.05242): each reward is normalised, they are added by weight and
                the sum is renormalised; "sum_then_normalise" (Flow-GRPO): raw utilities are added, the sum normalised
    floor_R     least std of each reward, in its own units: a reward that hardly varies must not speak at full volume
    min_valid   groups with fewer valid members are dropped; default max(2, K/2)
    min_spread  groups are dropped whose spread, the weighted mean of the rewards' stds (raw units), is smaller; the std of the
                penalties counts, too
    normalise_R a normaliser of its own for a reward (rewards.normalisers), instead of `normalise`; "normalise_then_sum" only
    penalty_N   what a rollout pays, utility units: hinges and priced constraints. Its difference to the group's mean is
                subtracted after normalising, where 1 is one std of a reward that has all the weight. NaN is neutral
    veto_N      rollouts that take the worst advantage of their group, whatever their rewards
    between     loss weight of a kept group: "equal" 1, or "spread", DP2O-SR's (`spread_weights`)

    Weights are divided by the sum of their absolute values. A sample that lacks an optional reward takes 0 for it.
    """
    R, N = utility_RN.shape
    if groups < 1 or N % groups:
        raise ValueError(f"{N} rollouts do not divide into {groups} groups; N must be groups * samples a group")
    K = N // groups
    min_valid = max(2, math.ceil(K / 2)) if min_valid is None else min_valid
    share_R = _shares(_vector(weight_R, R))
    floor_R = _vector(torch.zeros(R) if floor_R is None else floor_R, R)
    required_R = torch.as_tensor(required_R, dtype=torch.bool)

    utility = utility_RN.detach().cpu().double().reshape(R, groups, K)
    valid = valid_RN.detach().cpu().bool().reshape(R, groups, K) & utility.isfinite()
    utility = torch.where(valid, utility, 0.0)

    counted = valid[share_R != 0].any(0)  # a sample of which no weighted reward is known teaches nothing
    sample_ok = counted & (valid | ~required_R[:, None, None]).all(0)  # [G, K]
    enough_G = sample_ok.sum(1) >= min_valid
    spread_G = _weighted_spread(utility, valid & sample_ok, share_R)
    penalty = torch.zeros(groups, K) if penalty_N is None else penalty_N.detach().cpu().reshape(groups, K)
    penalty, fined = penalty.double().nan_to_num(nan=0.0), penalty.isfinite()
    spread_G = spread_G + group_variance(penalty, fined & sample_ok).sqrt()
    spread_ok_G = spread_G >= min_spread
    kept = sample_ok & (enough_G & spread_ok_G)[:, None]  # [G, K]
    used = valid & kept  # [R, G, K]: dropped groups enter no statistic
    if between not in ("equal", "spread"):
        raise ValueError(f"unknown between {between!r}; known: equal, spread")
    weight_G = spread_weights(utility, used, share_R, floor_R) if between == "spread" else torch.ones(groups).double()

    if rank:
        utility, floor_R = _ranks(utility, used, floor_R), torch.zeros_like(floor_R)
    mean = group_mean(utility, used)
    centred = torch.where(used, utility - mean, 0.0) * _baseline_factor(used, baseline)
    fined = fined & kept
    fine = torch.where(fined, penalty - group_mean(penalty, fined), 0.0)  # [G, K], sums to 0 over what is kept
    if fuse == "normalise_then_sum":
        parts = share_R[:, None, None] * centred / _scale(utility, used, normalise, floor_R)
        for row, name in enumerate(normalise_R or ()):
            if name is not None:
                parts[row] = share_R[row] * normalised(name, utility[row], used[row], float(floor_R[row]))
        advantage = _renormalise(parts.sum(0) - fine, kept, share_R, normalise)
    elif fuse == "sum_then_normalise":
        # a missing optional score stands at its group's mean, so that it moves nobody
        total = (share_R[:, None, None] * torch.where(used, utility, mean)).sum(0, keepdim=True)
        total = total - torch.where(fined, penalty, group_mean(penalty, fined))
        total_centred = (share_R[:, None, None] * centred).sum(0, keepdim=True) - fine
        total_floor = (share_R.abs() * floor_R).sum(0, keepdim=True)
        advantage = (total_centred / _scale(total, kept[None], normalise, total_floor))[0]
    else:
        raise ValueError(f"unknown fuse {fuse!r}; known: normalise_then_sum, sum_then_normalise")

    if veto_N is not None:
        advantage = _vetoed(advantage, kept, veto_N.cpu().reshape(groups, K))
    group_mean_G = advantage.sum(1) / kept.sum(1).clamp_min(1)
    tolerance = 1e-6 * max(1.0, float(advantage.abs().max()))
    assert float(group_mean_G.abs().max()) < tolerance, "advantages of a group must add up to 0: a mask leaks"
    clamped = advantage.clamp(-clamp, clamp)
    stats = _stats(advantage, clamped, kept, sample_ok, enough_G, spread_ok_G, spread_G)
    return Credit(clamped.reshape(N).float(), (kept * weight_G[:, None]).reshape(N).float(), stats)


def _stats(
    advantage: Tensor,
    clamped: Tensor,
    kept: Tensor,
    sample_ok: Tensor,
    enough_G: Tensor,
    spread_ok_G: Tensor,
    spread_G: Tensor,
) -> dict[str, float]:
    kept_A = clamped[kept]
    n_kept = int(kept.sum())
    return {
        "adv_abs_mean": float(kept_A.abs().mean()) if n_kept else 0.0,
        "adv_std": float(kept_A.std(correction=0)) if n_kept else 0.0,
        "clamped_frac": float((advantage != clamped).sum()) / max(n_kept, 1),
        "group_spread_mean": float(spread_G[enough_G].mean()) if bool(enough_G.any()) else 0.0,
        "zero_spread_groups": float((enough_G & (spread_G < ZERO_SPREAD)).sum()),
        "dropped_groups": float((~(enough_G & spread_ok_G)).sum()),
        "dropped_groups_invalid": float((~enough_G).sum()),
        "masked_samples": float((~sample_ok).sum()),
        "kept_samples": float(n_kept),
    }


def spread_weights(utility: Tensor, used: Tensor, share_R: Tensor, floor_R: Tensor) -> Tensor:
    """[G] sigma_g + 1 - mean sigma over kept groups, which has mean 1: DP2O-SR's weights between groups (arXiv 2510.18851).

    sigma_g is the std of a group's fused reward after each reward was stretched to [0, 1] inside the group; a reward whose
    in-group std is below its floor has no say there, or a near-tie would count as a full range.
    """
    inf = torch.tensor(math.inf, dtype=utility.dtype)
    low = torch.where(used, utility, inf).amin(-1, keepdim=True)
    width = torch.where(used, utility, -inf).amax(-1, keepdim=True) - low
    telling = used & (width > 0) & (group_variance(utility, used).sqrt() >= floor_R[:, None])[..., None]
    unit = torch.where(telling, (utility - low) / torch.where(width > 0, width, 1.0), 0.0)
    unit = torch.where(telling, unit, group_mean(unit, telling))  # a missing optional score moves nobody
    fused_GK, kept_GK = (share_R[:, None, None] * unit).sum(0), used.any(0)
    sigma_G, kept_G = group_variance(fused_GK, kept_GK).sqrt(), kept_GK.any(-1)
    mean = (sigma_G * kept_G).sum() / kept_G.sum().clamp_min(1)
    return sigma_G + 1 - mean


def _vector(values: Tensor | Sequence[float], R: int) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64).cpu()
    assert vector.shape == (R,), f"{tuple(vector.shape)} values for {R} rewards"
    return vector


def _shares(weight_R: Tensor) -> Tensor:
    total = float(weight_R.abs().sum())
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"reward weights {weight_R.tolist()} must be finite with at least one that is not 0")
    return weight_R / total


def _ranks(utility: Tensor, used: Tensor, floor_R: Tensor) -> Tensor:
    """[R, G, K] rank among the used members of a group, scaled to [-1, 1]: 2 (members below + half of those equal) / (n - 1) - 1."""
    both = used[..., :, None] & used[..., None, :]  # [R, G, K, K] rank of the third axis among the fourth
    below = ((utility[..., :, None] > utility[..., None, :]) & both).sum(-1)
    equal = ((utility[..., :, None] == utility[..., None, :]) & both).sum(-1) - 1
    others = (used.sum(-1, keepdim=True) - 1).clamp_min(1)
    ranks = 2 * (below + equal / 2) / others - 1
    tied = group_variance(utility, used).sqrt() < floor_R[:, None]
    return torch.where(used & ~tied[..., None], ranks, 0.0)


def _baseline_factor(used: Tensor, baseline: Baseline) -> Tensor:
    """r_i minus the mean of the others = n / (n - 1) times r_i minus the mean of all."""
    if baseline == "mean":
        return torch.ones(1, dtype=torch.float64)
    if baseline == "leave_one_out":
        n = used.sum(-1, keepdim=True)
        return n / (n - 1).clamp_min(1)
    raise ValueError(f"unknown baseline {baseline!r}; known: mean, leave_one_out")


def _weighted_spread(utility: Tensor, used: Tensor, share_R: Tensor) -> Tensor:
    """[G] weighted mean of the rewards' in-group stds: 0 exactly when no weighted reward tells the members apart."""
    return (share_R.abs()[:, None] * group_variance(utility, used).sqrt()).sum(0)


def _scale(value: Tensor, used: Tensor, normalise: Normalise, floor_R: Tensor) -> Tensor:
    """What to divide by, broadcastable to [R, G, K]."""
    if normalise == "none":
        return torch.ones(1, dtype=torch.float64)
    if normalise == "group":
        std = group_variance(value, used).sqrt()[:, :, None]
    elif normalise == "pooled":
        informative = used.sum(-1) >= 2  # one member has no spread, which is not the same as a spread of 0
        variance_R = (group_variance(value, used) * informative).sum(1) / informative.sum(1).clamp_min(1)
        std = variance_R.sqrt()[:, None, None]
    elif normalise == "global":
        flat = used.flatten(1)
        std = group_variance(value.flatten(1), flat).sqrt()[:, None, None]
    else:
        raise ValueError(f"unknown normalise {normalise!r}; known: pooled, group, global, none")
    return torch.maximum(std, floor_R[:, None, None]) + STD_EPS


def _renormalise(advantage: Tensor, kept: Tensor, share_R: Tensor, normalise: Normalise) -> Tensor:
    """Bring a weighted sum of unit-std rewards back to unit std (std only: the mean is 0 already).

    Never by less than sqrt(sum share^2), the std if the rewards were independent: a smaller one means that a floor, the
    global std or a conflict between rewards made the advantages small on purpose, and must not be amplified away.
    """
    if normalise == "none" or not bool(kept.any()):
        return advantage
    std = advantage[kept].square().mean().sqrt()
    return advantage / torch.maximum(std, share_R.square().sum().sqrt())


def _vetoed(advantage: Tensor, kept: Tensor, veto: Tensor) -> Tensor:
    """Vetoed rollouts take the least advantage of their group, which is then centred again; all vetoed is a tie."""
    worst_G1 = advantage.masked_fill(~kept, math.inf).amin(1, keepdim=True)
    replaced = torch.where(kept & veto, worst_G1, advantage)
    return torch.where(kept, replaced - group_mean(replaced, kept), 0.0)
