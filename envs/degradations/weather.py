"""Haze, rain and snow: pure functions of (image, generator, severity) that return the image and what they drew.

Haze is the atmospheric scattering model `I = J t + A (1 - t)`, `t = exp(-b d^g)` (Koschmieder; ranges as RealRestorer's
degradation_pipeline). Rain is `I = t (J + S) + (1 - t) A` with streaks S; snow is `I = J (1 - z) + c z` and a veil
(layers as in DesnowNet). Severity 0 is the identity of each range's mild end, 1 all of the range.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from envs.degradations.kernels import blur, gaussian_kernel
from envs.degradations.scenery import flakes, line_kernel, pseudo_depth, streaks

Effect = tuple[Tensor, dict[str, float]]


def scatter(image: Tensor, transmission: Tensor, airlight: Tensor) -> Tensor:
    """`J t + A (1 - t)`; image [3, H, W], transmission [H, W], airlight [3]. t = 1 is the identity."""
    return image * transmission + airlight[:, None, None] * (1.0 - transmission)


def haze(image: Tensor, rng: np.random.Generator, severity: float) -> Effect:
    """b ~ U(.6, 1.8) and g ~ U(1, 2); A grows with b from .78 to .95, slightly blue; t is blurred by 1 px."""
    b = severity * rng.uniform(0.6, 1.8)
    record = {"haze_b": b, "haze_g": rng.uniform(1.0, 2.0)}
    return _veil(image, rng, b, record["haze_g"], record, "haze")


def rain(image: Tensor, rng: np.random.Generator, severity: float) -> Effect:
    """8,000 to 15,000 streaks a megapixel within 15 degrees of vertical; longer far away; a veil with b ~ U(.2, .8)."""
    height, width = image.shape[-2:]
    depth = pseudo_depth(image, rng)
    count = round(severity * rng.uniform(8_000, 15_000) * height * width / 2**20)
    angle, blurred = rng.uniform(math.radians(75), math.radians(105)), rng.uniform(0.0, 5.0)
    reach = (5.0, 45.0 * min(1.0, min(height, width) / 1024))
    layer = streaks(height, width, rng, count, angle, depth.numpy(), reach)
    if rng.random() < 0.4:  # three faint copies
        shifts = [tuple(int(s) for s in rng.integers(-8, 9, 2)) for _ in range(3)]
        layer = (layer + sum(0.2 * torch.roll(layer, shift, (0, 1)) for shift in shifts)).clamp(0, 1)
    layer = blur(layer[None], line_kernel(blurred, angle))[0].clamp(0, 1)
    record = {"rain_streaks": float(count), "rain_angle_rad": angle, "rain_motion_px": blurred}
    wet = (image + layer * rng.uniform(0.4, 0.9)).clamp(0, 1)
    b = severity * rng.uniform(0.2, 0.8)
    return _veil(wet, rng, b, 1.0, {**record, "rain_veil_b": b}, "rain", depth)


def snow(image: Tensor, rng: np.random.Generator, severity: float) -> Effect:
    """Flakes of three sizes, the larger the fewer, moved along one angle; near white; a veil with b ~ U(.1, .4)."""
    height, width = image.shape[-2:]
    angle, motion = rng.uniform(math.radians(60), math.radians(120)), rng.uniform(0.0, 25.0) * min(1.0, height / 1024)
    mask, total = torch.zeros(height, width), 0
    for radius, density in (((0.5, 1.5), 3_000), ((1.5, 4.0), 600), ((4.0, 12.0), 60)):
        count = round(severity * density * rng.uniform(0.5, 1.5) * height * width / 2**20)
        total += count
        mask = torch.maximum(mask, flakes(height, width, rng, count, radius))
    mask = blur(mask[None], line_kernel(motion, angle))[0].clamp(0, 1)
    white = torch.from_numpy(rng.uniform(0.92, 1.0, 3).astype(np.float32))
    b = severity * rng.uniform(0.1, 0.4)
    record = {"snow_flakes": float(total), "snow_angle_rad": angle, "snow_motion_px": motion, "snow_veil_b": b}
    return _veil(scatter(image, 1.0 - mask, white), rng, b, 1.0, record, "snow")


def _veil(
    image: Tensor, rng: np.random.Generator, b: float, g: float, record: dict[str, float], name: str, depth: Tensor | None = None
) -> Effect:  # fmt: skip
    """The scattering model with airlight growing with b: .78 at b = .3, .95 at b = 3, N(0, .01) a channel, a blue bias."""
    depth = pseudo_depth(image, rng) if depth is None else depth
    level = 0.78 + (0.95 - 0.78) * (b - 0.3) / (3.0 - 0.3)
    tint = rng.normal(0.0, 0.01, 3) + np.array([0.0, 0.0, rng.uniform(0.0, 0.005)])
    airlight = torch.from_numpy(np.clip(level + tint, 0.7, 1.0).astype(np.float32))
    transmission = torch.exp(-b * depth**g)
    transmission = blur(transmission[None], gaussian_kernel(7, 1.0, 1.0))[0].clamp(0.05, 1.0)
    more = {f"{name}_airlight": float(airlight.mean()), f"{name}_transmission": float(transmission.mean())}
    return scatter(image, transmission, airlight).clamp(0, 1), {**record, **more}
