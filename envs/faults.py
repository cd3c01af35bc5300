"""Planted hallucinations: content for which the LQ gives no evidence, put into a restoration on purpose.

Pure functions of (image, other photo, generator), for arenas on which judges are trained and measured. Images are
`[3, H, W]` float32 in [0, 1]; results are on the 8-bit grid. A fault is local (an ellipse with a soft edge of about a
tenth to a third of the side) except `colour`, which is global half of the time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LETTERS = "ABCDEFGHKLMNPRSTUVXYZabdefghknrst2345678"


def plant(image: Tensor, other: Tensor, rng: np.random.Generator, kind: str) -> Tensor:
    """`image` with one fault of this kind (a key of FAULTS). `other` is a picture of another scene, at least as large."""
    return ((FAULTS[kind](image, other, rng)).clamp(0, 1) * 255).round() / 255


def soft_ellipse(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """`[1, H, W]` in [0, 1]: an ellipse somewhere inside, axes 0.1 to 0.3 of the sides, edge soft over some pixels."""
    ry, rx = rng.uniform(0.1, 0.3) * height, rng.uniform(0.1, 0.3) * width
    cy, cx = rng.uniform(ry, height - ry), rng.uniform(rx, width - rx)
    y, x = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    radius = (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2).sqrt()
    return ((1.15 - radius) / 0.3).clamp(0, 1)[None]


def _text(image: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """A word of 2 to 6 letters, 12 to 28 % of the height tall, in a colour far from its ground."""
    _, height, width = image.shape
    word = "".join(rng.choice(list(LETTERS), size=int(rng.integers(2, 7))))
    size = max(8, round(rng.uniform(0.12, 0.28) * height))
    canvas = Image.new("L", (width, height), 0)
    spot = (float(rng.uniform(0, 0.5)) * width, float(rng.uniform(0, 1)) * (height - size))
    ImageDraw.Draw(canvas).text(spot, word, fill=255, font=ImageFont.load_default(size))
    mask = torch.from_numpy(np.array(canvas, dtype=np.float32) / 255)[None] * rng.uniform(0.6, 1.0)
    ground = (image * mask).sum((1, 2)) / mask.sum().clamp_min(1e-3)
    colour = torch.from_numpy(rng.uniform(0, 0.35, 3).astype(np.float32))
    colour = torch.where(ground.mean() > 0.5, colour, 1 - colour)
    return image * (1 - mask) + colour.view(3, 1, 1) * mask


def _patch(image: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """A piece of another photo."""
    return _pasted(image, other, rng)


def _clone(image: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """A piece of the same picture, mirrored, at a wrong place."""
    _, height, width = image.shape
    shift = (int(rng.integers(height // 4, 3 * height // 4)), int(rng.integers(width // 4, 3 * width // 4)))
    return _pasted(image, image.flip(2).roll(shift, dims=(1, 2)), rng)


def _pasted(image: Tensor, source: Tensor, rng: np.random.Generator) -> Tensor:
    """`source` through an ellipse, half of the time with its mean colour moved to that of what it covers."""
    mask = soft_ellipse(image.shape[1], image.shape[2], rng)
    source = source[:, : image.shape[1], : image.shape[2]]
    if rng.random() < 0.5:
        area = mask.sum()
        source = source + (((image - source) * mask).sum((1, 2)) / area).view(3, 1, 1)
    return image * (1 - mask) + source.clamp(0, 1) * mask


def _erase(image: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """Something vanishes: an ellipse filled with a heavy blur of its surroundings."""
    mask = soft_ellipse(image.shape[1], image.shape[2], rng)
    around, weight = image * (1 - mask), 1 - mask
    for _ in range(6):
        around, weight = (F.avg_pool2d(z[None], 9, 1, 4, count_include_pad=False)[0] for z in (around, weight))
    return image * (1 - mask) + around / weight.clamp_min(1e-3) * mask


def _texture(image: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """Invented fine structure: oriented stripes or band-passed noise, 8 to 20 % contrast."""
    _, height, width = image.shape
    mask, contrast = soft_ellipse(height, width, rng), rng.uniform(0.08, 0.2)
    if rng.random() < 0.5:
        angle, period = rng.uniform(0, np.pi), rng.uniform(3, 8)
        y, x = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
        wave = torch.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)[None].float()
        return image + contrast * mask * wave
    noise = torch.from_numpy(rng.standard_normal((1, 1, height, width)).astype(np.float32))
    fine = F.avg_pool2d(noise, 3, 1, 1)
    band = (fine - F.avg_pool2d(noise, 7, 1, 3))[0]
    return image + contrast * mask * band / band.std()


def _colour(image: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """A cast of 4 to 12 % that no task licenses, over an ellipse or the whole picture."""
    direction = rng.standard_normal(3)
    scaled = (direction / np.abs(direction).max() * rng.uniform(0.04, 0.12)).astype(np.float32)
    cast = torch.from_numpy(scaled).view(3, 1, 1)
    mask = soft_ellipse(image.shape[1], image.shape[2], rng) if rng.random() < 0.5 else 1.0
    return image + cast * mask


def _warp(image: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """A place is reshaped: pixels inside an ellipse move by 3 to 8 % of the side."""
    _, height, width = image.shape
    mask = soft_ellipse(height, width, rng)[0]
    angle, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.08) * 2  # grid_sample's coordinates span 2
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([x + size * np.cos(angle) * mask, y + size * np.sin(angle) * mask], dim=-1)[None].float()
    return F.grid_sample(image[None], grid, padding_mode="border", align_corners=True)[0]


FAULTS: dict[str, Callable[[Tensor, Tensor, np.random.Generator], Tensor]] = {
    "clone": _clone,
    "colour": _colour,
    "erase": _erase,
    "patch": _patch,
    "text": _text,
    "texture": _texture,
    "warp": _warp,
}
