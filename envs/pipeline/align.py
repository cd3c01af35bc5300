"""Bringing an editor's picture onto the LQ: its size, and a shift of whole pixels.

Editors return their own sizes and move pictures by a few pixels. Only whole pixels are moved, so nothing is resampled
twice; both views are then cut to what they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.registration import phase_cross_correlation


@dataclass(frozen=True)
class Aligned:
    """Two views of one size."""

    lq: np.ndarray  # [H, W, 3] uint8
    gt: np.ndarray
    shift_px: float  # how far the candidate had moved, before it was moved back
    returned: tuple[int, int]  # (width, height) of the candidate as it came


def align(lq: np.ndarray, candidate: np.ndarray, max_aspect_change: float) -> Aligned:
    """Resize the candidate to the LQ, measure its shift, move it back by whole pixels, cut both.

    ValueError if the aspect ratio differs by more than `max_aspect_change`.
    """
    height, width = lq.shape[:2]
    returned = (candidate.shape[1], candidate.shape[0])
    change = abs(returned[0] / returned[1] / (width / height) - 1.0)
    if change > max_aspect_change:
        raise ValueError(f"came as {returned[0]}x{returned[1]} for {width}x{height}: aspect off by {change:.3f}")
    if returned != (width, height):
        candidate = np.array(Image.fromarray(candidate).resize((width, height), Image.Resampling.LANCZOS))
    dy, dx = measured_shift(lq, candidate)
    y, x = round(dy), round(dx)
    if max(abs(y), abs(x)) > min(height, width) // 8:  # no overlap worth keeping; the filter names the shift
        y = x = 0
    rows, columns = _overlap(y, height), _overlap(x, width)
    moved = candidate[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
    return Aligned(
        np.ascontiguousarray(lq[rows, columns]), np.ascontiguousarray(moved), float(np.hypot(dy, dx)), returned
    )


def measured_shift(lq: np.ndarray, candidate: np.ndarray) -> tuple[float, float]:
    """(dy, dx) to add to the candidate's coordinates to get the LQ's, px, to a tenth: phase correlation of the gradients'
    energy, which a change of brightness or haze leaves in place.
    """
    views = [_edges(view) for view in (lq, candidate)]
    if min(view.std() for view in views) < 1e-4:  # nothing to hold on to
        return 0.0, 0.0
    shift, *_ = phase_cross_correlation(*views, upsample_factor=10, normalization=None)
    return float(shift[0]), float(shift[1])


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Gradient energy without noise (blurred by 2 px), fading out towards the borders, where the views differ."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float64) / 255.0
    dy, dx = np.gradient(gaussian_filter(grey, 2.0))
    energy = np.hypot(dy, dx)
    return (energy - energy.mean()) * np.outer(np.hanning(energy.shape[0]), np.hanning(energy.shape[1]))


def _overlap(shift: int, side: int) -> slice:
    """Rows (or columns) of the LQ that the moved candidate covers."""
    return slice(max(0, shift), min(side, side + shift))
