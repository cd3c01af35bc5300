"""A restorer applied to a photo of any size: overlapping tiles, each sampled whole, mixed by trapezoid weights.

Why there are no seams: noise belongs to places of the photo, not to tiles, and the ODE is deterministic, so tiles that
overlap see the same evidence and the same noise and nearly agree where they are mixed. What is left between them comes
from their padding and from group norms, whose statistics are of one tile. Measured on a degraded 512 x 512 photo with
tiles of 256 and overlap 64: tiled and untiled differ by 0.9/255 on average and 1.1/255 near tile edges, where two noise
seeds differ by 6.6/255. Averaging the velocity of the tiles at each step gave the same numbers, and has to hold the
conditions of all tiles at once.

Memory beside the network's: the photo twice in 8 bits and one row of tiles, whatever the height; with a colour fix, which
looks at the whole picture, the result in float32 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rlrestore.diffusion.kernels import ode_step
from rlrestore.iteration.rollout import to_pixels
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.colour import colour_fix_for, fixed_in_bands
from rlrestore.restorers.tiling import blend_weights, tiles
from rlrestore.seeds import derive_seed

NOISE_BAND = 16  # latent rows that one generator draws; part of what a seed means
FORWARD_PX = 2**18  # samples of a tile go through the network together up to this many pixels


def check_tiling(tile: int, overlap: int, multiple: int) -> None:
    """ValueError with the nearest usable numbers: tiles must start where the restorer's latent grid has a cell."""
    if tile < multiple or tile % multiple:
        raise ValueError(f"tile {tile} must be a multiple of {multiple}: try {_round_up(max(tile, 1), multiple)}")
    if not 0 <= overlap < tile or overlap % multiple:
        nearest = min(_round_up(max(overlap, 0), multiple), tile - multiple)
        raise ValueError(f"overlap {overlap} must be a multiple of {multiple}, smaller than the tile: try {nearest}")


def tile_count(height: int, width: int, tile: int, overlap: int, multiple: int) -> int:
    """How often `restore_pixels` calls `progress` for a photo of this size."""
    rows, columns = _round_up(height, multiple), _round_up(width, multiple)
    return len(tiles(rows, tile, overlap)) * len(tiles(columns, tile, overlap))


@torch.no_grad()
def restore_pixels(
    restorer: Restorer,
    rgb_HW3: np.ndarray,
    *,
    seed: int,
    steps: int,
    samples: int,
    tile: int,
    overlap: int,
    types: Sequence[str] = (),
    progress: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """[H, W, 3] uint8 -> the mean of `samples` restorations, [H, W, 3] uint8; equal seeds give equal bytes.

    `types`: degradation types, for the prompt, and for the colour fix, which some of them forbid.
    `progress()` is called after each tile. ValueError for a tiling that does not fit the restorer (`check_tiling`).
    """
    check_tiling(tile, overlap, restorer.multiple)
    height, width = rgb_HW3.shape[:2]
    padded = _pad(rgb_HW3, restorer.multiple)
    rows, columns = padded.shape[:2]
    tops, lefts = tiles(rows, tile, overlap), tiles(columns, tile, overlap)
    weight_y, weight_x = blend_weights(rows, tile, overlap), blend_weights(columns, tile, overlap)
    tile_h, tile_w = min(tile, rows), min(tile, columns)
    times = restorer.times(steps, (tile_h, tile_w))
    result = np.empty_like(padded)
    colour = colour_fix_for(restorer.colour_fix, types)
    canvas = None if colour == "none" else torch.empty(3, rows, columns)
    band = torch.zeros(3, tile_h, columns)
    for iy, top in enumerate(tops):
        noise = NoiseRows(seed, samples, top, columns)
        for ix, left in enumerate(lefts):
            lq = padded[top : top + tile_h, left : left + tile_w]
            restored = _restore_tile(restorer, lq, left, noise, times, types)
            band[:, :, left : left + tile_w] += restored * (weight_y[iy, :, None] * weight_x[ix, None, :])
            progress()
        done = (tops[iy + 1] if iy + 1 < len(tops) else rows) - top  # later tiles do not reach these rows
        if canvas is None:
            result[top : top + done] = to_pixels(band[:, :done]).permute(1, 2, 0).numpy()
        else:
            canvas[:, top : top + done] = band[:, :done]
        band = torch.cat([band[:, done:], torch.zeros(3, done, columns)], dim=1)
    if canvas is not None:
        _fix_colour(colour, canvas[:, :height, :width], rgb_HW3, result)
    return result[:height, :width]


def _fix_colour(kind: str, canvas_3HW: Tensor, rgb_HW3: np.ndarray, result: np.ndarray) -> None:
    """On the whole picture and before it is rounded, as in training; writes into `result`."""
    lq_3HW = torch.from_numpy(rgb_HW3).permute(2, 0, 1)
    for top, rows in fixed_in_bands(kind, canvas_3HW, lq_3HW):
        result[top : top + rows.shape[1], : rows.shape[2]] = to_pixels(rows).permute(1, 2, 0).numpy()


class NoiseRows:
    """The canvas noise of one row of tiles. A value depends on (seed, member, place, width of the canvas) alone."""

    def __init__(self, seed: int, members: int, top_px: int, width_px: int):
        self.seed, self.members, self.top_px, self.width_px = seed, members, top_px, width_px
        self._rows: dict[int, Tensor] = {}

    def crop(self, member: int, left_px: int, shape: Sequence[int], cell_px: int) -> Tensor:
        """[*shape] standard normal at `left_px` of this row, for a latent [c, h, w] with cells of `cell_px` pixels."""
        channels, height, width = shape
        if member not in self._rows:
            self._rows[member] = canvas_noise(
                self.seed, member, channels, self.top_px // cell_px, height, self.width_px // cell_px
            )
        left = left_px // cell_px
        return self._rows[member][:, :, left : left + width]


def canvas_noise(seed: int, member: int, channels: int, top: int, height: int, width: int) -> Tensor:
    """[channels, height, width] of rows top.. of the canvas, in latent cells, drawn band by band on the CPU."""
    first, last = top // NOISE_BAND, (top + height - 1) // NOISE_BAND
    bands = []
    for band in range(first, last + 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, "canvas", member, band))
        bands.append(torch.randn(channels, NOISE_BAND, width, generator=generator))
    start = top - first * NOISE_BAND
    return torch.cat(bands, dim=1)[:, start : start + height]


def _restore_tile(
    restorer: Restorer, lq_hw3: np.ndarray, left: int, noise: NoiseRows, times: list[float], types: Sequence[str]
) -> Tensor:
    """[3, h, w] float32 on the CPU: the mean of the members' samples."""
    device = restorer.device
    height, width = lq_hw3.shape[:2]
    lq = torch.from_numpy(np.ascontiguousarray(lq_hw3)).permute(2, 0, 1)[None].to(device, torch.float32) / 255
    encoded = restorer.condition(lq, [types])
    shape = restorer.latent_shape(encoded)
    if len(shape) != 3 or height * shape[2] != width * shape[1]:
        raise ValueError(f"a latent of {shape} is no grid over a {height}x{width} tile: only [c, h, w] can be tiled")
    together = max(1, FORWARD_PX // (height * width))
    total = torch.zeros(3, height, width, device=device)
    for first in range(0, noise.members, together):
        members = range(first, min(first + together, noise.members))
        z = torch.stack([noise.crop(member, left, shape, height // shape[1]) for member in members]).to(device)
        condition = encoded.repeat(len(members))
        z = restorer.start(z, times[0], condition)
        for t, t_next in pairwise(times):
            v = restorer.velocity(z, torch.full((len(members),), t, device=device), condition)
            z = ode_step(z, v, t, t_next)
        total += restorer.decode(z, condition).sum(0)
    return (total / noise.members).cpu()


def _pad(rgb_HW3: np.ndarray, multiple: int) -> np.ndarray:
    """Mirrored at the bottom and the right up to the multiple."""
    height, width = rgb_HW3.shape[:2]
    return np.pad(rgb_HW3, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
