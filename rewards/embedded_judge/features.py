"""What the embedded judge's network sees: fixed local measurements on 8 px cells, of a restoration beside its evidence.

x is the restoration, l the LQ, m the expected clean picture and s its spread (`estimator`). Per cell and octave (within
2x2 pixels of full, half and quarter size): the energies of x, m, l, x - m and x - l, how far x - m follows m (sharpening)
and how far it follows l - m (noise that was kept). Per cell: the mean drift of colour against l and m, and how large
and how far off (x - m) / s is. Differentiable in x. Nothing here is learned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.filters import luma_yiq

CELL_PX, OCTAVES = 8, 3
CHANNELS = 7 * OCTAVES + 14
ENERGY_FLOOR = 1e-6  # of [0, 1] squared: a quarter of a grey level
MIN_PX = 4 * CELL_PX


def cell_features(x_N3HW: Tensor, lq_N3HW: Tensor, mean_N3HW: Tensor, log_spread_N3HW: Tensor) -> Tensor:
    """[N, CHANNELS, ceil(H / 8), ceil(W / 8)] float32, about unit-sized. ValueError below 32 px."""
    height, width = x_N3HW.shape[-2:]
    if min(height, width) < MIN_PX:
        raise ValueError(f"the embedded judge needs images of at least {MIN_PX} px, got {height}x{width}")
    edge = (0, -width % CELL_PX, 0, -height % CELL_PX)
    x, lq, m, log_s = (F.pad(z, edge, mode="replicate") for z in (x_N3HW, lq_N3HW, mean_N3HW, log_spread_N3HW))
    return torch.cat([*_octaves(luma_yiq(x), luma_yiq(lq), luma_yiq(m)), _cells(x, lq, m, log_s)], dim=1)


def _octaves(x: Tensor, lq: Tensor, m: Tensor) -> list[Tensor]:
    """Seven maps an octave, from within-2x2 (co)variances averaged over the cell."""
    out = []
    for octave in range(OCTAVES):
        planes = torch.cat([x, m, lq], dim=1)
        low = F.avg_pool2d(planes, 2)
        products = torch.cat([planes * planes, planes * planes.roll(1, dims=1)], dim=1)  # xx mm ll, xl mx lm
        cov = F.avg_pool2d(products, 2) - torch.cat([low * low, low * low.roll(1, dims=1)], dim=1)
        xx, mm, ll, xl, xm, ml = F.avg_pool2d(cov, CELL_PX // 2 ** (octave + 1)).split(1, dim=1)
        change, kept = (xx + mm - 2 * xm).clamp_min(0), (xx + ll - 2 * xl).clamp_min(0)
        removed = (ll + mm - 2 * ml).clamp_min(0)
        with_m = (xm - mm) / ((change + ENERGY_FLOOR) * (mm + ENERGY_FLOOR)).sqrt()
        with_noise = (xl - xm - ml + mm) / ((change + ENERGY_FLOOR) * (removed + ENERGY_FLOOR)).sqrt()
        logs = [((energy.clamp_min(0) + ENERGY_FLOOR).log() + 8) / 3 for energy in (xx, mm, ll, change, kept)]
        out += [*logs, with_m, with_noise]
        x, m, lq = low.split(1, dim=1)
    return out


def _cells(x: Tensor, lq: Tensor, m: Tensor, log_s: Tensor) -> Tensor:
    """Fourteen maps: drifts against l and m (3 each, tens of percent), surprise (mean 3, log mean square, largest), its chroma
    part, log s, and the brightness of m."""
    surprise = ((x - m) * (-log_s).exp()).clamp(-8, 8)
    chroma = surprise - surprise.mean(1, keepdim=True)
    mean = F.avg_pool2d(torch.cat([10 * (x - lq), 10 * (x - m), surprise], dim=1), CELL_PX)
    square = F.avg_pool2d(torch.cat([surprise, chroma], dim=1).square(), CELL_PX)
    size, colour = (square.split(3, dim=1)[k].mean(1, keepdim=True) for k in range(2))
    peak = F.max_pool2d(surprise.abs().mean(1, keepdim=True), CELL_PX) / 2
    known = F.avg_pool2d(torch.cat([log_s + 3, m], dim=1), CELL_PX)
    context = torch.cat([known[:, :3].mean(1, keepdim=True), known[:, 3:].mean(1, keepdim=True)], dim=1)
    return torch.cat([mean, (size + 1e-3).log(), (colour + 1e-3).log(), peak, context], dim=1)
