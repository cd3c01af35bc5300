"""Resizing as Real-ESRGAN does it: `F.interpolate` in one of three modes, without antialiasing (that is part of the
damage).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MODES = ("area", "bilinear", "bicubic")


def resize(image: Tensor, height: int, width: int, mode: str) -> Tensor:
    """[3, h, w] -> [3, height, width]; the very same values if the size is the same. Bicubic may leave [0, 1]."""
    if image.shape[-2:] == (height, width):
        return image
    if mode not in MODES:
        raise ValueError(f"resize mode must be one of {MODES}, got {mode!r}")
    corners = None if mode == "area" else False
    return F.interpolate(image[None], size=(height, width), mode=mode, align_corners=corners)[0]
