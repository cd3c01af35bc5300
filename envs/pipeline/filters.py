"""The metric filter: cheap checks of an aligned candidate against its LQ. Each gives a value; a bound makes it a reason.

The checks are for faults that a number can see: nothing done, moved, framed, recoloured, clipped, blurred, another scene. That a
face is another person's, or a word another word, is for the VLM to see.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from envs.pipeline.align import Aligned
from envs.pipeline.config import FilterSection
from envs.pipeline.prompts import COLOUR_MAY_CHANGE

_BLOCKS = 8  # a side: structure is compared block by block
_TELLING = 0.5  # blocks with less structure than this part of the median say nothing
# Which side of its bound a check must stay on.
UPPER = ("no_op", "shift", "border", "chroma", "lowfreq", "clip")
LOWER = ("sharpness", "structure")


def measure(pair: Aligned) -> dict[str, float]:
    """All values by name (the keys of FilterSection)."""
    lq, gt = pair.lq.astype(np.float64) / 255.0, pair.gt.astype(np.float64) / 255.0
    grey_lq, grey_gt = lq.mean(2), gt.mean(2)
    size = (192, 192)
    small = [np.asarray(Image.fromarray(v).convert("L").resize(size, Image.Resampling.BOX)) for v in (pair.lq, pair.gt)]
    return {
        "no_op": float(structural_similarity(*small)),
        "shift": pair.shift_px / pair.returned[0],
        "border": _border(pair.gt) - _border(pair.lq),
        "chroma": _chroma_drift(lq, gt),
        "lowfreq": float(np.abs(gaussian_filter(grey_gt, 13 / 3) - gaussian_filter(grey_lq, 13 / 3)).mean()),
        "clip": _clipped(pair.gt) - _clipped(pair.lq),
        "sharpness": _sharpness(grey_gt) / max(_sharpness(grey_lq), 1e-6),
        "structure": _structure(grey_lq, grey_gt),
    }


def reasons(values: Mapping[str, float], bounds: FilterSection, types: str) -> list[str]:
    """What is out of bounds, each as "name value bound"."""
    free = bool(COLOUR_MAY_CHANGE & set(types.split("|")))
    found = []
    for name, value in values.items():
        bound = getattr(bounds, name)
        if bound is None or (free and name in ("chroma", "lowfreq")):
            continue
        if (name in UPPER and value > bound) or (name in LOWER and value < bound):
            found.append(f"{name} {value:.4g} {'above' if name in UPPER else 'below'} {bound:g}")
    return found


def _border(pixels: np.ndarray) -> float:
    """The widest uniform frame, as a part of its side: padding that was left in."""
    widest = 0.0
    for view in (pixels, pixels[::-1], pixels.transpose(1, 0, 2), pixels.transpose(1, 0, 2)[::-1]):
        spread = view.reshape(len(view), -1, 3).std(axis=1).max(axis=1)
        uniform = np.flatnonzero(spread > 1.0)
        widest = max(widest, (uniform[0] if len(uniform) else len(view)) / len(view))
    return widest


def _chroma_drift(lq: np.ndarray, gt: np.ndarray) -> float:
    """Length of the mean change of (R - G, B - G)."""
    change = (gt - lq).mean(axis=(0, 1))
    return float(np.hypot(change[0] - change[1], change[2] - change[1]))


def _clipped(pixels: np.ndarray) -> float:
    return float(((pixels == 0) | (pixels == 255)).all(axis=2).mean())


def _sharpness(grey: np.ndarray) -> float:
    """Mean gradient of edges after a blur of 1.5 px, which takes away noise and leaves edges (contrast normalised)."""
    smooth = gaussian_filter(grey, 1.5)
    dy, dx = np.gradient(smooth)
    gradient = np.hypot(dy, dx)
    return float(np.quantile(gradient, 0.95) / max(smooth.std(), 0.02))


def _structure(lq: np.ndarray, gt: np.ndarray) -> float:
    """The 5 % quantile, over blocks that have structure in the LQ or the result, of the correlation of both blocks.

    Low where something was put in, taken out or moved. Both views are blurred first, so that noise does not count.
    """
    scale = max(1, min(lq.shape) // 256)
    views = [gaussian_filter(view, 2.0 * scale)[::scale, ::scale] for view in (lq, gt)]
    height, width = (side // _BLOCKS for side in views[0].shape)
    stacks = [
        view[: height * _BLOCKS, : width * _BLOCKS]
        .reshape(_BLOCKS, height, _BLOCKS, width)
        .swapaxes(1, 2)
        .reshape(64, -1)
        for view in views
    ]
    centred = [stack - stack.mean(1, keepdims=True) for stack in stacks]
    spread = [np.sqrt((stack**2).mean(1)) for stack in centred]
    strongest = np.maximum(spread[0] / max(spread[0].mean(), 1e-6), spread[1] / max(spread[1].mean(), 1e-6))
    telling = strongest > _TELLING * np.median(strongest)
    together = (centred[0] * centred[1]).mean(1) / np.maximum(spread[0] * spread[1], 1e-6)
    return float(np.quantile(together[telling], 0.05))
