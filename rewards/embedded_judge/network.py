"""The embedded judge: a small network over local measurements, with LL-Score's two heads.

`EmbeddedJudge(lq, images)` = estimator (what the clean picture probably is, once a source) -> `cell_features` (fixed) -> `pool` (fixed)
-> `Heads` (trained): a few pairs of heads, whose mean counts. Images of any size of at least 32 px, float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rewards.embedded_judge.estimator import Estimator
from rewards.embedded_judge.features import CHANNELS, ERRORS, LOCAL, cell_features

POOLED = CHANNELS + LOCAL + ERRORS.stop - ERRORS.start
SCALE_FLOOR = 1e-3  # under the standard deviation of a measurement
FAR = 8.0  # standard deviations, beyond which a measurement says nothing more


@dataclass(frozen=True)
class JudgeConfig:
    hidden: int = 192
    layers: int = 3  # hidden layers of a head
    dropout: float = 0.1  # while training
    members: int = 3  # pairs of heads; a training step trains one of them, drawn at random


class Heads(nn.Module):
    """Pooled measurements [N, POOLED] -> (quality [N], hallucination log-odds [N])."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.members = nn.ModuleList(nn.ModuleList(_head(config) for _ in range(2)) for _ in range(config.members))
        self.pooled_mean, self.pooled_std = (nn.Buffer(z(POOLED)) for z in (torch.zeros, torch.ones))

    def calibrate(self, pooled_NP: Tensor) -> None:
        """The zero and the unit of the measurements, over training pictures."""
        self.pooled_mean.copy_(pooled_NP.mean(0))
        self.pooled_std.copy_(pooled_NP.std(0) + SCALE_FLOOR)

    def forward(self, pooled_NP: Tensor) -> tuple[Tensor, Tensor]:
        known = ((pooled_NP - self.pooled_mean) / self.pooled_std).clamp(-FAR, FAR)
        members = [cast(nn.ModuleList, pair) for pair in self.members]
        if self.training:
            members = [members[int(torch.randint(len(members), ()))]]
        quality, logit = (torch.stack([pair[k](known)[:, 0] for pair in members]).mean(0) for k in range(2))
        return quality, logit


def pool(features_NChw: Tensor) -> Tensor:
    """[N, POOLED]: mean and deviation over the cells, and of the errors the log of the picture's mean square."""
    measured = features_NChw.flatten(2)
    errors = measured[:, ERRORS].logsumexp(2) - math.log(measured.shape[2])
    return torch.cat([measured.mean(2), measured[:, :LOCAL].std(2), errors], dim=1)


def _head(config: JudgeConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = POOLED
    for _ in range(config.layers):
        layers += [nn.Linear(width, config.hidden), nn.GELU(), nn.Dropout(config.dropout)]
        width = config.hidden
    return nn.Sequential(*layers, nn.Linear(width, 1))


class EmbeddedJudge(nn.Module):
    def __init__(self, config: JudgeConfig, estimator: Estimator):
        super().__init__()
        self.config, self.estimator = config, estimator
        self.heads = Heads(config)

    def describe(self, lq_3HW: Tensor, images_M3HW: Tensor) -> Tensor:
        """Pooled measurements [M, POOLED] of M restorations of one LQ. No gradient reaches the estimator."""
        mean, log_spread = self.estimator(lq_3HW[None])
        return pool(cell_features(images_M3HW, lq_3HW[None], mean, log_spread))

    def forward(self, lq_3HW: Tensor, images_M3HW: Tensor) -> tuple[Tensor, Tensor]:
        """(quality [M], hallucination log-odds [M]) of M restorations of one LQ."""
        return self.heads(self.describe(lq_3HW, images_M3HW))
