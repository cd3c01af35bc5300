"""How each pipeline of diffusers is asked to restore photos of one size, from given noise: what ours is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlrestore.diffusion.conversions import pack
from rlrestore.reporting.pictures import to_pil
from rlrestore.restorers.base import Restorer

STEPS = 4  # DDIM steps to where it then is only if the steps divide 1000
HEIGHT, WIDTH = 64, 96


def comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines at the photo's own size, and modes where two of them draw the LQ's latent at random."""
    posterior = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{posterior}.sample", lambda self, generator=None: self.mode())
    for name in ("qwenimage_edit", "qwenimage_edit_plus"):
        sizes = (WIDTH, HEIGHT, None) if name == "qwenimage_edit" else (WIDTH, HEIGHT)
        module = f"diffusers.pipelines.qwenimage.pipeline_{name}"
        monkeypatch.setattr(f"{module}.calculate_dimensions", lambda *_, sizes=sizes: sizes)


def photos() -> Tensor:
    """[2, 3, H, W] two photos that differ, 8 bits as in [0, 1]."""
    return torch.randint(256, (2, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(5)) / 255


# -- how each pipeline is asked ------------------------------------------------------------------------------------

Text = dict[str, Tensor]
COMMON: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt"}


def flux_kontext(pipe: Any, lq: Tensor, noise: Tensor, text: Text, _: Restorer) -> Tensor:
    return pipe(
        image=lq, height=HEIGHT, width=WIDTH, max_area=HEIGHT * WIDTH, _auto_resize=False, latents=pack(noise),
        guidance_scale=2.5, **text, **COMMON,
    ).images  # fmt: skip


def flux_controlnet(pipe: Any, lq: Tensor, noise: Tensor, text: Text, _: Restorer) -> Tensor:
    return pipe(
        control_image=2 * lq - 1, height=HEIGHT, width=WIDTH, latents=pack(noise), guidance_scale=3.5,
        controlnet_conditioning_scale=1.0, **text, **COMMON,
    ).images  # fmt: skip


def sd3_controlnet(pipe: Any, lq: Tensor, noise: Tensor, text: Text, _: Restorer) -> Tensor:
    sigmas = np.linspace(1.0, 1 / STEPS, STEPS)  # without them this family walks another list, see FlowRestorer
    return pipe(
        control_image=2 * lq - 1,
        height=HEIGHT,
        width=WIDTH,
        latents=noise,
        guidance_scale=1.0,
        sigmas=sigmas,
        **text,
        **COMMON,
    ).images


def qwen(pipe: Any, lq: Tensor, noise: Tensor, text: Text, restorer: Restorer) -> Tensor:
    options = {"height": HEIGHT, "width": WIDTH, "true_cfg_scale": restorer.config.cfg, **COMMON}
    rows = [
        pipe(image=to_pil(lq[row]), latents=pack(noise[row : row + 1]), **_row(text, row), **options).images
        for row in range(len(lq))
    ]
    return torch.cat(rows)


def flux2_klein(pipe: Any, lq: Tensor, noise: Tensor, text: Text, _: Restorer) -> Tensor:
    options = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 1.0, **COMMON}
    rows = [
        pipe(image=to_pil(lq[row]), latents=noise[row : row + 1], **_row(text, row), **options).images
        for row in range(len(lq))
    ]
    return torch.cat(rows)


def sd_upscale(pipe: Any, lq: Tensor, noise: Tensor, text: Text, _: Restorer) -> Tensor:
    small = interpolate(lq, (HEIGHT // 4, WIDTH // 4), mode="bicubic", antialias=True).clamp(0, 1)
    rows = [
        pipe(
            image=2 * small[row : row + 1] - 1, latents=noise[row : row + 1], guidance_scale=1.0, noise_level=20,
            generator=torch.Generator().manual_seed(0), **_row(text, row), **COMMON,
        ).images
        for row in range(len(lq))
    ]  # fmt: skip
    return torch.cat(rows)


def sd_controlnet(pipe: Any, lq: Tensor, noise: Tensor, text: Text, restorer: Restorer) -> Tensor:
    return pipe(image=lq, latents=noise, guidance_scale=restorer.config.cfg, **text, **COMMON).images


def one_step(pipe: Any, lq: Tensor, noise: Tensor, text: Text, restorer: Restorer) -> Tensor:
    """Text-to-image from the LQ's latent in place of noise: one trailing step is timestep 999 to pure x0."""
    start = restorer.endpoint(noise, restorer.condition(lq))
    options = {**COMMON, "num_inference_steps": 1}
    return pipe(height=HEIGHT, width=WIDTH, latents=start, guidance_scale=1.0, **text, **options).images


def ldm_sr(pipe: Any, lq: Tensor, noise: Tensor, text: Text, _: Restorer) -> Tensor:
    small = 2 * interpolate(lq, (HEIGHT // 2, WIDTH // 2), mode="bicubic", antialias=True).clamp(0, 1) - 1
    with pytest.MonkeyPatch.context() as patch:  # it takes no latents
        patch.setattr(
            "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution.randn_tensor",
            lambda *_, **__: noise,
        )
        return pipe(image=small, **COMMON).images


def _row(text: Text, row: int) -> Text:
    return {name: value[row : row + 1] for name, value in text.items()}


CALLS: dict[str, Callable[[Any, Tensor, Tensor, Text, Restorer], Tensor]] = {
    "flux2_klein": flux2_klein,
    "flux_controlnet": flux_controlnet,
    "flux_kontext": flux_kontext,
    "ldm_sr": ldm_sr,
    "one_step": one_step,
    "qwen_image_edit": qwen,
    "qwen_image_edit_plus": qwen,
    "sd3_controlnet": sd3_controlnet,
    "sd_controlnet": sd_controlnet,
    "sd_upscale": sd_upscale,
}
