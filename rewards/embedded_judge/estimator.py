"""What the clean picture probably is, and how sure that is: the embedded judge's evidence.

A frozen copy of the mean network of an embedded restorer (docs/restorers.md): trained on pairs, it gives the expected
clean picture m of an LQ and the spread s of what cannot be known, averaged over the mirror images that the restorer
averages over. It is a copy: the judge stays as it is whatever becomes of the restorer. Input [B, 3, H, W] in [0, 1];
output m and log s, both [B, 3, H, W] float32 in units of [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 16  # sides are padded to a multiple, as the restorer pads them
PREFIXES = ("mean.", "detail.")  # of the restorer's tensors that are copied
VIEWS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((),),
    2: ((), (-1, -2)),
    4: ((), (-1,), (-2,), (-1, -2)),
}  # mirrored sides


@dataclass(frozen=True)
class EstimatorConfig:
    """The restorer's architecture, from its config.json."""

    unshuffle: int
    mean_channels: tuple[int, ...]
    detail_channels: int
    detail_blocks: int
    layers: int
    groups: int
    mean_views: int = 1  # mirror images that m and log s are averaged over: 1, 2 or 4

    @staticmethod
    def of(values: Mapping) -> EstimatorConfig:
        """From json; ValueError naming a missing key. Keys of the restorer that do not concern the mean are left out."""
        fields = EstimatorConfig.__dataclass_fields__
        if missing := [name for name, field in fields.items() if name not in values and field.default is MISSING]:
            raise ValueError(f"the estimator's config lacks {missing[0]!r}: give the folder of an embedded restorer")
        chosen: dict[str, Any] = {
            k: tuple(values[k]) if isinstance(values[k], list) else values[k] for k in fields if k in values
        }
        config = EstimatorConfig(**chosen)
        if config.mean_views not in VIEWS:
            raise ValueError(
                f"the restorer averages over {config.mean_views} mirror images and the estimator over 1, 2 or 4: set mean_views"
            )
        return config


class Trunk(nn.Module):
    """Residual blocks at the cells' own resolution, without norms."""

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int):
        super().__init__()

        def conv(a: int, b: int) -> nn.Conv2d:
            return nn.Conv2d(a, b, 3, padding=1)

        self.conv_in = conv(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width, width), nn.SiLU(), conv(width, width)) for _ in range(blocks)
        )
        self.conv_out = conv(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = x + block(x)
        return self.conv_out(F.silu(x))


class Estimator(nn.Module):
    def __init__(self, config: EstimatorConfig):
        super().__init__()
        from diffusers import UNet2DModel  # seconds to import

        self.config = config
        cells = 3 * config.unshuffle**2
        channels = config.mean_channels
        self.mean = UNet2DModel(
            in_channels=cells, out_channels=2 * cells, block_out_channels=channels, layers_per_block=config.layers,
            down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels),
            norm_num_groups=config.groups, add_attention=False,
        )  # fmt: skip
        self.detail = (
            Trunk(3 * cells, 2 * cells, config.detail_channels, config.detail_blocks)
            if config.detail_channels
            else None
        )
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, lq_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        height, width = lq_B3HW.shape[-2:]
        below, right = -height % MULTIPLE, -width % MULTIPLE
        if below or right:
            mode = "reflect" if below < height and right < width else "replicate"
            lq_B3HW = F.pad(lq_B3HW, (0, right, 0, below), mode=mode)
        views = VIEWS[self.config.mean_views]
        turned = torch.cat([lq_B3HW.flip(sides) for sides in views])
        lq = F.pixel_unshuffle(2 * turned - 1, self.config.unshuffle)
        raw = self.mean(lq, 0).sample
        if self.detail is not None:
            raw = raw + self.detail(torch.cat([lq, raw], dim=1))
        residual, log_spread = raw.chunk(2, dim=1)
        mean, log_spread = lq + residual, (log_spread - 2.5).clamp(-5.5, 0.0)
        mean_px, log_spread_px = (
            self._average(F.pixel_shuffle(z, self.config.unshuffle), views)[..., :height, :width]
            for z in (mean, log_spread)
        )
        return ((mean_px + 1) / 2).clamp(0, 1), log_spread_px - math.log(2)

    @staticmethod
    def _average(turned: Tensor, views: tuple[tuple[int, ...], ...]) -> Tensor:
        """Mean over views that are turned back."""
        parts = turned.chunk(len(views))
        return torch.stack([part.flip(sides) for part, sides in zip(parts, views, strict=True)]).mean(0)


def restorer_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean network's tensors out of an embedded restorer's weights file, float32."""
    return {name: value.float() for name, value in tensors.items() if name.startswith(PREFIXES)}
