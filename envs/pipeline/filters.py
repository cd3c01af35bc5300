"""The metric filter: cheap checks of an aligned candidate against its LQ. Each gives a value; a bound makes it a reason.

The checks are for faults that a number can see: nothing done, moved, framed, recoloured, clipped, blurred, something put in or taken
out. That a face is another person's is for the VLM to see. docs/data_build.md has how often each fault is found.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.metrics import structural_similarity

from envs.pipeline.align import Aligned
from envs.pipeline.config import FilterSection
from envs.pipeline.prompts import COLOUR_MAY_CHANGE

_SIDE, _CRISP_SIDE = 256, 512  # px: larger pictures are reduced before structure, and sharpness, are looked at
_WINDOW_PX = 33
_BLOCKS = 8  # a side: structure is compared block by block
_TELLING = 0.5  # blocks with less structure than this part of the median say nothing
MAY_LOSE = frozenset(
    {"flare", "oldphoto", "rain", "raindrop", "reflection", "shadow", "snow"}
)  # there the LQ shows more
# Which side of its bound a check must stay on.
UPPER = ("no_op", "shift", "border", "chroma", "lowfreq", "clip", "softening", "added", "lost")
LOWER = ("crispness", "structure")


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
        "crispness": _crispness(_at_most(grey_gt, _CRISP_SIDE)),
        "softening": _softening(_at_most(grey_lq, _CRISP_SIDE), _at_most(grey_gt, _CRISP_SIDE)),
        "structure": _structure(_at_most(grey_lq, _SIDE), _at_most(grey_gt, _SIDE)),
        "added": _unexplained(_at_most(grey_gt, _SIDE), _at_most(grey_lq, _SIDE), 3.0),
        "lost": _unexplained(_at_most(grey_lq, _SIDE), _at_most(grey_gt, _SIDE), 2.0),
    }


def reasons(values: Mapping[str, float], bounds: FilterSection, types: str) -> list[str]:
    """What is out of bounds, each as "name value bound"."""
    names = set(types.split("|"))
    skipped = {"chroma", "lowfreq"} if COLOUR_MAY_CHANGE & names else set()
    skipped |= {"lost"} if MAY_LOSE & names else set()
    found = []
    for name, value in values.items():
        bound = getattr(bounds, name)
        if bound is None or name in skipped:
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


def _crispness(grey: np.ndarray) -> float:
    """Energy of fine detail (1 to 3 px) over that of coarse (4 to 12 px): what a blur of 2 px halves, whatever the LQ was like."""
    return _energy(_band(grey, 0.7, 1.4)) / max(_energy(_band(grey, 2.8, 5.6)), 1e-6)


def _softening(lq: np.ndarray, gt: np.ndarray) -> float:
    """How much of the LQ's detail of 4 to 8 px the result has lost: 1 is as sharp as the LQ, below is sharper.

    The slope of the LQ's band on the result's, against that of the next coarser band (which takes out contrast and haze). Noise of the
    LQ is in no slope, because the result does not have it.
    """
    slopes = []
    for fine, coarse in ((2.0, 4.0), (4.0, 8.0)):
        a, b = _band(lq, fine, coarse), _band(gt, fine, coarse)
        slopes.append(float((a * b).mean() / ((b * b).mean() + 1e-7)))
    return slopes[0] / max(slopes[1], 1e-3)


def _structure(lq: np.ndarray, gt: np.ndarray) -> float:
    """The median, over blocks that have structure in the LQ or the result, of the correlation of both blocks: low for another scene.

    Both views are blurred first, so that noise does not count.
    """
    views = [gaussian_filter(view, 2.0) for view in (lq, gt)]
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
    return float(np.median(together[telling]))


def _unexplained(view: np.ndarray, other: np.ndarray, blur_px: float) -> float:
    """How far the place where `other` explains `view` worst stands out from the rest of the picture.

    Explained is what a straight line makes of the other's values within some 30 px, after a blur of both that takes out noise and
    most of the difference in sharpness. The largest residual (averaged over some 8 px) is divided by that of the worst tenth of the
    picture: edges are badly explained everywhere, an object that was put in or a word that was changed in one place.
    """
    x, y = gaussian_filter(other, blur_px), gaussian_filter(view, blur_px)
    mean_x, mean_y = _around(x), _around(y)
    slope = (_around(x * y) - mean_x * mean_y) / (_around(x * x) - mean_x**2 + 1e-4)
    residual = gaussian_filter(np.abs(y - mean_y - slope * (x - mean_x)), 4.0)
    return float(residual.max() / (np.quantile(residual, 0.9) + 0.003))


def _around(values: np.ndarray) -> np.ndarray:
    return uniform_filter(uniform_filter(values, _WINDOW_PX), _WINDOW_PX)


def _band(grey: np.ndarray, fine_px: float, coarse_px: float) -> np.ndarray:
    return gaussian_filter(grey, fine_px) - gaussian_filter(grey, coarse_px)


def _energy(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def _at_most(grey: np.ndarray, side_px: int) -> np.ndarray:
    """Reduced by a whole number until the shorter side is below twice `side_px`; each pixel is the mean of a block."""
    n = max(1, min(grey.shape) // side_px)
    height, width = (side // n * n for side in grey.shape)
    return grey[:height, :width].reshape(height // n, n, width // n, n).mean((1, 3))
