"""JPEG compression through Pillow's codec (libjpeg, chroma 4:2:0), on [3, H, W] float32 images."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8_hwc(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> [H, W, 3] uint8, clamped and rounded."""
    return (image.clamp(0, 1) * 255.0).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def from_uint8_hwc(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] float32 in [0, 1], contiguous."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(planes).float().div_(255.0)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Encode at `quality` in [1, 100] and decode; the input is clamped and rounded to 8 bits first."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be in 1..100, got {quality}")
    buffer = io.BytesIO()
    Image.fromarray(to_uint8_hwc(image)).save(buffer, "JPEG", quality=quality, subsampling=2)
    with Image.open(buffer, formats=["JPEG"]) as decoded:
        return from_uint8_hwc(np.array(decoded))
