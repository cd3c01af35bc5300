"""Stable Diffusion with a ControlNet that sees the LQ: restorers of the DiffBIR and DP2O-SR (C-SD2) kind.

`StableDiffusionControlNetPipeline`: the ControlNet reads the LQ as RGB in [0, 1] at the size of the result. LoRA is put on
the UNet, where pipelines can load it; to train the ControlNet itself, set lora_rank=0 and
engine.trainable=['^controlnet\\.'].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlrestore.restorers.pipeline import LatentCondition, PipelineConfig, dtype_of
from rlrestore.restorers.pretrained import local_folder
from rlrestore.restorers.prompts import Embeddings
from rlrestore.restorers.vp import VpRestorer


@dataclass
class ControlNetConfig(PipelineConfig):
    controlnet: str | None = None  # a ControlNet's own folder or hub id; null: the pipeline's folder has it
    controlnet_revision: str | None = None
    strength: float = 1.0  # of the ControlNet's residuals; a reward tuned at 1 is not valid elsewhere


class SdControlDenoiser(nn.Module):
    def __init__(self, unet: nn.Module, controlnet: nn.Module):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, y: Tensor, index_B: Tensor, lq: Tensor, strength: float, text: Embeddings) -> Tensor:
        prompt = text["prompt_embeds"]
        down, middle = self.controlnet(
            y, index_B, encoder_hidden_states=prompt, controlnet_cond=lq, conditioning_scale=strength, return_dict=False
        )
        return self.unet(
            y, index_B, encoder_hidden_states=prompt, down_block_additional_residuals=down,
            mid_block_additional_residual=middle, return_dict=False,
        )[0]  # fmt: skip


class SdControlNetRestorer(VpRestorer):
    kind = "sd_controlnet"
    pipelines = ("StableDiffusionControlNetPipeline", "StableDiffusionPipeline")
    parts = {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel"}  # noqa: RUF012
    config: ControlNetConfig

    def part_folder(self, name: str) -> Path:
        return controlnet_folder(self.config, self.folder) if name == "controlnet" else self.folder / name

    def prepare(self, networks: dict[str, Any]) -> None:
        super().prepare(networks)
        factor = 2 ** (len(networks["controlnet"].config.conditioning_embedding_out_channels) - 1)
        if factor != self.vae_factor:
            raise ValueError(
                f"restorer.controlnet: it makes the LQ smaller by {factor} and the VAE by {self.vae_factor}: give a ControlNet of "
                "this base"
            )

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        return SdControlDenoiser(**networks)

    def hint(self, lq_BCHW: Tensor) -> Tensor:
        return lq_BCHW

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype = dtype_of(net)
        y = self.vp.state(z_t, t_B).to(dtype)
        prediction = net(y, self.vp.index(t_B), condition.hint.to(dtype), self.config.strength, text)
        return self.vp.velocity(prediction.float(), z_t, t_B)


def controlnet_folder(config: ControlNetConfig, folder: Path) -> Path:
    """Where the ControlNet of a config lies: a folder of its own, or inside the pipeline's."""
    if config.controlnet is None:
        return folder / "controlnet"
    return local_folder(config.controlnet, config.controlnet_revision, "restorer.controlnet")
