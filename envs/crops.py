"""Crops of photographs and their degraded copies, each a pure function of a generator: what `photos` and finetuning
draw from.

A crop shows content: a square of `size` to 4 `size` source pixels (log-uniform) is downscaled, antialiased, to `size`,
never upscaled; of a few candidate places the one with the most detail is taken. Photos are decoded once and kept as
uint8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from envs.degradations.base import Degradation
from envs.degradations.jpeg import from_uint8_hwc, to_uint8_hwc
from envs.images import DecodedCache, checked_size, file_digest
from envs.rng import generator_for
from envs.types import Task

MAX_ZOOM = 4.0  # largest source square, in units of the crop size
TRAIN_CANDIDATES = 2
HELD_OUT_CANDIDATES = 6
_DETAIL_EDGE_PX = 256  # long edge of the thumbnail on which detail is measured


@dataclass(frozen=True)
class Photo:
    """A photograph on disk."""

    name: str  # unique in a pool; part of the task id
    path: Path
    licence: str = ""


@dataclass(frozen=True)
class Place:
    """A square in a photo, in source pixels."""

    x_px: int
    y_px: int
    extent_px: int


class PhotoPool:
    """Photos with a crop size and a recipe; random access to (LQ, GT) pairs."""

    def __init__(
        self, photos: Sequence[Photo], size: int, recipe: Degradation, prefix: str = "photos", cache_mb: int = 2048
    ) -> None:
        """size: side of the crops in px, a multiple of recipe.scale. Photos with a shorter side than `size` are left
        out (`too_small`), since upscaling would teach blur. ValueError for unreadable files and when no photo is left.
        """
        if size < 8 or size % recipe.scale:
            raise ValueError(
                f"size must be at least 8 and a multiple of scale, got size {size} and scale {recipe.scale}"
            )
        # Photos much larger than the crops are kept at 1024 px (or 8 crops): more would only cost memory.
        self.long_edge_px = max(1024, 8 * size)
        self.size, self.recipe, self.prefix = size, recipe, prefix
        kept: list[Photo] = []
        too_small: list[Photo] = []
        for photo in photos:
            (kept if self._kept_short_edge_px(photo) >= size else too_small).append(photo)
        self.photos, self.too_small = tuple(kept), tuple(too_small)
        if not self.photos:
            raise ValueError(
                f"none of {len(photos)} photos has a shorter side of {size} px or more: choose a smaller size, or "
                "larger photos"
            )
        names = [photo.name for photo in self.photos]
        if len(set(names)) < len(names):
            raise ValueError(f"photo names must be unique, twice: {sorted({n for n in names if names.count(n) > 1})}")
        self._pixels = DecodedCache(cache_mb * 2**20, self.long_edge_px)
        self._detail: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.photos)

    def pair(self, seed: int, index: int) -> tuple[Tensor, Tensor, Task]:
        """(lq, gt, task) number `index` of the endless training sequence of this seed; lq and gt are [3, size, size].

        Any index can be asked for in any order and by any worker. The task holds the same two tensors and their record.
        """
        rng = generator_for(seed, index)
        task = self.random_task(rng)
        assert task.gt is not None
        return task.lq, task.gt, task

    def random_task(self, rng: np.random.Generator) -> Task:
        """A training task: any photo, a random crop, flipped half of the time, degraded."""
        return self.task(
            self.photos[int(rng.integers(len(self.photos)))], rng, TRAIN_CANDIDATES, bool(rng.random() < 0.5)
        )

    def task(self, photo: Photo, rng: np.random.Generator, candidates: int, flip: bool) -> Task:
        """Crop and degrade one photo; all randomness comes from `rng`."""
        place = self.place(photo, rng, candidates)
        gt_8bit = self.crop(photo, place)
        if flip:
            gt_8bit = np.ascontiguousarray(gt_8bit[:, ::-1])
        gt = from_uint8_hwc(gt_8bit)
        degraded = self.recipe.apply(gt, rng)
        digest = hashlib.sha256(gt_8bit.tobytes() + to_uint8_hwc(degraded.lq).tobytes()).hexdigest()[:12]
        where = f"{place.extent_px}+{place.x_px}+{place.y_px}{'f' if flip else ''}"
        record = {"zoom": place.extent_px / self.size, "flip": float(flip), **degraded.record}
        return Task(
            id=f"{self.prefix}/{photo.name}@{where}#{digest}",
            lq=degraded.lq,
            types=degraded.types,
            gt=gt,
            record=record,
        )

    def place(self, photo: Photo, rng: np.random.Generator, candidates: int) -> Place:
        """A random square; of `candidates` positions (same extent) the one with the most detail."""
        height, width = self._pixels[photo.path].shape[:2]
        limit = min(height, width)
        zoom = math.exp(rng.uniform(0.0, math.log(max(1.0, min(MAX_ZOOM, limit / self.size)))))
        extent = min(limit, round(self.size * zoom))
        spots = [
            Place(int(rng.integers(width - extent + 1)), int(rng.integers(height - extent + 1)), extent)
            for _ in range(candidates)
        ]
        return max(spots, key=lambda spot: self._detail_at(photo, spot))

    def crop(self, photo: Photo, place: Place) -> np.ndarray:
        """[size, size, 3] uint8: the square, downscaled with an antialiasing bicubic filter."""
        x, y, extent = place.x_px, place.y_px, place.extent_px
        square = np.ascontiguousarray(self._pixels[photo.path][y : y + extent, x : x + extent])
        if extent == self.size:
            return square
        image = Image.fromarray(square).resize((self.size, self.size), Image.Resampling.BICUBIC, reducing_gap=2.0)
        return np.array(image)

    def digest(self) -> str:
        """sha256 over names and files of the photos in use, the crop size, and the recipe."""
        digest = hashlib.sha256(f"{self.prefix} {self.size} {self.recipe!r}".encode())
        for photo in self.photos:
            digest.update(photo.name.encode() + b"\0" + file_digest(photo.path))
        return digest.hexdigest()

    def _kept_short_edge_px(self, photo: Photo) -> int:
        """Shorter side as it will be decoded."""
        height, width = checked_size(photo.path)
        return math.floor(min(height, width) * min(1.0, self.long_edge_px / max(height, width)))

    def _detail_at(self, photo: Photo, place: Place) -> float:
        """Mean absolute luminance gradient in the square, from an integral image over a thumbnail of the photo."""
        if photo.name not in self._detail:
            self._detail[photo.name] = _gradient_integral(self._pixels[photo.path])
        integral = self._detail[photo.name]
        scale = (integral.shape[1] - 1) / self._pixels[photo.path].shape[1]
        top, left = int(place.y_px * scale), int(place.x_px * scale)
        bottom = min(integral.shape[0] - 1, max(top + 1, int((place.y_px + place.extent_px) * scale)))
        right = min(integral.shape[1] - 1, max(left + 1, int((place.x_px + place.extent_px) * scale)))
        total = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
        return float(total) / ((bottom - top) * (right - left))


def _gradient_integral(pixels: np.ndarray) -> np.ndarray:
    """[h+1, w+1] float64 summed-area table of |dx| + |dy| of the luminance of a thumbnail."""
    image = Image.fromarray(pixels).convert("L")
    image.thumbnail((_DETAIL_EDGE_PX, _DETAIL_EDGE_PX), Image.Resampling.BOX)
    grey = np.asarray(image, dtype=np.float64)
    gradient = np.zeros_like(grey)
    gradient[:, :-1] += np.abs(np.diff(grey, axis=1))
    gradient[:-1] += np.abs(np.diff(grey, axis=0))
    return np.pad(gradient.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
