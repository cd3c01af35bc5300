"""Qwen-Image-Edit and Edit-Plus: the LQ's latent follows the noisy one in the token sequence; positions by `img_shapes`.

`QwenImageEditPipeline` and `QwenImageEditPlusPipeline` with one reference, at the photo's own size: the pipelines
resize every photo to about one megapixel. The prompt is embedded once without the photo, which the published text side
also looks at: a shift of distribution that training has to absorb.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlrestore.diffusion.conversions import pack, unpack
from rlrestore.restorers.flow import FlowRestorer
from rlrestore.restorers.pipeline import LatentCondition, dtype_of
from rlrestore.restorers.prompts import Embeddings

VISION = "<|vision_start|><|image_pad|><|vision_end|>"  # where the template has the photo


class QwenEditDenoiser(nn.Module):
    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, z: Tensor, t_B: Tensor, lq: Tensor, text: Embeddings) -> Tensor:
        height, width = z.shape[-2:]
        tokens = pack(z)
        v = self.transformer(
            hidden_states=torch.cat([tokens, pack(lq)], dim=1),
            timestep=t_B,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_hidden_states_mask=text.get("prompt_embeds_mask"),
            img_shapes=[[(1, height // 2, width // 2), (1, lq.shape[-2] // 2, lq.shape[-1] // 2)]] * len(z),
            guidance=None,
            return_dict=False,
        )[0]
        return unpack(v[:, : tokens.shape[1]], height, width)


class QwenImageEditRestorer(FlowRestorer):
    kind = "qwen_image_edit"
    pipelines = ("QwenImageEditPipeline",)
    parts = {"transformer": "QwenImageTransformer2DModel"}  # noqa: RUF012
    lora_part = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    vae_class = "AutoencoderKLQwenImage"
    patch = 2

    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        if networks["transformer"].config.guidance_embeds:
            raise ValueError("restorer.weights: a transformer with guidance_embeds does not run in diffusers 0.42")
        return QwenEditDenoiser(networks["transformer"])

    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        dtype = dtype_of(net)
        return net(z_t.to(dtype), t_B, condition.hint.to(dtype), text).float()

    def guide(self, v: Tensor, v_negative: Tensor) -> Tensor:
        """Guidance that keeps each token's norm, as the pipelines have it."""
        token, guided = pack(v), pack(super().guide(v, v_negative))
        scaled = guided * (token.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(scaled, *v.shape[-2:])

    # -- a causal video VAE of one frame, normalised by channel ----------------------------------------------------

    @property
    def vae_factor(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def encode_pixels(self, image_BCHW: Tensor) -> Tensor:
        z = self.vae.encode((2 * image_BCHW - 1)[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = self._moments(z)
        return (z - mean) / std

    def decode_latent(self, z: Tensor) -> Tensor:
        mean, std = self._moments(z)
        return self.vae.decode((z * std + mean)[:, :, None]).sample[:, :, 0]

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        return tuple(
            torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (config.latents_mean, config.latents_std)
        )  # type: ignore[return-value]

    @staticmethod
    def encode_text(pipeline: Any, prompt: str) -> Embeddings:
        pipeline.prompt_template_encode = pipeline.prompt_template_encode.replace(VISION, "")
        embeds, mask = pipeline._get_qwen_prompt_embeds([prompt], None)
        return {"prompt_embeds": embeds} if bool(mask.all()) else {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


class QwenImageEditPlusRestorer(QwenImageEditRestorer):
    """The same network; only its template and its several references differ, and one is used here."""

    kind = "qwen_image_edit_plus"
    pipelines = ("QwenImageEditPlusPipeline",)
