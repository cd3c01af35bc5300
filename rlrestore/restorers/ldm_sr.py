"""Latent diffusion super-resolution: the LQ's pixels stand beside the noisy latent, at the latent's own size. No text.

`LDMSuperResolutionPipeline`. Photos come at the size of the result, so the LQ is made smaller by the VQ model's factor here,
once (bicubic, antialiased). The pipeline neither scales its latents nor quantises before decoding by itself; the VQ model
does when it decodes. Pipelines load no LoRA here: an export is the whole pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rlrestore.restorers.pipeline import LatentCondition, PipelineConfig, dtype_of
from rlrestore.restorers.prompts import Embeddings
from rlrestore.restorers.vp import VpRestorer


class LdmDenoiser(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, y: Tensor, index_B: Tensor, lq: Tensor) -> Tensor:
        return self.unet(torch.cat([y, lq], dim=1), index_B, return_dict=False)[0]


class LdmSrRestorer(VpRestorer):
    kind = "ldm_sr"
    pipelines = ("LDMSuperResolutionPipeline",)
    parts = {"unet": "UNet2DModel"}  # noqa: RUF012
    vae_class = "VQModel"
    vae_folder = "vqvae"
    vae_slices = False
    text = ()
    config: PipelineConfig

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        return LdmDenoiser(networks["unet"])

    def hint(self, lq_BCHW: Tensor) -> Tensor:
        size = (lq_BCHW.shape[-2] // self.vae_factor, lq_BCHW.shape[-1] // self.vae_factor)
        return 2 * interpolate(lq_BCHW, size, mode="bicubic", antialias=True).clamp(0, 1) - 1

    def encode_pixels(self, image_BCHW: Tensor) -> Tensor:
        return self.vae.encode(2 * image_BCHW - 1).latents

    def decode_latent(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype = dtype_of(net)
        prediction = net(self.vp.state(z_t, t_B).to(dtype), self.vp.index(t_B), condition.hint.to(dtype))
        return self.vp.velocity(prediction.float(), z_t, t_B)
