"""The x4 upscaler: the LQ's pixels stand beside the noisy latent as three more channels, at a quarter of the size.

`StableDiffusionUpscalePipeline`. Photos come at the size of the result, so the LQ is made smaller by 4 here, once
(bicubic, antialiased), and slightly noised as the model expects: the same noise for every photo of a size, drawn from
`noise_seed`, so that the K samples of a photo share their condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rlrestore.restorers.pipeline import LatentCondition, PipelineConfig, dtype_of
from rlrestore.restorers.prompts import Embeddings
from rlrestore.restorers.vp import VpRestorer

SCALE = 4


@dataclass
class SdUpscaleConfig(PipelineConfig):
    noise_level: int = 20  # timestep of the LQ's noise, 0..350; the model is told
    noise_seed: int = 0


class UpscaleDenoiser(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, y: Tensor, index_B: Tensor, lq: Tensor, level_B: Tensor, text: Embeddings) -> Tensor:
        return self.unet(
            torch.cat([y, lq], dim=1), index_B, encoder_hidden_states=text["prompt_embeds"], class_labels=level_B,
            return_dict=False,
        )[0]  # fmt: skip


class SdUpscaleRestorer(VpRestorer):
    kind = "sd_upscale"
    pipelines = ("StableDiffusionUpscalePipeline",)
    parts = {"unet": "UNet2DConditionModel"}  # noqa: RUF012
    config: SdUpscaleConfig

    def prepare(self, networks: dict[str, Any]) -> None:
        from diffusers import DDPMScheduler

        super().prepare(networks)
        if self.vae_factor != SCALE:
            raise ValueError(
                f"restorer.weights: the VAE of {self.folder} works at 1/{self.vae_factor} of the size and the upscaler needs "
                f"1/{SCALE}: give a x{SCALE} upscaler"
            )
        self.low_res_scheduler = DDPMScheduler.from_pretrained(self.folder, subfolder="low_res_scheduler")

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        return UpscaleDenoiser(networks["unet"])

    def hint(self, lq_BCHW: Tensor) -> Tensor:
        size = (lq_BCHW.shape[-2] // SCALE, lq_BCHW.shape[-1] // SCALE)
        small = 2 * interpolate(lq_BCHW, size, mode="bicubic", antialias=True).clamp(0, 1) - 1
        generator = torch.Generator().manual_seed(self.config.noise_seed)
        noise = torch.randn(1, *small.shape[1:], generator=generator).to(small.device).expand_as(small)
        return self.low_res_scheduler.add_noise(small, noise, torch.tensor([self.config.noise_level]))

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype = dtype_of(net)
        y = self.vp.state(z_t, t_B).to(dtype)
        level_B = torch.full_like(t_B, self.config.noise_level, dtype=torch.long)
        prediction = net(y, self.vp.index(t_B), condition.hint.to(dtype), level_B, text)
        return self.vp.velocity(prediction.float(), z_t, t_B)
