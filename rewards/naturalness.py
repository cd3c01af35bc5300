"""No-reference quality from natural scene statistics, native and without downloads: `niqe` and `nss`. Lower is better.

`niqe` is the published index (Mittal, Soundararajan, Bovik 2013) on small patches, with a pristine model that we fitted
ourselves. `nss` is a small learned index on the same statistics, trained by `scripts/fit_niqe.py` to order degraded
versions of one photo. Both read weights from `rewards/data/*.safetensors`; sources and measured accuracy are in
`rewards/data/README.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images
from rewards.filters import luma_yiq
from rewards.nss import patch_features, pyramid_statistics

DATA = Path(__file__).parent / "data"
LICENCE = "own code; statistics fitted on Debian-packaged photographs (rewards/data/README.md)"
PATCH_PX, STRIDE_PX = 32, 16


@functools.lru_cache(maxsize=4)
def load_weights(name: str) -> dict[str, Tensor]:
    """Tensors of `rewards/data/<name>.safetensors`; ValueError with the command that makes it."""
    path = DATA / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; restore it from git, or make it with: python scripts/fit_niqe.py PHOTOS_FOLDER"
        )
    return load_file(path)


def gaussian_distance(features_NPD: Tensor, mean_D: Tensor, cov_DD: Tensor) -> Tensor:
    """NIQE's distance `[N]` of the patch statistics of N images from a Gaussian model (eq. 10).

    With the pooled covariance, in float64:

        sqrt( (m - mean)^T ((C + cov) / 2)^-1 (m - mean) )

    m and C are the mean and the covariance over an image's P >= 2 patches.
    """
    f = features_NPD.double()
    m_ND = f.mean(1)
    centred = f - m_ND[:, None]
    own_NDD = centred.transpose(1, 2) @ centred / (f.shape[1] - 1)
    pooled = (own_NDD + cov_DD.double()) / 2 + 1e-9 * torch.eye(f.shape[2], dtype=torch.float64)
    diff = (m_ND - mean_D.double())[..., None]
    return (diff * torch.linalg.solve(pooled, diff)).sum((1, 2)).clamp_min(0).sqrt().float()


@dataclass(frozen=True)
class NiqeParams:
    """No parameters: the patch size and the pristine model belong together."""


class Niqe(ImageReward):
    """NIQE on 32 px patches at stride 16 (the paper.

    96 px without overlap, which leaves one patch of a 128 px crop).
    """

    @classmethod
    def spec_for(cls, params: NiqeParams) -> RewardSpec:
        return RewardSpec(
            name="niqe",
            version="1",
            higher_is_better=False,
            range=(0.0, None),
            needs=frozenset(),
            block="quality",
            scale=1.0,
            differentiable=False,
            deterministic=True,
            licence=LICENCE,
        )

    def __init__(self, params: NiqeParams) -> None:
        super().__init__(params)
        self.weights = load_weights("niqe_pristine")

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        features = patch_features(255 * luma_yiq(stack_images(items)), PATCH_PX, STRIDE_PX)
        if features.shape[1] < 2:
            raise ValueError(
                f"NIQE needs two patches of {PATCH_PX} px, the image has {tuple(items[0].image.shape[1:])} px"
            )
        return gaussian_distance(features, self.weights["mean"], self.weights["cov"])


def mlp(x_ND: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`[N]`: standardise, clamp to +-4 (nothing to gain outside the range it was trained on), two GELU layers."""
    z = ((x_ND - weights["mean"]) / weights["std"]).clamp(-4, 4)
    z = F.gelu(F.linear(z, weights["w1"], weights["b1"]))
    z = F.gelu(F.linear(z, weights["w2"], weights["b2"]))
    return F.linear(z, weights["w3"], weights["b3"])[:, 0]


@dataclass(frozen=True)
class NssParams:
    """No parameters: the statistics and the weights belong together."""


class Nss(ImageReward):
    """Learned distance from natural statistics: how far the picture is from its clean version, guessed without it."""

    @classmethod
    def spec_for(cls, params: NssParams) -> RewardSpec:
        return RewardSpec(
            name="nss",
            version="1",
            higher_is_better=False,
            range=(None, None),
            needs=frozenset(),
            block="quality",
            scale=0.3,
            differentiable=False,
            deterministic=True,
            licence=LICENCE,
        )

    def __init__(self, params: NssParams) -> None:
        super().__init__(params)
        self.weights = load_weights("nss")

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        return mlp(pyramid_statistics(stack_images(items)), self.weights)
