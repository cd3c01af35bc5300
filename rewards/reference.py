"""Full-reference metrics, native: PSNR, SSIM and GMSD. They need a reference (gt); mostly they are gold metrics.

The colour space is part of the name, because it moves PSNR by 1.32 dB: `_rgb` is the mean over the three channels, `_y`
is the Y of studio-swing YCbCr (BT.601), as in the field's tables. pyiqa's own default for Y is full-swing YIQ, which is
not that. Y is not rounded to 8 bits (BasicSR's convention; MATLAB and pyiqa round: the difference is below 0.02 dB
under 45 dB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_gt, stack_images
from rewards.filters import gaussian_taps, luma_ycbcr, luma_yiq, separable

LICENCE = "own code"
MSE_FLOOR = 1e-8  # of [0, 1] units: identical images score 80 dB, as in pyiqa, not infinity


def psnr_db(x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
    """PSNR in dB `[N]` for a peak of 1: -10 log10(mean squared error), at most 80."""
    mse_N = ((x_NCHW - y_NCHW) ** 2).flatten(1).mean(1)
    return -10.0 * torch.log10(mse_N.clamp_min(MSE_FLOOR))


def ssim_mean(x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
    """Mean SSIM `[N]` over channels and full windows (Wang et al. 2004, eq. 13).

    11x11 Gaussian of sigma 1.5, K1 .01, K2 .03, peak 1. Equals scikit-image with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False`. Negative structure terms are kept (pyiqa sets them to 0). Raises ValueError below 11
    px.
    """
    if min(x_NCHW.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 px, got {tuple(x_NCHW.shape[-2:])}")
    c1, c2, channels = 0.01**2, 0.03**2, x_NCHW.shape[1]
    maps = torch.cat([x_NCHW, y_NCHW, x_NCHW**2, y_NCHW**2, x_NCHW * y_NCHW], dim=1)
    mu_x, mu_y, xx, yy, xy = separable(maps, gaussian_taps(1.5, 5), padded=False).split(channels, dim=1)
    var_x, var_y, cov = xx - mu_x**2, yy - mu_y**2, xy - mu_x * mu_y
    ssim = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return ssim.flatten(1).mean(1)


def gradient_magnitude(y_N1HW: Tensor) -> Tensor:
    """Prewitt gradient magnitude `[N, 1, H, W]`, zero padding, kernel sums of 1 (Xue et al. 2014, eq. 1-3)."""
    dx = torch.tensor([[1.0, 0.0, -1.0]] * 3).to(y_N1HW) / 3
    g_N2HW = F.conv2d(y_N1HW, torch.stack([dx, dx.T])[:, None], padding=1)
    return (g_N2HW**2).sum(1, keepdim=True).add(1e-12).sqrt()


def gmsd_std(x_N3HW: Tensor, y_N3HW: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation `[N]`, 0 = identical (Xue et al. 2014).

    Y of YIQ in [0, 255], 2x2 means, T = 170. The deviation is the sample standard deviation (n - 1), as in MATLAB and
    pyiqa.
    """
    t = 170.0
    g_x, g_y = (gradient_magnitude(F.avg_pool2d(255 * luma_yiq(z), 2)) for z in (x_N3HW, y_N3HW))
    similarity = (2 * g_x * g_y + t) / (g_x**2 + g_y**2 + t)
    return similarity.flatten(1).std(1)


@dataclass(frozen=True)
class ReferenceParams:
    """No parameters: the constants are the published ones, and a variant would be another metric."""


class ReferenceReward(ImageReward):
    """A metric of (image, gt); the subclasses below only say which."""

    name: str
    higher_is_better: bool
    bounds: tuple[float | None, float | None]
    scale: float
    distance: Callable[[Tensor, Tensor], Tensor]
    colour: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def spec_for(cls, params: ReferenceParams) -> RewardSpec:
        return RewardSpec(
            name=cls.name,
            version="1",
            higher_is_better=cls.higher_is_better,
            range=cls.bounds,
            needs=frozenset({"gt"}),
            block="fidelity",
            scale=cls.scale,
            differentiable=True,
            deterministic=True,
            licence=LICENCE,
        )

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        x, y = stack_images(items), stack_gt(items)
        cls = type(self)
        if cls.colour is not None:
            x, y = cls.colour(x), cls.colour(y)
        return cls.distance(x, y)


class PsnrRgb(ReferenceReward):
    name, higher_is_better, bounds, scale = "psnr_rgb", True, (0.0, 80.0), 2.0
    distance = staticmethod(psnr_db)


class PsnrY(ReferenceReward):
    # Y spans 219/255 of the range, so the worst value is 20 log10(255/219) = 1.32 dB
    name, higher_is_better, bounds, scale = "psnr_y", True, (20 * math.log10(255 / 219), 80.0), 2.0
    distance = staticmethod(psnr_db)
    colour = staticmethod(luma_ycbcr)


class SsimRgb(ReferenceReward):
    name, higher_is_better, bounds, scale = "ssim_rgb", True, (-1.0, 1.0), 0.08
    distance = staticmethod(ssim_mean)


class SsimY(ReferenceReward):
    name, higher_is_better, bounds, scale = "ssim_y", True, (-1.0, 1.0), 0.08
    distance = staticmethod(ssim_mean)
    colour = staticmethod(luma_ycbcr)


class Gmsd(ReferenceReward):
    name, higher_is_better, bounds, scale = "gmsd", False, (0.0, 1.0), 0.03
    distance = staticmethod(gmsd_std)
