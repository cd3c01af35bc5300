"""Losses as pure functions: one value a sample ([N]); masking and the mean over samples are the caller's.

Clip ranges belong to mean-reduced log-probs (see `diffusion.kernels`). Advantages are already clamped by `credit`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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


def guard_log_ratio_N(mean: Tensor, mean_old: Tensor, x_next: Tensor, std: Tensor) -> Tensor:
    """S (log rho + mean_d (mu - mu_old)^2 / 2S^2) = mean_d z (mu - mu_old), z = (x' - mu_old) / S: GRPO-Guard's log ratio.

    arXiv 2510.22319. Its mean over the old policy's samples is 0, where that of log rho is -KL.
    """
    mean_old, x_next = mean_old.detach(), x_next.detach()
    return ((x_next - mean_old) / std.detach() * (mean - mean_old)).flatten(1).mean(1)


def dppo_loss_N(log_ratio_N: Tensor, kl_old_N: Tensor, advantage_N: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(-A rho, 0 where it is dropped; 1 where it is dropped): Flow-DPPO's trust region (arXiv 2606.11025).

    Dropped: KL from the old policy at least `delta`, and A pushes rho further from 1.
    """
    excess = torch.expm1(log_ratio_N)
    outward = ((advantage_N > 0) & (excess > 0)) | ((advantage_N < 0) & (excess < 0))
    dropped = (kl_old_N.detach() >= delta) & outward
    return torch.where(dropped, torch.zeros_like(excess), -advantage_N * (1 + excess)), dropped.float()


AWM_WEIGHTS = ("uniform", "t", "t2", "huber", "ghuber")


def awm_weighted_N(error_N: Tensor, t_N: Tensor, weighting: str) -> Tensor:
    """[N] float64 weighted matching error of AWM (arXiv 2509.25050), err = mean_d (v - target)^2.

    uniform: err;  t: t err;  t2: t^2 err;  huber: t (sqrt(err + 1e-10) - 1e-5);
    ghuber: (t / p) [(err + 1e-10)^p - 1e-10^p], p = 1/4.
    """
    error, t = error_N.double(), t_N.double()
    return {
        "uniform": lambda: error,
        "t": lambda: t * error,
        "t2": lambda: t * t * error,
        "huber": lambda: t * ((error + 1e-10).sqrt() - 1e-5),
        "ghuber": lambda: 4 * t * ((error + 1e-10) ** 0.25 - 1e-10**0.25),
    }[weighting]()


def awm_loss_N(weighted_N: Tensor, weighted_old_N: Tensor, advantage_N: Tensor, clip: float) -> Tensor:
    """PPO clip of rho = exp(l - l_old) with A / 5, l = -weighted error: AWM. Where both are equal its gradient is that of A/5 err."""
    log_ratio_N = weighted_old_N.detach() - weighted_N
    return ppo_clip_loss_N(log_ratio_N, advantage_N / ADVANTAGE_MAX, clip, clip)


def dgpo_loss_N(
    error_N: Tensor, error_reference_N: Tensor, advantage_N: Tensor, weight_N: Tensor, group_N: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """(W A err, W): DGPO (arXiv 2510.08425); errors are matching errors at one t and eps a group, `group_N` int64.

    W = sigmoid((beta / G) sum_{i in group} A_i (err_i - err_ref_i)) over its G valid members (weight > 0), without gradient. With
    this W the gradient is that of -(1/beta) log sigmoid(-(beta / G) sum A (err - err_ref)).
    """
    valid = (weight_N > 0).to(error_N.dtype)
    gap = (advantage_N * (error_N - error_reference_N) * valid).detach()
    same = (group_N[:, None] == group_N[None, :]).to(error_N.dtype)
    mean_gap = (same @ gap) / (same @ valid).clamp_min(1)
    group_weight = torch.sigmoid(beta * mean_gap)
    return group_weight * advantage_N * error_N, group_weight


@torch.no_grad()
def dgpo_clipped_N(error_N: Tensor, error_old_N: Tensor, advantage_N: Tensor, clip: float) -> Tensor:
    """[N] bool, members that DGPO holds where they are: rho = exp(err_old - err) beyond 1 + clip with A > 0, or below 1 - clip."""
    excess = torch.expm1(error_old_N - error_N)
    return torch.where(advantage_N > 0, excess > clip, excess < -clip)


def dpo_loss_P(winner_gain_P: Tensor, loser_gain_P: Tensor, beta: float) -> Tensor:
    """-log sigmoid((beta / 2) (gain_w - gain_l)), gain = err_ref - err, mean-reduced: Diffusion-DPO (arXiv 2311.12908, eq. 14)."""
    return -logsigmoid(beta / 2 * (winner_gain_P - loser_gain_P))


def d3po_loss_P(winner_log_rho_P: Tensor, loser_log_rho_P: Tensor, beta: float, clip: float) -> Tensor:
    """-log sigmoid(b [log clamp(rho_w) - log clamp(rho_l)]), rho = p / p_ref clamped to 1 +- clip: D3PO (arXiv 2311.13231)."""
    low, high = math.log1p(-clip), math.log1p(clip)
    return -logsigmoid(beta * (winner_log_rho_P.clamp(low, high) - loser_log_rho_P.clamp(low, high)))


def velocity_mse_N(v: Tensor, v_ref: Tensor) -> Tensor:
    """[N] mean_d (v - v_ref)^2, gradient through v only: the reference penalty that needs no std."""
    return (v - v_ref.detach()).square().flatten(1).mean(1)


OLD_DECAYS = (0, 1, 2, 3)


def old_policy_decay(kind: int, n: int) -> float:
    """d in theta_old <- d theta_old + (1-d) theta after step n. 0: hard copy; 1: to .5; 2: to .999 (NFT); 3: to .3 (AWM, DGPO)."""
    if kind == 0:
        return 0.0
    if kind == 1:
        return min(0.001 * n, 0.5)
    if kind == 2:
        return 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999)
    if kind == 3:
        return min(0.001 * n, 0.3)
    raise ValueError(f"unknown decay type {kind} for the old policy; known: {', '.join(map(str, OLD_DECAYS))}")


def ema_decay(n: int, cap: float) -> float:
    """min((1+n)/(10+n), cap): a young average forgets its first weights quickly. n counts its updates from 0."""
    return min((1 + n) / (10 + n), cap)


def _check_clip(clip_lo: float, clip_hi: float) -> None:
    if not (0 < clip_lo <= 1 and clip_hi > 0):
        raise ValueError(
            f"clip ranges must be positive and clip_lo at most 1, got clip_lo={clip_lo}, clip_hi={clip_hi}"
        )
