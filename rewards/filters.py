"""Image filters that the native rewards share.

Pure functions on `[N, C, H, W]` tensors, no state, same dtype out as in.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=64)
def gaussian_taps(sigma_px: float, radius_px: int) -> Tensor:
    """Normalised Gaussian `[2 * radius + 1]`, float32."""
    x = torch.arange(-radius_px, radius_px + 1, dtype=torch.float64)
    taps = torch.exp(-(x**2) / (2 * sigma_px**2))
    return (taps / taps.sum()).float()


def separable(x_NCHW: Tensor, taps: Tensor, padded: bool) -> Tensor:
    """The same symmetric odd kernel along rows and columns.

    `padded` keeps the size (replicate), else only full windows are kept ("valid").

    Sums of shifted slices: on one CPU thread several times faster than a one-channel or grouped convolution.
    """
    r = taps.numel() // 2
    if padded:
        x_NCHW = F.pad(x_NCHW, (r, r, r, r), mode="replicate")
    h, w = x_NCHW.shape[-2] - 2 * r, x_NCHW.shape[-1] - 2 * r
    weights = taps[r:].tolist()  # the centre, then outwards
    x = x_NCHW[..., r : r + w] * weights[0]
    for k, weight in enumerate(weights[1:], start=1):
        x = x.add(x_NCHW[..., r - k : r - k + w], alpha=weight).add_(x_NCHW[..., r + k : r + k + w], alpha=weight)
    y = x[..., r : r + h, :] * weights[0]
    for k, weight in enumerate(weights[1:], start=1):
        y = y.add(x[..., r - k : r - k + h, :], alpha=weight).add_(x[..., r + k : r + k + h, :], alpha=weight)
    return y


def gaussian_blur(x_NCHW: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur, replicate padding, kernel cut at 3 sigma; sigma 0 returns the input."""
    if sigma_px <= 0:
        return x_NCHW
    return separable(x_NCHW, gaussian_taps(float(sigma_px), math.ceil(3 * sigma_px)), padded=True)


def binomial_pass(x_NCHW: Tensor, dilation_px: int) -> Tensor:
    """One à-trous pass: [1 2 1]/4 along rows and columns with holes of `dilation_px`, replicate padding."""
    d, (h, w) = dilation_px, x_NCHW.shape[-2:]
    x = F.pad(x_NCHW, (d, d, d, d), mode="replicate")
    x = 0.5 * x[..., d : d + w] + 0.25 * (x[..., :w] + x[..., 2 * d :])
    return 0.5 * x[..., d : d + h, :] + 0.25 * (x[..., :h, :] + x[..., 2 * d :, :])


def atrous_low_pass(x_NCHW: Tensor, passes: int = 5) -> Tensor:
    """Low-pass band of the à-trous wavelet: `passes` binomial passes with dilation 1, 2, 4, ...

    Five passes have the variance sum(d^2)/2 = 170.5 px^2 an axis, a Gaussian of sigma 13.06 px (StableSR / SeeSR
    wavelet colour fix).
    """
    for level in range(passes):
        x_NCHW = binomial_pass(x_NCHW, 2**level)
    return x_NCHW


def luma_ycbcr(x_N3HW: Tensor) -> Tensor:
    """Y of studio-swing YCbCr (ITU-R BT.601, as MATLAB's rgb2ycbcr) `[N, 1, H, W]` in [16/255, 235/255].

    Not rounded.
    """
    r, g, b = x_N3HW.unbind(1)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16.0) / 255.0).unsqueeze(1)


def luma_yiq(x_N3HW: Tensor) -> Tensor:
    """Y of YIQ (full swing) `[N, 1, H, W]` in [0, 1]; not rounded."""
    r, g, b = x_N3HW.unbind(1)
    return (0.299 * r + 0.587 * g + 0.114 * b).unsqueeze(1)
