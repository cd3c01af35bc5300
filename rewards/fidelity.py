"""Fidelity penalties that need only the LQ: low-frequency drift and consistency after re-degradation. Lower is better.

Both are 0 for a copy of the LQ: they hold a restorer back, they do not judge it. Units: mean absolute difference of [0,
1] RGB. Colour may change for the types in `COLOUR_TYPES` (haze, low light, ...): there the LQ is first fitted to the
result by an affine map per channel, so that a change of tone is free and a repainted region is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.filters import atrous_low_pass, gaussian_blur

LICENCE = "own code"
COLOUR_TYPES = frozenset({"haze", "hdr", "lowlight", "oldphoto", "underwater"})
OCCLUSION_TYPES = frozenset({"flare", "rain", "raindrop", "reflection", "snow"})
GRID_TYPES = frozenset({"haze"})  # the veil varies over the picture, so its tone map may too
GRID_CELL_PX, GRID_MAX = 128, 4  # one node per 128 px: a finer grid could fit any low-pass image


def affine_fit(source_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """`a * source + b`, least squares per image and channel with a >= 0 (a negative is not a tone change).

    Same shape.
    """
    s, t = source_NCHW.flatten(2), target_NCHW.flatten(2)
    s_mean, t_mean = s.mean(2, keepdim=True), t.mean(2, keepdim=True)
    var = ((s - s_mean) ** 2).mean(2, keepdim=True)
    cov = ((s - s_mean) * (t - t_mean)).mean(2, keepdim=True)
    gain = (cov / (var + 1e-8)).clamp_min(0)
    return (t_mean + gain * (s - s_mean)).view_as(source_NCHW)


def grid_nodes(height_px: int, width_px: int) -> int:
    """Nodes per side of the tone map's grid; 1 is a global map."""
    return max(1, min(GRID_MAX, min(height_px, width_px) // GRID_CELL_PX))


def affine_grid_fit(source_CHW: Tensor, target_CHW: Tensor) -> Tensor:
    """As `affine_fit` for one image, with gain and offset interpolated bilinearly on a grid of `grid_nodes`.

    Ridge 1e-4. The fit is solved on every 8th pixel: both inputs are low-pass bands of sigma 13 px. [C, H, W] in, the
    same shape out.
    """
    _c, h, w = source_CHW.shape
    g = grid_nodes(h, w)
    if g == 1:
        return affine_fit(source_CHW[None], target_CHW[None])[0]
    hats = F.interpolate(torch.eye(g * g).view(1, g * g, g, g), (h, w), mode="bilinear", align_corners=True)[0]
    coarse, full = hats[:, ::8, ::8].reshape(g * g, -1).T, hats.reshape(g * g, -1).T  # [pixels, nodes]
    fitted = []
    for source, target in zip(source_CHW, target_CHW, strict=True):
        s, t = source[::8, ::8].reshape(-1, 1), target[::8, ::8].reshape(-1)
        design = torch.cat([coarse * s, coarse], dim=1).double()
        # the ridge pulls towards the identity (gain 1, offset 0), not towards black
        prior = torch.cat([torch.ones(g * g), torch.zeros(g * g)]).double()
        normal = design.T @ design / len(t) + 1e-4 * torch.eye(2 * g * g, dtype=torch.float64)
        coef = prior + torch.linalg.solve(normal, design.T @ (t.double() - design @ prior) / len(t))
        gain, offset = coef.float().split(g * g)
        fitted.append((source.reshape(-1) * (full @ gain) + full @ offset).view(h, w))
    return torch.stack(fitted)


def tone_matched(items: Sequence[Restoration], lq_N3HW: Tensor, x_N3HW: Tensor) -> Tensor:
    """The low-passed LQ, fitted to the low-passed result where the task's types license a change of colour.

    `[N, 3, H, W]`.
    """
    licensed = [i for i, item in enumerate(items) if COLOUR_TYPES & set(item.task.types)]
    if not licensed:
        return lq_N3HW
    matched = lq_N3HW.clone()
    for i in licensed:
        if GRID_TYPES & set(items[i].task.types):
            matched[i] = affine_grid_fit(lq_N3HW[i], x_N3HW[i])
        else:
            matched[i] = affine_fit(lq_N3HW[i : i + 1], x_N3HW[i : i + 1])[0]
    return matched


@dataclass(frozen=True)
class LowFrequencyParams:
    passes: int = 5  # à-trous passes; 5 is a Gaussian of sigma 13.06 px


class LowFrequency(ImageReward):
    """mean |B(x) - B(lq)| with B the à-trous low pass (SeeSR / StableSR wavelet colour fix, here as a penalty).

    A constant offset c costs exactly c; anything finer than about 10 px costs nothing. Catches colour and brightness
    drift.
    """

    params: LowFrequencyParams

    @classmethod
    def spec_for(cls, params: LowFrequencyParams) -> RewardSpec:
        if params.passes < 1:
            raise ValueError(
                f"low_frequency.passes is {params.passes}; give at least 1 (5 is the usual wavelet colour fix)"
            )
        return RewardSpec(
            name="low_frequency",
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
        low_x = atrous_low_pass(stack_images(items), self.params.passes)
        low_lq = atrous_low_pass(stack_lq(items), self.params.passes)
        return (low_x - tone_matched(items, low_lq, low_x)).abs().flatten(1).mean(1)


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
