"""`consistency`: does the result, degraded again, explain the LQ? Lower is better, 0 for a copy of the LQ.

It holds a restorer back, it does not judge it. Unit: mean absolute difference of [0, 1] RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.filters import gaussian_blur
from rewards.penalties.tone import COLOUR_TYPES, LICENCE, OCCLUSION_TYPES, tone_matched


def noise_std(x_NCHW: Tensor) -> Tensor:
    """Noise level `[N, C]` of images in [0, 1]: Immerkaer's (1996) Laplacian-difference mask, median instead of mean.

    The median over pixels (x 1.4826) ignores edges as long as they cover less than half of the picture. In a blurred or
    compressed photo it tends to 0.
    """
    n, c, h, w = x_NCHW.shape
    # unit gain for white noise
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).to(x_NCHW) / 6.0
    response = F.conv2d(x_NCHW.reshape(n * c, 1, h, w), mask[None, None])
    return 1.4826 * response.abs().flatten(1).median(1).values.view(n, c)


def unexplained_std(low_lq_NCHW: Tensor, sigma_px: float) -> Tensor:
    """How much a low-passed LQ varies from one correlation length (2 sigma) to the next: noise and some texture. `[N]`.

    Measured at this scale and not on the finest pixels, because real noise is resized and compressed: at the finest
    scale it looks small, and what is left of it after a blur is many times what white noise would leave.
    """
    step = max(1, round(2 * sigma_px))
    coarse = low_lq_NCHW[..., ::step, ::step]
    if min(coarse.shape[-2:]) < 3:
        raise ValueError(f"consistency at sigma {sigma_px:g} px needs images of more than {2 * step} px")
    return noise_std(coarse).mean(1)


@dataclass(frozen=True)
class ConsistencyParams:
    sigma_px: float = 4.0  # below this band there is evidence in a noisy LQ; 2 px pays three times more for noise
    # blurs that the camera may have added: the one that explains the LQ best is taken
    extra_sigmas_px: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0)
    tolerance: float = 1.0 / 255.0  # difference that costs nothing: quantisation
    noise_factor: float = 2.0  # and that many standard deviations of the LQ's own noise in this band
    occlusion_trim: float = 0.1  # share of the worst pixels that is dropped for OCCLUSION_TYPES


class Consistency(ImageReward):
    """Blind re-degradation: does the result, blurred as the camera may have blurred it, explain the LQ?

        d(x)  = min_m  mean_p  relu( mean_rgb |G_s B_m x - G_s lq| - tolerance - noise_factor * unexplained_std )

    Both sides are compared below the band of noise and compression (G_s, sigma 4 px). Two things keep it from paying
    for the LQ's faults: the minimum over extra blurs m (a sharp result of a blurred LQ is not further away than a
    blurred one), and the dead zone from the LQ's own noise (a result that keeps the noise gains little over one that
    removed it). For rain, snow and the like the worst pixels are dropped: drops and flakes have to go. A result that is
    blurrier than the LQ allows, shifted, recoloured, or that shows other content, pays.
    """

    params: ConsistencyParams

    @classmethod
    def spec_for(cls, params: ConsistencyParams) -> RewardSpec:
        if params.sigma_px <= 0 or not params.extra_sigmas_px or min(params.extra_sigmas_px) < 0:
            raise ValueError(f"consistency needs sigma_px > 0 and extra_sigmas_px >= 0, got {params}")
        if not 0 <= params.occlusion_trim < 1:
            raise ValueError(f"consistency.occlusion_trim is {params.occlusion_trim}; it is a share in [0, 1)")
        return RewardSpec(
            name="consistency",
            version="1",
            higher_is_better=False,
            range=(0.0, 1.0),
            needs=frozenset({"lq"}),
            block="fidelity",
            scale=0.005,
            differentiable=True,
            deterministic=True,
            licence=LICENCE,
            licensed_types=COLOUR_TYPES,
        )

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        p = self.params
        step = max(1, int(p.sigma_px))  # G_s leaves nothing above the Nyquist frequency of every s-th pixel
        full_lq = gaussian_blur(stack_lq(items), p.sigma_px)
        dead_zone_N = p.tolerance + p.noise_factor * unexplained_std(full_lq, p.sigma_px)
        low_lq = full_lq[..., ::step, ::step]
        low_x = gaussian_blur(stack_images(items), p.sigma_px)[..., ::step, ::step]
        occluded_N = torch.tensor([bool(OCCLUSION_TYPES & set(item.task.types)) for item in items])
        cost_MN = []
        for extra_px in p.extra_sigmas_px:
            explained = gaussian_blur(low_x, extra_px / step)
            difference = (explained - tone_matched(items, low_lq, explained)).abs().mean(1)
            excess_NP = (difference - dead_zone_N.view(-1, 1, 1)).clamp_min(0).flatten(1)
            cost_MN.append(torch.where(occluded_N, trimmed_mean(excess_NP, p.occlusion_trim), excess_NP.mean(1)))
        return torch.stack(cost_MN).min(0).values


def trimmed_mean(x_NP: Tensor, trim: float) -> Tensor:
    """Mean `[N]` over P values >= 0 without the largest `trim` share."""
    dropped = int(x_NP.shape[1] * trim)
    if dropped == 0:
        return x_NP.mean(1)
    kept_sum = x_NP.sum(1) - x_NP.topk(dropped, dim=1).values.sum(1)
    return kept_sum.clamp_min(0) / (x_NP.shape[1] - dropped)  # x >= 0: below 0 is rounding
