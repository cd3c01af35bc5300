"""Gaussian and Poisson noise of Real-ESRGAN on [3, H, W] images in [0, 1]; results are clamped to [0, 1].

`gray=True` adds one plane to all three channels (luminance noise). All numbers come from the given numpy generator.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_EXACT_BELOW = 32.0  # mean count
_LUMA = torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]  # as torchvision's rgb_to_grayscale, which BasicSR uses


def gaussian_noise(image: Tensor, sigma_255: float, gray: bool, rng: np.random.Generator) -> Tensor:
    """Add N(0, (sigma_255 / 255)^2) to each pixel."""
    shape = (1 if gray else image.shape[0], *image.shape[1:])
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return (image + noise * (sigma_255 / 255.0)).clamp_(0, 1)


def poisson_noise(image: Tensor, scale: float, gray: bool, rng: np.random.Generator) -> Tensor:
    """Add scale * (Poisson(I v) / v - I), v = 2^ceil(log2(number of distinct 8-bit values in I)) (BasicSR).

    I is the image (its luminance if `gray`) rounded to 8 bits; the standard deviation is scale * sqrt(I / v).
    """
    source = (image * _LUMA).sum(0, keepdim=True) if gray else image
    levels = (source.clamp(0, 1) * 255.0).round_().to(torch.uint8).numpy()
    distinct = int(np.count_nonzero(np.bincount(levels.ravel(), minlength=256)))
    peak = float(2 ** int(np.ceil(np.log2(distinct))))
    clean = levels.astype(np.float32) / 255.0
    noise = _poisson(clean * peak, rng) / peak - clean
    return (image + torch.from_numpy(noise) * scale).clamp_(0, 1)


def _poisson(mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Poisson counts (float32) of these means, exact below 32, above it by the Cornish-Fisher expansion of the
    quantile.

    round(mean + sqrt(mean) z + (z^2 - 1) / 6), z normal: mean and skewness are kept and the distribution function is
    off by less than 0.001; it takes a third of the time of numpy's exact sampler, the slowest part of a degradation.
    """
    z = rng.standard_normal(mean.shape, dtype=np.float32)
    counts = np.rint(mean + np.sqrt(mean) * z + (z * z - 1) / 6)
    few = mean < _EXACT_BELOW
    counts[few] = rng.poisson(mean[few])
    return counts
