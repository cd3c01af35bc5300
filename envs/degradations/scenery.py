"""What weather needs to know of a photo: a depth that it does not have, smooth noise, and layers of streaks or flakes."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.ndimage import uniform_filter
from torch import Tensor

from envs.degradations.kernels import blur, gaussian_kernel

LUMA = torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]


def pseudo_depth(image: Tensor, rng: np.random.Generator) -> Tensor:
    """[H, W] in [0, 1], 0 near: `clip(0.15 + 0.85 y^g + noise)` with y = 0 at the bottom, g ~ U(0.7, 2), smoothed along
    the photo's luminance by a guided filter (He et al. 2010). No depth network: a guess that suits most outdoor photos.
    """
    height, width = image.shape[-2:]
    y = torch.linspace(1.0, 0.0, height)[:, None].expand(height, width)
    noise = fractal_noise(height, width, rng) - 0.5
    depth = (0.15 + 0.85 * y ** rng.uniform(0.7, 2.0) + 0.3 * noise).clamp(0, 1)
    return _guided(depth, (image * LUMA).sum(0), radius=max(2, min(height, width) // 16), epsilon=1e-2).clamp(0, 1)


def fractal_noise(height: int, width: int, rng: np.random.Generator, octaves: int = 4) -> Tensor:
    """[height, width] in [0, 1]: octaves of bicubic noise, each with half of the amplitude of the one before."""
    total = torch.zeros(height, width)
    for octave in range(octaves):
        cells = 2 ** (octave + 1) + 1
        coarse = torch.from_numpy(rng.random((1, 1, cells, cells), dtype=np.float32))
        total += F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0, 0] / 2**octave
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def streaks(
    height: int, width: int, rng: np.random.Generator, count: int, angle_rad: float, depth: np.ndarray, length: tuple[float, float]
) -> Tensor:  # fmt: skip
    """[H, W] in [0, 1]: `count` antialiased lines of one angle, `length[0] + length[1] depth` px long, grey U(.7, .95)."""
    zoom = 2  # drawn twice as large and reduced: Pillow's lines have no antialiasing
    canvas = Image.new("L", (zoom * width, zoom * height))
    draw = ImageDraw.Draw(canvas)
    x, y = rng.uniform(0, width, count), rng.uniform(0, height, count)
    grey, thick = rng.uniform(0.7, 0.95, count), rng.random(count) < 0.25
    reach = length[0] + length[1] * depth[y.astype(int), x.astype(int)]
    dx, dy = math.cos(angle_rad) * reach, math.sin(angle_rad) * reach
    for n in range(count):
        line = (zoom * x[n], zoom * y[n], zoom * (x[n] + dx[n]), zoom * (y[n] + dy[n]))
        draw.line(line, fill=round(255 * grey[n]), width=2 * zoom if thick[n] else zoom)
    reduced = canvas.resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(reduced, dtype=np.float32) / 255.0)


def flakes(height: int, width: int, rng: np.random.Generator, count: int, radius_px: tuple[float, float]) -> Tensor:
    """[H, W] in [0, 1]: `count` soft discs."""
    zoom = 2
    canvas = Image.new("L", (zoom * width, zoom * height))
    draw = ImageDraw.Draw(canvas)
    x, y = rng.uniform(0, width, count), rng.uniform(0, height, count)
    radius, opacity = rng.uniform(*radius_px, count), rng.uniform(0.5, 1.0, count)
    for n in range(count):
        box = [
            zoom * (x[n] - radius[n]),
            zoom * (y[n] - radius[n]),
            zoom * (x[n] + radius[n]),
            zoom * (y[n] + radius[n]),
        ]
        draw.ellipse(box, fill=round(255 * opacity[n]))
    reduced = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255.0
    soft = gaussian_kernel(7, 0.25 * radius_px[1] + 0.3, 0.25 * radius_px[1] + 0.3)
    return blur(torch.from_numpy(reduced)[None], soft)[0].clamp(0, 1)


def line_kernel(length_px: float, angle_rad: float) -> Tensor:
    """[k, k], sum 1: motion along a straight line."""
    size = 2 * math.ceil(length_px / 2) + 1
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    along = u * math.cos(angle_rad) + v * math.sin(angle_rad)
    across = v * math.cos(angle_rad) - u * math.sin(angle_rad)
    kernel = (1.0 - across.abs()).clamp_min(0) * (along.abs() <= max(length_px / 2, 0.5))
    return kernel / kernel.sum()


def _guided(depth: Tensor, guide: Tensor, radius: int, epsilon: float) -> Tensor:
    def mean(values: Tensor) -> Tensor:
        return torch.from_numpy(uniform_filter(values.numpy(), 2 * radius + 1, mode="nearest"))

    mean_guide, mean_depth = mean(guide), mean(depth)
    slope = (mean(guide * depth) - mean_guide * mean_depth) / (mean(guide * guide) - mean_guide**2 + epsilon)
    return mean(slope) * guide + mean(mean_depth - slope * mean_guide)
