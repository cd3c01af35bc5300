"""Bringing rewards of different metrics to one scale inside a group, so that the wider metric does not own the mix.

Pure functions on `[..., K]` values with masks, in float64. A term's `normalise` names one of `NORMALISERS`; without it, the
learner's `credit.normalise` is used. Every one of them takes a floor, a least std in the value's own unit: what hardly
varies must not speak at full volume.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STD_EPS = 1e-4  # as Flow-GRPO, verl-omni and TRL; 1e-8 turns float noise into |A| ~ 1


def group_mean(value: Tensor, used: Tensor) -> Tensor:
    """[..., 1] mean over the used members of the last axis; 0 if there are none."""
    return (value * used).sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1)


def group_variance(value: Tensor, used: Tensor) -> Tensor:
    """[...] population variance over the used members of the last axis."""
    return group_mean((value - group_mean(value, used)).square(), used)[..., 0]


def group_z(value_GK: Tensor, used_GK: Tensor, floor: float) -> Tensor:
    """(value - mean) / std of its own group: LucidNFT (arXiv 2603.05947)."""
    std_G1 = group_variance(value_GK, used_GK).sqrt()[..., None]
    return (value_GK - group_mean(value_GK, used_GK)) / (std_G1.clamp_min(floor) + STD_EPS)


def min_max(value_GK: Tensor, used_GK: Tensor, floor: float) -> Tensor:
    """0 for the worst of a group, 1 for its best: DP2O-SR (arXiv 2510.18851).

    A range of 2 floors is the smallest that a std of one floor can have. Over 8 Gaussian rollouts its std is about 0.35, so beside
    a `group_z` term it speaks at a third of the volume.
    """
    low_G1 = value_GK.masked_fill(~used_GK, torch.inf).amin(-1, keepdim=True)
    high_G1 = value_GK.masked_fill(~used_GK, -torch.inf).amax(-1, keepdim=True)
    scaled = (value_GK - low_G1) / ((high_G1 - low_G1).clamp_min(2 * floor) + STD_EPS)
    return torch.where(used_GK, scaled, 0.0)


def gaussian_cdf(value_GK: Tensor, used_GK: Tensor, floor: float) -> Tensor:
    """Phi of the value standardised over the whole batch, in (0, 1): DNF-SR (arXiv 2609.15120). Outliers saturate."""
    flat, used = value_GK.flatten(), used_GK.flatten()
    std = float(group_variance(flat, used).sqrt())
    z = (value_GK - group_mean(flat, used)) / (max(std, floor) + STD_EPS)
    return 0.5 * (1 + torch.erf(z / 2**0.5))


NORMALISERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "gaussian_cdf": gaussian_cdf,
    "group_z": group_z,
    "min_max": min_max,
}


def normalised(name: str, value_GK: Tensor, used_GK: Tensor, floor: float) -> Tensor:
    """The named normaliser, centred on each group's mean, 0 where not used."""
    scaled = NORMALISERS[name](value_GK, used_GK, floor)
    return torch.where(used_GK, scaled - group_mean(torch.where(used_GK, scaled, 0.0), used_GK), 0.0)
