"""Low light and old photographs: pure functions of (image, generator, severity) that return the image and what they drew.

Low light works on linear light: `y = Poisson(k e J) / k + N(0, s)` with exposure e, k electrons a unit and read noise s
(noise model of Brooks et al. 2019, arXiv 1811.11127). Old photographs have unstructured damage (fading, grain, blur) and
structured damage (scratches, stains), as Wan et al. 2020, arXiv 2004.09484, tell them apart.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from envs.degradations.kernels import blur, gaussian_kernel
from envs.degradations.noise import gaussian_noise
from envs.degradations.scenery import LUMA, fractal_noise

GAMMA = 2.2
Effect = tuple[Tensor, dict[str, float]]


def low_light(image: Tensor, rng: np.random.Generator, severity: float) -> Effect:
    """e ~ U(.03, .3), k ~ U(30, 800), s ~ U(.002, .02), white balance U(.9, 1.15) a channel; severity moves e from 1."""
    exposure = 1.0 + severity * (rng.uniform(0.03, 0.3) - 1.0)
    electrons, read = rng.uniform(30.0, 800.0), severity * rng.uniform(0.002, 0.02)
    balance = 1.0 + severity * (rng.uniform(0.9, 1.15, 3) - 1.0)
    record = {"lowlight_exposure": exposure, "lowlight_electrons": electrons, "lowlight_read_noise": read}
    linear = (image**GAMMA * exposure).numpy()
    if severity > 0:
        linear = rng.poisson(linear * electrons).astype(np.float32) / np.float32(electrons)
        linear = linear + np.float32(read) * rng.standard_normal(linear.shape, dtype=np.float32)
    cast = torch.from_numpy(linear * balance[:, None, None].astype(np.float32))
    record |= {f"lowlight_gain_{name}": float(gain) for name, gain in zip("rgb", balance, strict=True)}
    return cast.clamp(0, 1) ** (1 / GAMMA), record


def old_photo(image: Tensor, rng: np.random.Generator, severity: float) -> Effect:
    """Blur sigma U(.5, 2.5), grey or sepia half of the time, fading to yellow, grain, then scratches and stains."""
    sigma = severity * rng.uniform(0.5, 2.5)
    faded = blur(image, gaussian_kernel(15, sigma, sigma)).clamp(0, 1) if sigma > 0.1 else image
    tone = int(rng.integers(4))  # 0, 1: colour; 2: grey; 3: sepia
    if tone >= 2:
        grey = (faded * LUMA).sum(0, keepdim=True)
        tint = torch.tensor([1.07, 0.95, 0.75])[:, None, None] if tone == 3 else torch.ones(3, 1, 1)
        faded = faded + severity * ((grey * tint).clamp(0, 1) - faded)
    contrast, lift = 1.0 - severity * rng.uniform(0.1, 0.4), severity * rng.uniform(0.05, 0.2)
    yellow = torch.tensor([1.0, 0.9, 0.6])[:, None, None]
    faded = faded * contrast + lift * yellow
    grain = severity * rng.uniform(4.0, 20.0)
    faded = gaussian_noise(faded, grain, True, rng)
    record = {
        "old_sigma_px": sigma,
        "old_tone": float(tone),
        "old_contrast": contrast,
        "old_lift": lift,
        "old_grain_255": grain,
    }
    damaged, structure = _damage(faded, rng, severity)
    return damaged, {**record, **structure}


def _damage(image: Tensor, rng: np.random.Generator, severity: float) -> Effect:
    """Thin bright or dark polylines, and stains that follow fractal noise."""
    height, width = image.shape[-2:]
    side = min(height, width)
    count = round(severity * rng.integers(2, 13))
    canvas = Image.new("L", (2 * width, 2 * height), 128)
    draw = ImageDraw.Draw(canvas)
    for _ in range(count):
        points = np.cumsum(rng.normal(0, side / 8, (5, 2)), axis=0) + rng.uniform(0, 1, 2) * (width, height)
        shade = 255 if rng.random() < 0.7 else 0
        draw.line(
            [tuple(2 * point) for point in points], fill=shade, width=int(rng.integers(1, max(2, side // 96) + 2))
        )
    mask = torch.from_numpy(np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32))
    strength = ((mask - 128.0).abs() / 128.0).clamp(0, 1)
    scratched = image + strength * ((mask > 128).float() - image) * 0.9
    amount = severity * rng.uniform(0.0, 0.35)
    stain = ((fractal_noise(height, width, rng) - 0.65) / 0.35).clamp(0, 1) * amount
    brown = torch.tensor([0.45, 0.33, 0.18])[:, None, None]
    stained = scratched * (1 - stain) + brown * stain
    return stained.clamp(0, 1), {"old_scratches": float(count), "old_stain": amount}
