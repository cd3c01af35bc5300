"""Losses as pure functions: one value a sample ([N]); masking and the mean over samples are the caller's.

Clip ranges belong to mean-reduced log-probs (see `diffusion.kernels`). Advantages are already clamped by `credit`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ADVANTAGE_MAX = 5.0  # NFT maps [-5, 5] to a probability, so it needs the bound even if the credit used another clamp


class ClipFlags(NamedTuple):
    """What the clip did to each sample, [N] float32 of 0 and 1: their means are the clip fractions."""

    high_N: Tensor  # ratio > 1 + clip_hi
    low_N: Tensor  # ratio < 1 - clip_lo
    blocked_N: Tensor  # the clip takes the gradient away: high with A > 0, or low with A < 0


def ppo_clip_loss_N(log_ratio_N: Tensor, advantage_N: Tensor, clip_lo: float, clip_hi: float) -> Tensor:
    """max(-A rho, -A clamp(rho, 1-clip_lo, 1+clip_hi)), rho = exp(log_ratio): PPO (arXiv 1707.06347 eq. 7), minimised.

    Works on rho - 1 = expm1(log_ratio), because 1 + 1e-5 has only two good digits after the 1 in float32.
    """
    _check_clip(clip_lo, clip_hi)
    excess = torch.expm1(log_ratio_N)
    clipped = excess.clamp(-clip_lo, clip_hi)
    return -advantage_N + torch.maximum(-advantage_N * excess, -advantage_N * clipped)


@torch.no_grad()
def clip_flags_N(log_ratio_N: Tensor, advantage_N: Tensor, clip_lo: float, clip_hi: float) -> ClipFlags:
    excess = torch.expm1(log_ratio_N)
    high, low = excess > clip_hi, excess < -clip_lo
    blocked = (high & (advantage_N > 0)) | (low & (advantage_N < 0))
    return ClipFlags(high.float(), low.float(), blocked.float())


def nft_loss_N(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t_N: Tensor,
    advantage_N: Tensor,
    beta: float,
    adaptive: bool = True,
) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117) a sample; v, v_old, x_t, x0 are [N, ...], t_N in (0, 1]; gradient through v only.

    r = clamp(A/10 + 1/2, 0, 1);  v+ = b v + (1-b) v_old,  v- = (1+b) v_old - b v;  x+- = x_t - t v+-
    loss = 5 [ r mean_d (x+ - x0)^2 / w+  +  (1-r) mean_d (x- - x0)^2 / w- ] / b

    adaptive: w+- = max(1e-5, mean_d |x+- - x0|), detached and in float64.  Otherwise w+- = t^2, which makes the errors
    those of the velocity.  The value on-policy (v = v_old) does not depend on A: watch rewards, not this loss.
    """
    assert v.dtype in (torch.float32, torch.float64), f"the NFT loss is float32 or wider, got {v.dtype}"
    if not beta > 0:
        raise ValueError(f"NFT beta must be positive, got {beta}; published values are 1 and 0.1 (smaller is bolder)")
    v_old, x0 = v_old.detach(), x0.detach()
    positive_N = (advantage_N / (2 * ADVANTAGE_MAX) + 0.5).clamp(0, 1)
    t = t_N.reshape(-1, *[1] * (v.ndim - 1)).to(v.dtype)
    clean_gap = x_t.detach() - x0  # = t (eps - x0)

    def branch_N(v_branch: Tensor) -> Tensor:
        error = clean_gap - t * v_branch
        if adaptive:
            scale_N = error.detach().double().abs().flatten(1).mean(1).clamp_min(1e-5)
        else:
            scale_N = t_N.double() ** 2
        return error.square().flatten(1).mean(1) / scale_N

    towards_N = branch_N(beta * v + (1 - beta) * v_old)
    away_N = branch_N((1 + beta) * v_old - beta * v)
    return (5 * (positive_N * towards_N + (1 - positive_N) * away_N) / beta).to(v.dtype)


def velocity_mse_N(v: Tensor, v_ref: Tensor) -> Tensor:
    """[N] mean_d (v - v_ref)^2, gradient through v only: the reference penalty that needs no std."""
    return (v - v_ref.detach()).square().flatten(1).mean(1)


def nft_old_decay(kind: int, n: int) -> float:
    """d in theta_old <- d theta_old + (1-d) theta after step n. 0: hard copy; 1: ramp to .5; 2: ramp to .999."""
    if kind == 0:
        return 0.0
    if kind == 1:
        return min(0.001 * n, 0.5)
    if kind == 2:
        return 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999)
    raise ValueError(f"unknown decay type {kind} for the old policy; known: 0 (hard copy), 1 (to 0.5), 2 (to 0.999)")


def ema_decay(n: int, cap: float) -> float:
    """min((1+n)/(10+n), cap): a young average forgets its first weights quickly. n counts its updates from 0."""
    return min((1 + n) / (10 + n), cap)


def _check_clip(clip_lo: float, clip_hi: float) -> None:
    if not (0 < clip_lo < 1 and clip_hi > 0):
        raise ValueError(f"clip ranges must be positive and clip_lo below 1, got clip_lo={clip_lo}, clip_hi={clip_hi}")
