"""`low_frequency`: drift of colour and brightness against the LQ. Lower is better, 0 for a copy of the LQ.

It holds a restorer back, it does not judge it. Unit: mean absolute difference of [0, 1] RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.filters import atrous_low_pass
from rewards.penalties.tone import COLOUR_TYPES, LICENCE, tone_matched


@dataclass(frozen=True)
class LowFrequencyParams:
    passes: int = 5  # à-trous passes; 5 is a Gaussian of sigma 13.06 px


class LowFrequency(ImageReward):
    """mean |B(x) - B(lq)| with B the à-trous low pass (SeeSR / StableSR wavelet colour fix, here as a penalty).

    A constant offset c costs exactly c; anything finer than about 10 px costs nothing. Catches colour and brightness
    drift.
    """

    params: LowFrequencyParams

    @classmethod
    def spec_for(cls, params: LowFrequencyParams) -> RewardSpec:
        if params.passes < 1:
            raise ValueError(
                f"low_frequency.passes is {params.passes}; give at least 1 (5 is the usual wavelet colour fix)"
            )
        return RewardSpec(
            name="low_frequency",
            version="1",
            higher_is_better=False,
            range=(0.0, 1.0),
            needs=frozenset({"lq"}),
            block="fidelity",
            scale=0.005,
            differentiable=True,
            deterministic=True,
            licence=LICENCE,
            licensed_types=COLOUR_TYPES,
        )

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        low_x = atrous_low_pass(stack_images(items), self.params.passes)
        low_lq = atrous_low_pass(stack_lq(items), self.params.passes)
        return (low_x - tone_matched(items, low_lq, low_x)).abs().flatten(1).mean(1)
