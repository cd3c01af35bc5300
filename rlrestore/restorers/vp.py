"""Pipelines with a variance-preserving (DDPM) UNet: their states and predictions are changed to ours and back here.

Sampling starts at `t_max`, where the model's schedule ends (0.936 for SD), from y ~ N(0, I); Euler in our coordinates is
DDIM with eta 0 in theirs. The schedule ends at pure x0, as DDIM with `set_alpha_to_one` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlrestore.diffusion.conversions import VariancePreserving
from rlrestore.restorers.base import Condition
from rlrestore.restorers.pipeline import PipelineRestorer
from rlrestore.restorers.prompts import Embeddings


class VpRestorer(PipelineRestorer):
    lora_part = "unet"
    lora_targets = ("to_q", "to_k", "to_v", r"to_out\.0")

    def prepare(self, networks: dict[str, Any]) -> None:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_pretrained(self.folder, subfolder="scheduler")
        self.vp = VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        self.t_max = self.vp.t_max
        # the UNet halves the latent at each level but the last
        self.patch = 2 ** (len(networks["unet"].config.block_out_channels) - 1)

    def times(self, steps: int, size: tuple[int, int]) -> list[float]:
        return self.vp.trailing_times(steps)

    def start(self, noise: Tensor, t: float, condition: Condition) -> Tensor:
        return self.vp.from_state(noise, torch.full((len(noise),), t, device=noise.device))

    @staticmethod
    def encode_text(pipeline: Any, prompt: str) -> Embeddings:
        return {"prompt_embeds": pipeline.encode_prompt(prompt, pipeline._execution_device, 1, False)[0]}
