"""Any function of fixed-size tiles, applied to a picture of any size.

Tiles overlap and are mixed with trapezoid weights that add up to 1 at every pixel (they are normalised per axis before
use), so there is no weight buffer and no division: one float32 output buffer, and `batch` tiles at a time, row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tiles(length: int, size: int, overlap: int) -> list[int]:
    """Starts of tiles of `size` that cover [0, length): 0, s, 2s, ... s = size - overlap, the last at length - size.

    A length of at most `size` takes the one tile [0]. The last two tiles may overlap by more than `overlap`.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"tile overlap must be in [0, tile size), got size={size}, overlap={overlap}")
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def blend_weights(length: int, size: int, overlap: int) -> Tensor:
    """[tiles, min(size, length)] float32: the share of each tile in its pixels; at a pixel they add up to 1.

    Trapezoids: linear ramps over `overlap` pixels at both ends, flat between.
    """
    starts = tiles(length, size, overlap)
    size = min(size, length)
    ramp = torch.arange(1, size + 1, dtype=torch.float64)
    trapezoid = torch.minimum(ramp, ramp.flip(0)).clamp_max(overlap + 1)
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + size] += trapezoid
    return torch.stack([trapezoid / total[start : start + size] for start in starts]).float()


@torch.no_grad()
def blend_tiles(
    fn: Callable[[Tensor], Tensor],
    image: Tensor,
    size: int,
    overlap: int,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
    *,
    multiple: int = 1,
) -> Tensor:
    """fn over overlapping tiles of `image` [C, H, W]; returns [C', H, W] float32 on the device of `image`.

    fn takes [b, C, h, w] with b <= batch and returns [b, C', h, w]; it may move tiles to another device. h and w are
    `size`, or the side of the picture rounded up to `multiple` where that is smaller (the edge is repeated, and the
    result cut back). progress(done, total) is called after each batch. A condition is concatenated to the channels.
    """
    if size % multiple:
        raise ValueError(f"tile size {size} is no multiple of {multiple}; try {-(-size // multiple) * multiple}")
    _, height, width = image.shape
    padded = _pad_edges(image, _side(height, size, multiple), _side(width, size, multiple))
    padded_height, padded_width = padded.shape[1:]
    tile_h, tile_w = min(size, padded_height), min(size, padded_width)
    weight_y = blend_weights(padded_height, size, overlap)
    weight_x = blend_weights(padded_width, size, overlap)
    places = [
        (iy, ix, y, x)
        for iy, y in enumerate(tiles(padded_height, size, overlap))
        for ix, x in enumerate(tiles(padded_width, size, overlap))
    ]
    output: Tensor | None = None
    for first in range(0, len(places), batch):
        chunk = places[first : first + batch]
        result = fn(torch.stack([padded[:, y : y + tile_h, x : x + tile_w] for _, _, y, x in chunk]))
        assert result.shape[-2:] == (tile_h, tile_w), f"tile of {tile_h}x{tile_w} came back as {tuple(result.shape)}"
        result = result.to(image.device, torch.float32)
        if output is None:
            output = torch.zeros(result.shape[1], padded_height, padded_width, device=image.device)
        for (iy, ix, y, x), tile in zip(chunk, result, strict=True):
            weight = weight_y[iy, :, None] * weight_x[ix, None, :]
            output[:, y : y + tile_h, x : x + tile_w] += tile * weight.to(image.device)
        if progress is not None:
            progress(first + len(chunk), len(places))
    assert output is not None
    return output[:, :height, :width]


def _side(length: int, size: int, multiple: int) -> int:
    """A side of at most `size` grows to the next multiple; a longer one is covered by tiles as it is."""
    return length if length >= size else -(-length // multiple) * multiple


def _pad_edges(image: Tensor, height: int, width: int) -> Tensor:
    below, right = height - image.shape[1], width - image.shape[2]
    if below == 0 and right == 0:
        return image
    return F.pad(image[None], (0, right, 0, below), mode="replicate")[0]
