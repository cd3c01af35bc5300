"""The embedded judge: a small convolutional network over local measurements, with LL-Score's two heads.

`EmbeddedJudge(lq, images)` = estimator (what the clean picture probably is, once a source) -> `cell_features` (fixed) ->
`CellNetwork` (trained). Quality is the mean of a map plus a small network on pooled features; hallucination is the soft
maximum of a map plus the same. Images of any size of at least 32 px, float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.embedded_judge.estimator import Estimator
from rewards.embedded_judge.features import CHANNELS, cell_features


@dataclass(frozen=True)
class JudgeConfig:
    width: int = 24  # channels of the trained maps
    blocks: int = 1
    hidden: int = 48  # of the heads


class Block(nn.Module):
    """x + conv(gelu(conv(x))), 3x3; the second convolution starts small."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(x)))


class CellNetwork(nn.Module):
    """Measurements [N, CHANNELS, h, w] -> (quality [N], hallucination log-odds [N])."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.enter = nn.Conv2d(CHANNELS, config.width, 1)
        self.body = nn.Sequential(*[Block(config.width) for _ in range(config.blocks)])
        self.maps = nn.Conv2d(config.width, 2, 1)
        self.norm = nn.LayerNorm(2 * config.width)
        pooled = 2 * config.width + 2 * CHANNELS
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(pooled, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1)) for _ in range(2)
        )

    def forward(self, features_NChw: Tensor) -> tuple[Tensor, Tensor]:
        body = self.body(F.gelu(self.enter(features_NChw)))
        maps = self.maps(body).flatten(2)
        learned = self.norm(torch.cat([body.mean((2, 3)), body.amax((2, 3))], dim=1))
        measured = features_NChw.flatten(2)
        pooled = torch.cat([learned, measured.mean(2), measured.std(2)], dim=1)
        quality = maps[:, 0].mean(1) + self.heads[0](pooled)[:, 0]
        peak = maps[:, 1].logsumexp(1) - math.log(maps.shape[2])
        return quality, peak + self.heads[1](pooled)[:, 0]


class EmbeddedJudge(nn.Module):
    def __init__(self, config: JudgeConfig, estimator: Estimator):
        super().__init__()
        self.config, self.estimator = config, estimator
        self.cells = CellNetwork(config)

    def describe(self, lq_3HW: Tensor, images_M3HW: Tensor) -> Tensor:
        """Measurements [M, CHANNELS, h, w] of M restorations of one LQ. No gradient reaches the estimator."""
        mean, log_spread = self.estimator(lq_3HW[None])
        beside = [z.expand_as(images_M3HW) for z in (lq_3HW[None], mean, log_spread)]
        return cell_features(images_M3HW, *beside)

    def forward(self, lq_3HW: Tensor, images_M3HW: Tensor) -> tuple[Tensor, Tensor]:
        """(quality [M], hallucination log-odds [M]) of M restorations of one LQ."""
        return self.cells(self.describe(lq_3HW, images_M3HW))
