"""Stable Diffusion 3 with a ControlNet that sees the LQ's latent.

`StableDiffusion3ControlNetPipeline`. ControlNets of the InstantX kind (`force_zeros_for_pooled_projection`) were trained on
latents without the VAE's shift and with a pooled prompt of zeros, and get both. The pipeline draws the LQ's latent from
the VAE's posterior with the global generator; here it is the mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrestore.restorers.flow import FlowRestorer
from rlrestore.restorers.pipeline import LatentCondition, dtype_of
from rlrestore.restorers.prompts import Embeddings
from rlrestore.restorers.sd_controlnet import ControlNetConfig, controlnet_folder


class Sd3ControlDenoiser(nn.Module):
    def __init__(self, transformer: nn.Module, controlnet: nn.Module):
        super().__init__()
        self.transformer, self.controlnet = transformer, controlnet

    def forward(self, z: Tensor, t_B: Tensor, lq: Tensor, strength: float, text: Embeddings) -> Tensor:
        prompt, pooled = text["prompt_embeds"], text["pooled_prompt_embeds"]
        control: Any = self.controlnet.config
        residuals = self.controlnet(
            hidden_states=z,
            timestep=1000 * t_B,
            encoder_hidden_states=None if control.joint_attention_dim is None else prompt,
            pooled_projections=torch.zeros_like(pooled) if control.force_zeros_for_pooled_projection else pooled,
            controlnet_cond=lq,
            conditioning_scale=strength,
            return_dict=False,
        )[0]
        return self.transformer(
            hidden_states=z, timestep=1000 * t_B, encoder_hidden_states=prompt, pooled_projections=pooled,
            block_controlnet_hidden_states=residuals, return_dict=False,
        )[0]  # fmt: skip


class Sd3ControlNetRestorer(FlowRestorer):
    kind = "sd3_controlnet"
    pipelines = ("StableDiffusion3ControlNetPipeline", "StableDiffusion3Pipeline")
    parts = {"transformer": "SD3Transformer2DModel", "controlnet": "SD3ControlNetModel"}  # noqa: RUF012
    lora_part = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    text = ("prompt_embeds", "pooled_prompt_embeds")
    patch = 2
    config: ControlNetConfig

    def part_folder(self, name: str) -> Path:
        return controlnet_folder(self.config, self.folder) if name == "controlnet" else self.folder / name

    def prepare(self, networks: dict[str, Any]) -> None:
        super().prepare(networks)
        self.without_shift = networks["controlnet"].config.force_zeros_for_pooled_projection
        config = networks["transformer"].config
        self.longest = config.pos_embed_max_size * config.patch_size  # latent cells of a side

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        return Sd3ControlDenoiser(**networks)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        if max(shape[1:]) > self.longest:
            raise ValueError(
                f"a photo of {shape[1] * self.vae_factor}x{shape[2] * self.vae_factor} px has no positions in this transformer, "
                f"which ends at {self.longest * self.vae_factor} px a side: restore it in tiles, or choose a smaller env.size"
            )

    def hint(self, lq_BCHW: Tensor) -> Tensor:
        z = self.encode_pixels(lq_BCHW)
        return z + (self.vae.config.shift_factor or 0.0) * self.vae.config.scaling_factor if self.without_shift else z

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype = dtype_of(net)
        return net(z_t.to(dtype), t_B, condition.hint.to(dtype), self.config.strength, text).float()

    @staticmethod
    def encode_text(pipeline: Any, prompt: str) -> Embeddings:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
