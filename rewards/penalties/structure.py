"""`structure`: coarse edges that the LQ does not have, and edges of the LQ that are gone. Lower is better.

    invented  mean_p relu( |grad G x| - gain * max5 |grad G lq| - dead zone )
    lost      mean_p relu( |grad G lq| - gain * max5 |grad G x| - dead zone )

G is a Gaussian of sigma 2 px on luma, max5 the maximum over 5 x 5 px: an edge may move a little and become `gain` times
steeper, which is what deblurring does. The dead zone is 1/255 a pixel and twice what the LQ's own noise leaves in this band. For
types that license a change of tone the LQ is fitted to the result first. For types whose degradation is an object that has to go
(rain, drops, scratches, shadows) only what is invented counts, without the worst tenth of the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.filters import gaussian_blur, luma_yiq
from rewards.penalties.consistency import trimmed_mean, unexplained_std
from rewards.penalties.tone import COLOUR_TYPES, LICENCE, OCCLUSION_TYPES, tone_matched

LOSS_TYPES = OCCLUSION_TYPES | {"oldphoto", "shadow"}


def slope(y_N1HW: Tensor) -> Tensor:
    """Gradient magnitude in [0, 1] a pixel, central differences, replicate padding; same shape."""
    y = F.pad(y_N1HW, (1, 1, 1, 1), mode="replicate")
    dx, dy = (y[..., 1:-1, 2:] - y[..., 1:-1, :-2]) / 2, (y[..., 2:, 1:-1] - y[..., :-2, 1:-1]) / 2
    return (dx.square() + dy.square() + 1e-12).sqrt()


@dataclass(frozen=True)
class StructureParams:
    sigma_px: float = 2.0
    gain: float = 2.0  # how much steeper an edge may become
    tolerance: float = 1.0 / 255.0  # a pixel
    noise_factor: float = 2.0
    trim: float = 0.1  # share of the worst pixels that is dropped for LOSS_TYPES


class Structure(ImageReward):
    params: StructureParams

    @classmethod
    def spec_for(cls, params: StructureParams) -> RewardSpec:
        if params.sigma_px <= 0 or params.gain < 1 or not 0 <= params.trim < 1:
            raise ValueError(f"structure needs sigma_px > 0, gain >= 1 and trim in [0, 1), got {params}")
        return RewardSpec(
            name="structure", version="1", higher_is_better=False, range=(0.0, 2.0), needs=frozenset({"lq"}),
            block="fidelity", scale=0.0005, differentiable=True, deterministic=True, licence=LICENCE,
            licensed_types=COLOUR_TYPES | LOSS_TYPES,
        )  # fmt: skip

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        p = self.params
        low_x, low_lq = (gaussian_blur(stack(items), p.sigma_px) for stack in (stack_images, stack_lq))
        dead_zone = (p.tolerance + p.noise_factor * unexplained_std(low_lq, p.sigma_px) / p.sigma_px).view(-1, 1, 1, 1)
        slope_x, slope_lq = slope(luma_yiq(low_x)), slope(luma_yiq(tone_matched(items, low_lq, low_x)))
        room_x, room_lq = (p.gain * F.max_pool2d(s, 5, 1, 2) + dead_zone for s in (slope_x, slope_lq))
        invented, lost = ((a - b).clamp_min(0).flatten(1) for a, b in ((slope_x, room_lq), (slope_lq, room_x)))
        may_lose = torch.tensor([bool(LOSS_TYPES & set(item.task.types)) for item in items])
        return torch.where(may_lose, trimmed_mean(invented, p.trim), invented.mean(1) + lost.mean(1))
