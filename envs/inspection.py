"""Looking at one pair: can it be decoded, do the sizes fit, do both show the same thing, and its perceptual hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.fft import dctn

from envs.images import decode_rgb
from envs.sources.blobs import Blobs, differs, shown
from envs.sources.rows import Row

MIN_CORRELATION = 0.3
_MIN_STD = 1.0  # of 255: a flat view correlates with nothing


@dataclass(frozen=True)
class Look:
    """What is found in a pair."""

    reason: str  # why it cannot be used; "" if it can
    code: str  # unreadable | changed | size | different | identical | ""
    width: int = 0  # of the LQ, px
    height: int = 0
    correlation: float = 1.0
    phash: int = 0  # of the LQ
    phash_gt: int = 0
    sha256_lq: str = ""
    sha256_gt: str = ""


def look_at(blobs: Blobs, row: Row) -> Look:
    """Decode both views in full and compare them."""
    try:
        data = [blobs.read(locator) for locator in (row.lq, row.gt) if locator]
        views = [decode_rgb(blob, shown(locator)) for blob, locator in zip(data, (row.lq, row.gt), strict=False)]
    except ValueError as error:
        return Look(str(error), "unreadable")
    for blob, locator, told in zip(data, (row.lq, row.gt), (row.sha256_lq, row.sha256_gt), strict=False):
        if differs(blob, told):
            return Look(f"{shown(locator)} has another sha256 than its row says", "changed")
    hashes = [perceptual_hash(view) for view in views]
    digests = [hashlib.sha256(blob).hexdigest() for blob in data]
    (height, width), reason, code, correlation = views[0].shape[:2], "", "", 1.0
    if len(views) == 2:
        correlation = correlation_of(views[0], views[1])
        reason, code = _fault(row, views[0], views[1], correlation)
    pick = [*hashes, 0][:2] + [*digests, ""][:2]
    return Look(reason, code, width, height, correlation, *pick)  # type: ignore[arg-type]


def problem_of(blobs: Blobs, row: Row) -> str:
    """Why the pair cannot be used; "" if it can."""
    return look_at(blobs, row).reason


def _fault(row: Row, lq: np.ndarray, gt: np.ndarray, correlation: float) -> tuple[str, str]:
    scale = gt.shape[0] / lq.shape[0]
    if scale != int(scale) or gt.shape[1] != int(scale) * lq.shape[1]:
        sizes = f"{lq.shape[1]}x{lq.shape[0]} and {gt.shape[1]}x{gt.shape[0]}"
        return f"{shown(row.lq)} and {shown(row.gt)} are {sizes}: neither one size nor an integer ratio", "size"
    if lq.shape == gt.shape and np.array_equal(lq, gt):
        return f"{shown(row.lq)} and {shown(row.gt)} are the same picture", "identical"
    if correlation < MIN_CORRELATION:
        seen = f"luminance correlation {correlation:.2f}, below {MIN_CORRELATION}"
        return f"{shown(row.lq)} and {shown(row.gt)} show different things ({seen})", "different"
    return "", ""


def correlation_of(lq: np.ndarray, gt: np.ndarray) -> float:
    """Pearson correlation of the luminance of both views at 32 px; 1 where one of them is flat (nothing to compare)."""
    views = [_thumbnail(view, 32).ravel() for view in (lq, gt)]
    if min(view.std() for view in views) < _MIN_STD:
        return 1.0
    return float(np.corrcoef(views[0], views[1])[0, 1])


def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits: the signs of the 8 x 8 lowest DCT frequencies against their median, at 32 px (pHash, Zauner 2010)."""
    low = dctn(_thumbnail(pixels, 32), norm="ortho")[:8, :8].ravel()
    bits = low > np.median(low[1:])  # without the mean of the picture
    return int(np.packbits(bits).view(">u8")[0])


def _thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L").resize((side, side), Image.Resampling.BOX), dtype=np.float64)
