"""FLUX.1 with a ControlNet that sees the LQ's latent (InstantX layout): DP2O-SR's C-FLUX.

`FluxControlNetPipeline`, which draws the LQ's latent from the VAE's posterior; here it is the mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrestore.diffusion.conversions import pack, unpack
from rlrestore.restorers.flow import FlowRestorer
from rlrestore.restorers.flux_kontext import FluxKontextRestorer, image_ids
from rlrestore.restorers.pipeline import LatentCondition, dtype_of
from rlrestore.restorers.prompts import Embeddings
from rlrestore.restorers.sd_controlnet import ControlNetConfig, controlnet_folder


@dataclass
class FluxControlNetConfig(ControlNetConfig):
    guidance: float = 3.5  # the embedded scalar of the distilled model


class FluxControlDenoiser(nn.Module):
    def __init__(self, transformer: nn.Module, controlnet: nn.Module):
        super().__init__()
        self.transformer, self.controlnet = transformer, controlnet

    def forward(self, z: Tensor, t_B: Tensor, lq: Tensor, guidance: float, strength: float, text: Embeddings) -> Tensor:
        height, width = z.shape[-2:]
        shared = {
            "hidden_states": pack(z),
            "timestep": t_B,
            "pooled_projections": text["pooled_prompt_embeds"],
            "encoder_hidden_states": text["prompt_embeds"],
            "txt_ids": z.new_zeros(text["prompt_embeds"].shape[1], 3),
            "img_ids": image_ids(0, height, width, z),
            "return_dict": False,
        }
        blocks, singles = self.controlnet(
            controlnet_cond=pack(lq), conditioning_scale=strength, guidance=_guidance(self.controlnet, t_B, guidance),
            **shared,
        )  # fmt: skip
        v = self.transformer(
            controlnet_block_samples=blocks, controlnet_single_block_samples=singles,
            guidance=_guidance(self.transformer, t_B, guidance), **shared,
        )[0]  # fmt: skip
        return unpack(v, height, width)


def _guidance(network: Any, t_B: Tensor, guidance: float) -> Tensor | None:
    return torch.full_like(t_B, guidance) if network.config.guidance_embeds else None


class FluxControlNetRestorer(FlowRestorer):
    kind = "flux_controlnet"
    pipelines = ("FluxControlNetPipeline", "FluxPipeline")
    parts = {"transformer": "FluxTransformer2DModel", "controlnet": "FluxControlNetModel"}  # noqa: RUF012
    lora_part = "transformer"
    lora_targets = FluxKontextRestorer.lora_targets
    text = ("prompt_embeds", "pooled_prompt_embeds")
    patch = 2
    config: FluxControlNetConfig

    def part_folder(self, name: str) -> Path:
        return controlnet_folder(self.config, self.folder) if name == "controlnet" else self.folder / name

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        if networks["controlnet"].input_hint_block is not None:
            raise ValueError(
                "restorer.controlnet: XLabs' kind, which reads pixels, is not supported: give InstantX's kind"
            )
        return FluxControlDenoiser(**networks)

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype, config = dtype_of(net), self.config
        lq = condition.hint.to(dtype)
        return net(z_t.to(dtype), t_B, lq, config.guidance, config.strength, text).float()

    encode_text = staticmethod(FluxKontextRestorer.encode_text)
