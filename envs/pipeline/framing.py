"""Editors return a few shapes only: a photo is padded to one of them around the call, and the padding is cut away again.

Padding mirrors the photo's border, so that the editor sees no frame to keep or to invent. Where the photo lies in the frame is
said in parts of its sides, because the editor may answer in another size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SAME = 0.01  # two aspect ratios this close are one


@dataclass(frozen=True)
class Framed:
    """What is sent to the editor."""

    png: bytes
    box: tuple[float, float, float, float]  # left, top, right, bottom of the photo in it, in [0, 1] of the sides


def framed(png: bytes, shapes: Sequence[tuple[int, int]]) -> Framed:
    """The photo itself if one of the shapes has its aspect ratio (or there are none), else padded to the nearest of them."""
    whole = Framed(png, (0.0, 0.0, 1.0, 1.0))
    if not shapes:
        return whole
    size = png_size(png)
    aspect, wanted = size[0] / size[1], _aspect(nearest_shape(size, shapes))
    if abs(wanted / aspect - 1.0) <= SAME:
        return whole
    width, height = max(size[0], round(size[1] * wanted)), max(size[1], round(size[0] / wanted))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    pads = ((top, height - size[1] - top), (left, width - size[0] - left), (0, 0))
    with Image.open(io.BytesIO(png)) as opened:
        padded = np.pad(np.asarray(opened.convert("RGB")), pads, mode="symmetric")
    buffer = io.BytesIO()
    Image.fromarray(padded).save(buffer, "PNG", compress_level=1)
    return Framed(buffer.getvalue(), (left / width, top / height, (left + size[0]) / width, (top + size[1]) / height))


def unframed(pixels: np.ndarray, frame: Framed) -> np.ndarray:
    """The part of an answer [H, W, 3] that shows the photo, to whole pixels of the answer."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = frame.box
    return pixels[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]


def nearest_shape(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The shape whose aspect ratio is nearest to that of (width, height): least is padded."""
    aspect = size[0] / size[1]
    return min(shapes, key=lambda shape: max(_aspect(shape) / aspect, aspect / _aspect(shape)))


def png_size(png: bytes) -> tuple[int, int]:
    """(width, height), from the header."""
    with Image.open(io.BytesIO(png)) as opened:
        return opened.size


def _aspect(shape: tuple[int, int]) -> float:
    return shape[0] / shape[1]
