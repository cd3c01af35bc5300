"""`composite`: one number for how good a restoration is, given the reference. What the embedded judge is trained to guess.

    PSNR / 2 dB + SSIM / 0.08 + gradient similarity / 0.04 - texture error / 0.4

Gradient similarity is the mean (not the deviation) of GMSD's map (Xue et al. 2014) over three scales. Texture error is
the mean over 8 px cells and two bands of |log energy(x) - log energy(gt)|: left-over noise has too much of it, an
over-smoothed picture too little, and the first three terms alone would prefer the latter. On the embedded restorer's
outputs the sum peaks between its samples and its mean (docs/rewards.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_gt, stack_images
from rewards.filters import gaussian_blur, luma_yiq
from rewards.reference import LICENCE, ReferenceParams, gradient_magnitude, psnr_db, ssim_mean

PSNR_UNIT_DB, SSIM_UNIT, GRADIENT_UNIT, TEXTURE_UNIT = 2.0, 0.08, 0.04, 0.4
ENERGY_FLOOR = 1e-5  # of [0, 1] squared: 0.8 grey levels, below which nobody sees a texture
CELL_PX = 8


def gradient_similarity(x_N3HW: Tensor, y_N3HW: Tensor) -> Tensor:
    """Mean gradient magnitude similarity `[N]` in (0, 1] over full, half and quarter size; T = 170 on [0, 255] luma."""
    a, b, t = 255 * luma_yiq(x_N3HW), 255 * luma_yiq(y_N3HW), 170.0
    total = torch.zeros(len(a))
    for _ in range(3):
        g_a, g_b = gradient_magnitude(a), gradient_magnitude(b)
        total += ((2 * g_a * g_b + t) / (g_a**2 + g_b**2 + t)).flatten(1).mean(1) / 3
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total


def texture_error(x_N3HW: Tensor, y_N3HW: Tensor) -> Tensor:
    """`[N]` >= 0: mean |log ratio| of local band energies (luma, bands above sigma 0.7 and 1.4 px, 8 px cells)."""
    a, b = luma_yiq(x_N3HW), luma_yiq(y_N3HW)
    total = torch.zeros(len(a))
    for sigma_px in (0.7, 1.4):
        low_a, low_b = gaussian_blur(a, sigma_px), gaussian_blur(b, sigma_px)
        energy_a, energy_b = (F.avg_pool2d(band.square(), CELL_PX) for band in (a - low_a, b - low_b))
        ratio = (energy_a + ENERGY_FLOOR).log() - (energy_b + ENERGY_FLOOR).log()
        total += ratio.abs().flatten(1).mean(1) / 2
        a, b = low_a, low_b
    return total


def composite(x_N3HW: Tensor, y_N3HW: Tensor) -> Tensor:
    """`[N]`, higher is better; see the module docstring. Raises ValueError below 11 px (SSIM)."""
    return (
        psnr_db(x_N3HW, y_N3HW) / PSNR_UNIT_DB
        + ssim_mean(x_N3HW, y_N3HW) / SSIM_UNIT
        + gradient_similarity(x_N3HW, y_N3HW) / GRADIENT_UNIT
        - texture_error(x_N3HW, y_N3HW) / TEXTURE_UNIT
    )


class Composite(ImageReward):
    """The composite as a (gold) metric."""

    @classmethod
    def spec_for(cls, params: ReferenceParams) -> RewardSpec:
        return RewardSpec(
            name="composite",
            version="1",
            higher_is_better=True,
            range=(None, None),
            needs=frozenset({"gt"}),
            block="fidelity",
            scale=1.0,
            differentiable=True,
            deterministic=True,
            licence=LICENCE,
        )

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        return composite(stack_images(items), stack_gt(items))
