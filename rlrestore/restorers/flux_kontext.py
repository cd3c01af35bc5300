"""FLUX.1 Kontext: the LQ's latent follows the noisy one in the token sequence, marked by the first entry of its ids.

`FluxKontextPipeline` at the photo's own size, i.e. with `_auto_resize=False, height=H, width=W, max_area=H*W`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlrestore.diffusion.conversions import pack, unpack
from rlrestore.restorers.flow import FlowRestorer
from rlrestore.restorers.pipeline import LatentCondition, PipelineConfig, dtype_of
from rlrestore.restorers.prompts import Embeddings


@dataclass
class FluxKontextConfig(PipelineConfig):
    guidance: float = 2.5  # the embedded scalar of the distilled model, not classifier-free guidance


class KontextDenoiser(nn.Module):
    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, z: Tensor, t_B: Tensor, lq: Tensor, guidance_B: Tensor | None, text: Embeddings) -> Tensor:
        height, width = z.shape[-2:]
        ids = torch.cat([image_ids(0, height, width, z), image_ids(1, lq.shape[-2], lq.shape[-1], z)])
        tokens = pack(z)
        v = self.transformer(
            hidden_states=torch.cat([tokens, pack(lq)], dim=1),
            timestep=t_B,
            guidance=guidance_B,
            pooled_projections=text["pooled_prompt_embeds"],
            encoder_hidden_states=text["prompt_embeds"],
            txt_ids=z.new_zeros(text["prompt_embeds"].shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        return unpack(v[:, : tokens.shape[1]], height, width)


class FluxKontextRestorer(FlowRestorer):
    kind = "flux_kontext"
    pipelines = ("FluxKontextPipeline",)
    parts = {"transformer": "FluxTransformer2DModel"}  # noqa: RUF012
    lora_part = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    text = ("prompt_embeds", "pooled_prompt_embeds")
    patch = 2
    config: FluxKontextConfig

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        return KontextDenoiser(networks["transformer"])

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype = dtype_of(net)
        return net(z_t.to(dtype), t_B, condition.hint.to(dtype), self.guidance(t_B), text).float()

    def guidance(self, t_B: Tensor) -> Tensor | None:
        transformer = self.denoiser.transformer
        assert isinstance(transformer, nn.Module)
        return torch.full_like(t_B, self.config.guidance) if transformer.config.guidance_embeds else None  # type: ignore[union-attr]

    @staticmethod
    def encode_text(pipeline: Any, prompt: str) -> Embeddings:
        embeds, pooled, _ = pipeline.encode_prompt(prompt, None)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def image_ids(index: int, height: int, width: int, like: Tensor) -> Tensor:
    """[h/2 w/2, 3] of (which image, row, column) for a latent of height x width cells."""
    rows = torch.arange(height // 2, device=like.device, dtype=like.dtype)
    columns = torch.arange(width // 2, device=like.device, dtype=like.dtype)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(grid[0], index), *grid], dim=-1).reshape(-1, 3)
