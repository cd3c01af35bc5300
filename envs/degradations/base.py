"""What every degradation gives, and what a config can choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Degraded:
    """A degraded photo and what was done to it."""

    lq: Tensor  # [3, H, W] float32 in [0, 1] on the 8-bit grid, same size as gt
    types: tuple[str, ...]  # what was applied: "blur", "noise", "compression", "sr", "haze", ...
    record: dict[str, float]  # drawn parameters by name, e.g. "noise1_sigma_255"


class Degradation(Protocol):
    """A frozen dataclass with these two fields at least, so that `dataclasses.replace` can set them."""

    @property
    def scale(self) -> int:
        """LQ passes through 1/scale of the resolution."""
        ...

    @property
    def severity(self) -> float:
        """In [0, 1], from the mild end of each range to all of it."""
        ...

    def apply(self, gt: Tensor, rng: np.random.Generator) -> Degraded:
        """Degrade [3, H, W] float32 in [0, 1]; a pure function of the image and the generator's state."""
        ...


def round8(image: Tensor) -> Tensor:
    """To the 8-bit grid in [0, 1]; the division is by 255 so that k/255 is the same float everywhere."""
    return torch.round(image.clamp(0, 1) * 255.0).div_(255.0)


def apply_to_batch(
    degradation: Degradation, gt_NCHW: Tensor, rngs: list[np.random.Generator]
) -> tuple[Tensor, list[Degraded]]:
    """([N, 3, H, W] of LQ, what was done to each): image n sees generator n alone, so a batch of 1 equals a batch of n."""
    done = [degradation.apply(gt, rng) for gt, rng in zip(gt_NCHW, rngs, strict=True)]
    return torch.stack([item.lq for item in done]), done
