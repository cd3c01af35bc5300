"""Where two restorations differ, as pictures: how far they moved, whether toward the reference, what detail the LQ does not explain.

Pictures are [3, H, W] in [0, 1] in and out. Red is worse, blue is better, white is no change; the scale is fixed, so that maps
of different photos compare.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FULL = 0.1  # difference, of a pixel range of 1, that has the full colour
WINDOW_PX = 9  # of the local regression


def moved_map(base: Tensor, tuned: Tensor) -> Tensor:
    """Mean absolute difference over the channels: white is none, black FULL and more."""
    moved = ((tuned - base).abs().mean(0) / FULL).clamp(0, 1)
    return (1 - moved).expand(3, -1, -1)


def error_map(base: Tensor, tuned: Tensor, gt: Tensor) -> Tensor:
    """|tuned - gt| - |base - gt|: red is farther from the reference than the base was."""
    change = (tuned - gt).abs().mean(0) - (base - gt).abs().mean(0)
    return _red_blue(_box(change[None, None], 3)[0, 0] / FULL)


def invention_map(base: Tensor, tuned: Tensor, lq: Tensor) -> Tensor:
    """Change of unexplained detail: red is where tuned has more than base. Detail may be right or invented: the LQ cannot tell."""
    return _red_blue((unexplained(tuned, lq) - unexplained(base, lq)) / FULL)


def unexplained(picture: Tensor, lq: Tensor) -> Tensor:
    """[H, W] local RMS of the picture's detail that no multiple of the LQ's detail gives, of a pixel range of 1.

    Detail is luma minus its mean over WINDOW_PX; around each pixel it is regressed on the LQ's. Blurring an LQ leaves little of it
    unexplained, new texture all of it, and so does an LQ's own noise that was taken out: a hint where to look, not a verdict.
    """
    detail, given = _detail(picture), _detail(lq)
    variance, covariance = _box(given * given, WINDOW_PX), _box(given * detail, WINDOW_PX)
    slope = covariance / (variance + 1e-6)
    residual = _box(detail * detail, WINDOW_PX) - slope * covariance
    return residual.clamp_min(0).sqrt()[0, 0]


def _detail(picture: Tensor) -> Tensor:
    luma = (picture * picture.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)[None, None]
    return luma - _box(luma, WINDOW_PX)


def _box(value: Tensor, side: int) -> Tensor:
    """Mean over side x side, mirrored at the edges."""
    pad = min(side // 2, value.shape[-1] - 1, value.shape[-2] - 1)
    return F.avg_pool2d(F.pad(value, (pad,) * 4, mode="reflect"), 2 * pad + 1, stride=1)


def _red_blue(value: Tensor) -> Tensor:
    """[H, W] in [-1, 1] (clamped) to blue, white, red."""
    strength = value.clamp(-1, 1)
    end = torch.where(
        strength[..., None] > 0, value.new_tensor([0.70, 0.12, 0.15]), value.new_tensor([0.10, 0.32, 0.66])
    )
    return (1 + (end - 1) * strength.abs()[..., None]).permute(2, 0, 1)
