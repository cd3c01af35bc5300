"""`no_op`: the result is a copy of the LQ. Lower is better, 0 unless it is nearly one.

    relu(SSIM - 0.97) / 0.03,  grey, 7 x 7 windows, at a long side of 192 px (the guard of HarnessIR)

It stands against fidelity terms, for which a copy is perfect; so its block is quality. At 192 px only degradations that are
visible at that size can be told from none: with mild noise on small crops every result is "a copy", alike in its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.filters import luma_yiq
from rewards.penalties.colour_drift import shrunk
from rewards.penalties.tone import LICENCE


@dataclass(frozen=True)
class NoOpParams:
    above: float = 0.97  # SSIM from which on a result counts as a copy


def ssim_uniform(x_N1HW: Tensor, y_N1HW: Tensor, side: int = 7) -> Tensor:
    """Mean SSIM `[N]` with square windows, full ones only. ValueError below `side` px."""
    if min(x_N1HW.shape[-2:]) < side:
        raise ValueError(f"windows of {side} px need larger images than {tuple(x_N1HW.shape[-2:])}")
    c1, c2 = 0.01**2, 0.03**2
    mu_x, mu_y, xx, yy, xy = (F.avg_pool2d(z, side, 1) for z in (x_N1HW, y_N1HW, x_N1HW**2, y_N1HW**2, x_N1HW * y_N1HW))
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    contrast = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x**2 + yy - mu_y**2 + c2)
    return (luminance * contrast).flatten(1).mean(1)


class NoOp(ImageReward):
    params: NoOpParams

    @classmethod
    def spec_for(cls, params: NoOpParams) -> RewardSpec:
        if not 0 <= params.above < 1:
            raise ValueError(f"no_op.above is {params.above}; it is an SSIM in [0, 1)")
        return RewardSpec(
            name="no_op", version="1", higher_is_better=False, range=(0.0, 1.0), needs=frozenset({"lq"}), block="quality",
            scale=0.1, differentiable=True, deterministic=True, licence=LICENCE,
        )  # fmt: skip

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        similarity_N = ssim_uniform(luma_yiq(shrunk(stack_images(items))), luma_yiq(shrunk(stack_lq(items))))
        return ((similarity_N - self.params.above) / (1 - self.params.above)).clamp(0, 1)
