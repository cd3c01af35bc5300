"""One-step restorers of the OSEDiff and HYPIR kind: the LQ's latent stands where the noise would, and one call gives x0.

A Stable Diffusion UNet asked at a fixed `timestep` of the LQ's latent y = z_LQ (arXiv 2406.08177):
x0 = (y - sigma eps) / alpha. In our convention the path leads from z_1 = z_LQ + noise * eps to z_0 = x0, so
v = z_1 - x0 is defined at t = 1 alone: no trajectory and no density. Without `noise` all samples of a photo are equal and
a group has nothing to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlrestore.restorers.base import Condition
from rlrestore.restorers.pipeline import LatentCondition, PipelineConfig, dtype_of
from rlrestore.restorers.prompts import Embeddings
from rlrestore.restorers.vp import VpRestorer


@dataclass
class OneStepConfig(PipelineConfig):
    timestep: int = 999  # that the UNet is told: OSEDiff 999, HYPIR 200
    noise: float = 0.1  # std that is added to the LQ's latent: where the members of a group come from


class OneStepDenoiser(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, y: Tensor, index_B: Tensor, text: Embeddings) -> Tensor:
        return self.unet(y, index_B, encoder_hidden_states=text["prompt_embeds"], return_dict=False)[0]


class OneStepRestorer(VpRestorer):
    kind = "one_step"
    pipelines = ("StableDiffusionPipeline",)
    parts = {"unet": "UNet2DConditionModel"}  # noqa: RUF012
    one_step = True
    config: OneStepConfig

    def prepare(self, networks: dict[str, Any]) -> None:
        super().prepare(networks)
        known = len(self.vp.t_of_index)
        if not 0 < self.config.timestep < known:
            raise ValueError(f"restorer.timestep={self.config.timestep} must lie in 1..{known - 1}: OSEDiff has 999")
        self.t_model = float(self.vp.t_of_index[self.config.timestep])  # the network's own time
        self.t_max = 1.0

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        return OneStepDenoiser(networks["unet"])

    def times(self, steps: int, size: tuple[int, int]) -> list[float]:
        if steps != 1:
            raise ValueError(f"{steps} steps of a restorer that takes one: set steps to 1")
        return [1.0, 0.0]

    def endpoint(self, noise: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, LatentCondition)
        return condition.hint + self.config.noise * noise

    def start(self, noise: Tensor, t: float, condition: Condition) -> Tensor:
        return self.endpoint(noise, condition)

    def training_time(self, t: float) -> float:
        return 1.0

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        prediction = net(z_t.to(dtype_of(net)), torch.full_like(t_B, self.config.timestep), text).float()
        t_model = torch.full_like(t_B, self.t_model)
        state = self.vp.from_state(z_t, t_model)  # the LQ's latent is the network's own y
        x_0 = state - self.t_model * self.vp.velocity(prediction, state, t_model)
        return z_t - x_0
