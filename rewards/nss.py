"""Natural scene statistics: features of NIQE (Mittal, Soundararajan, Bovik 2013), vectorised, and their AGGD fit.

Pure functions. A luma image in [0, 255] becomes locally normalised coefficients (MSCN); on overlapping patches and two
scales the shape of their distribution and of the products of neighbours is fitted by an asymmetric generalised Gaussian
(AGGD): 36 features a patch. All sums are average pools, so a batch costs a few milliseconds an image.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.filters import gaussian_taps, luma_yiq, separable

FEATURES = 36  # 18 a scale: 2 of the coefficients, 4 for each of the four products of neighbours
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # right, down, both diagonals


def mscn(luma_N1HW: Tensor) -> Tensor:
    """Mean-subtracted contrast-normalised coefficients `[N, 1, H, W]`.

    7x7 Gaussian of sigma 7/6, C = 1 (eq. 1-3), luma in [0, 255].
    """
    taps = gaussian_taps(7 / 6, 3)
    mean = separable(luma_N1HW, taps, padded=True)
    # of the deviations from a fixed grey, to keep float32 exact enough where the picture is bright and flat
    centred = luma_N1HW - 128.0
    var = separable(centred**2, taps, padded=True) - (mean - 128.0) ** 2
    return (luma_N1HW - mean) / (var.clamp_min(0).sqrt() + 1.0)


@lru_cache(maxsize=1)
def aggd_table() -> tuple[Tensor, Tensor]:
    """(ratio, alpha): rho(alpha) = Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)) on alpha = 0.2, 0.201, ..., 10."""
    alpha = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64)
    ratio = torch.exp(2 * torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha))
    return ratio.float(), alpha.float()


def pooled_aggd(maps_NMHW: Tensor, patch_px: int, stride_px: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moment-matched AGGD (alpha, beta_left, beta_right) of M maps' patches, each `[N, M, h, w]` (Lasmar 2009)."""

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, patch_px, stride_px)

    eps = 1e-12
    square, left = maps_NMHW**2, (maps_NMHW < 0).to(maps_NMHW)
    right = (maps_NMHW > 0).to(maps_NMHW)
    sigma_l = (pool(square * left) / pool(left).clamp_min(eps)).clamp_min(eps).sqrt()
    sigma_r = (pool(square * right) / pool(right).clamp_min(eps)).clamp_min(eps).sqrt()
    gamma = sigma_l / sigma_r
    r_hat = pool(maps_NMHW.abs()) ** 2 / pool(square).clamp_min(eps)
    r_norm = r_hat * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    ratio, alphas = (t.to(maps_NMHW) for t in aggd_table())
    alpha = alphas[torch.searchsorted(ratio, r_norm.contiguous()).clamp_max(len(alphas) - 1)]
    unit = torch.exp(0.5 * (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)))
    return alpha, sigma_l * unit, sigma_r * unit


def scale_features(luma_N1HW: Tensor, patch_px: int, stride_px: int) -> Tensor:
    """The 18 features of one scale, `[N, P, 18]` for P patches in row-major order."""
    coef = mscn(luma_N1HW)
    h, w = coef.shape[-2:]
    padded = F.pad(coef, (1, 1, 1, 1), mode="replicate")
    products = [coef * padded[..., 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w] for dy, dx in SHIFTS]
    alpha, beta_l, beta_r = pooled_aggd(torch.cat([coef, *products], dim=1), patch_px, stride_px)
    mean = (beta_r - beta_l) * torch.exp(torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha))  # eq. 8
    features = [alpha[:, 0], (beta_l[:, 0] + beta_r[:, 0]) / 2]
    for k in range(1, 5):
        features += [alpha[:, k], mean[:, k], beta_l[:, k], beta_r[:, k]]
    return torch.stack(features, dim=-1).flatten(1, 2)


def patch_features(luma_N1HW: Tensor, patch_px: int, stride_px: int) -> Tensor:
    """NIQE's 36 features of every patch `[N, P, 36]`; luma in [0, 255]; `patch_px` and `stride_px` even.

    The second scale is the image at half size (2x2 means) on the same patches. Raises ValueError if the image is
    smaller than a patch.
    """
    h, w = luma_N1HW.shape[-2:]
    if min(h, w) < patch_px:
        raise ValueError(f"the image has {h}x{w} px, natural scene statistics need at least {patch_px}")
    half = F.avg_pool2d(luma_N1HW[..., : h - h % 2, : w - w % 2], 2)
    coarse = scale_features(half, patch_px // 2, stride_px // 2)
    fine = scale_features(luma_N1HW[..., : h - h % 2, : w - w % 2], patch_px, stride_px)
    return torch.cat([fine, coarse], dim=-1)


def pyramid_statistics(x_N3HW: Tensor, patch_px: int = 32, stride_px: int = 16) -> Tensor:
    """Mean and standard deviation over patches of the 18 features at full, half and quarter size: `[N, 108]`.

    RGB in [0, 1]. Raises ValueError below 64 px (less than nine patches).
    """
    luma = 255 * luma_yiq(x_N3HW)
    h, w = (side - side % 4 for side in luma.shape[-2:])
    if min(h, w) < 2 * patch_px:
        raise ValueError(f"the image has {tuple(x_N3HW.shape[-2:])} px, the statistics need at least {2 * patch_px}")
    luma = luma[..., :h, :w]
    scales = []
    for level in range(3):
        scales.append(scale_features(luma, patch_px >> level, stride_px >> level))
        luma = F.avg_pool2d(luma, 2)
    features = torch.cat(scales, dim=-1)
    return torch.cat([features.mean(1), features.std(1)], dim=-1)
