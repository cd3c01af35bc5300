"""`colour_drift`: how far the mean chroma of places moved from the LQ's. Lower is better.

    mean over cells of | mean ab(x) - mean ab(lq) |,  a and b of CIELAB (D65) / 255, at a long side of 192 px

One cell is HarnessIR's audit column; 4 x 4 of them see a cast over a part of the picture as well. For types that license a
change of colour nothing is measured: the value is 0 for every result, so that no group moves by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.penalties.tone import COLOUR_TYPES, LICENCE

SIDE_PX = 192
# linear sRGB -> XYZ of D65, rows divided by the white point
TO_XYZ = ((0.43395, 0.37622, 0.18983), (0.21267, 0.71516, 0.07217), (0.01776, 0.10947, 0.87277))


def chroma(x_N3HW: Tensor) -> Tensor:
    """a and b of CIELAB, divided by 255, `[N, 2, H, W]`; sRGB in."""
    linear = torch.where(x_N3HW <= 0.04045, x_N3HW / 12.92, ((x_N3HW.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("rc,nchw->nrhw", torch.tensor(TO_XYZ).to(x_N3HW), linear)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1) / 255


def cell_means(x_NCHW: Tensor, cells: int) -> Tensor:
    """Means over a grid of cells, at most one a pixel, `[N, C, cells, cells]`."""
    return F.adaptive_avg_pool2d(x_NCHW, min(cells, *x_NCHW.shape[-2:]))


def shrunk(x_NCHW: Tensor, side_px: int = SIDE_PX) -> Tensor:
    """Area-averaged to a long side of `side_px`, never enlarged."""
    h, w = x_NCHW.shape[-2:]
    share = side_px / max(h, w)
    if share >= 1:
        return x_NCHW
    return F.interpolate(x_NCHW, (max(1, round(h * share)), max(1, round(w * share))), mode="area")


@dataclass(frozen=True)
class ColourDriftParams:
    cells: int = 4  # per side; 1: the whole picture's mean


class ColourDrift(ImageReward):
    params: ColourDriftParams

    @classmethod
    def spec_for(cls, params: ColourDriftParams) -> RewardSpec:
        if params.cells < 1:
            raise ValueError(f"colour_drift.cells is {params.cells}; it is at least 1")
        return RewardSpec(
            name="colour_drift", version="1", higher_is_better=False, range=(0.0, 2.0), needs=frozenset({"lq"}),
            block="fidelity", scale=0.004, differentiable=True, deterministic=True, licence=LICENCE,
            licensed_types=COLOUR_TYPES,
        )  # fmt: skip

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        ab_x, ab_lq = (
            cell_means(chroma(shrunk(stack(items))), self.params.cells) for stack in (stack_images, stack_lq)
        )
        drift_N = (ab_x - ab_lq).square().sum(1).add(1e-12).sqrt().flatten(1).mean(1) - 1e-6
        protected = [not COLOUR_TYPES & set(item.task.types) for item in items]
        return drift_N.clamp_min(0) * torch.tensor(protected, dtype=drift_N.dtype)
