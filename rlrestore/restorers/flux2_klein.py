"""FLUX.2 klein: the LQ's latent follows the noisy one in the token sequence, at time coordinate 10 of the position ids.

`Flux2KleinPipeline` with one reference at the photo's own size. The state is the patchified latent [4c, h/2, w/2],
normalised by the running statistics of the VAE's batch norm, which therefore never trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from rlrestore.restorers.flow import FlowRestorer
from rlrestore.restorers.pipeline import LatentCondition, dtype_of
from rlrestore.restorers.prompts import Embeddings

REFERENCE = 10  # time coordinate of the first reference


class KleinDenoiser(nn.Module):
    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, z: Tensor, t_B: Tensor, lq: Tensor, text: Embeddings) -> Tensor:
        tokens, prompt = _flat(z), text["prompt_embeds"]
        image = torch.cat([_ids(0, *z.shape[-2:]), _ids(REFERENCE, *lq.shape[-2:])]).to(z.device)
        words = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, prompt.shape[1]))).to(z.device)
        v = self.transformer(
            hidden_states=torch.cat([tokens, _flat(lq)], dim=1),
            timestep=t_B,
            guidance=None,
            encoder_hidden_states=prompt,
            txt_ids=words.expand(len(z), -1, -1),
            img_ids=image.expand(len(z), -1, -1),
            return_dict=False,
        )[0]
        return v[:, : tokens.shape[1]].transpose(1, 2).reshape(z.shape)


class Flux2KleinRestorer(FlowRestorer):
    kind = "flux2_klein"
    pipelines = ("Flux2KleinPipeline",)
    parts = {"transformer": "Flux2Transformer2DModel"}  # noqa: RUF012
    lora_part = "transformer"
    # `to_out` is a list of layers in double blocks and one layer in single ones: only layers are ever matched
    lora_targets = (
        "to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
        r"single_transformer_blocks\.\d+\.attn\.to_out",
    )  # fmt: skip
    vae_class = "AutoencoderKLFlux2"

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        return KleinDenoiser(networks["transformer"])

    def shift_of(self, tokens: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(image_seq_len=tokens, num_steps=steps)

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype = dtype_of(net)
        return net(z_t.to(dtype), t_B, condition.hint.to(dtype), text).float()

    @property
    def vae_factor(self) -> int:
        return 2 * super().vae_factor

    @property
    def latent_channels(self) -> int:
        return 4 * self.vae.config.latent_channels

    def encode_pixels(self, image_BCHW: Tensor) -> Tensor:
        z = pixel_unshuffle(self.vae.encode(2 * image_BCHW - 1).latent_dist.mode(), 2)
        mean, std = self._moments()
        return (z - mean) / std

    def decode_latent(self, z: Tensor) -> Tensor:
        mean, std = self._moments()
        return self.vae.decode(pixel_shuffle(z * std + mean, 2)).sample

    def _moments(self) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    @staticmethod
    def encode_text(pipeline: Any, prompt: str) -> Embeddings:
        return {"prompt_embeds": pipeline.encode_prompt(prompt)[0]}


def _flat(z: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, h w, c]."""
    return z.flatten(2).transpose(1, 2)


def _ids(time: int, height: int, width: int) -> Tensor:
    """[h w, 4] of (time, row, column, 0)."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(1))
