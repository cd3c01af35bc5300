"""Pipelines with a flow-matching scheduler: their prediction is our velocity, their sigmas are our times.

The schedule is the pipeline's own: linspace(1, 1/n), moved by its static or resolution-dependent shift. SD3-type pipelines
start elsewhere if they are called without sigmas (their n = 4 ends 0.858, 0.602, 0.009); FLUX and Qwen pass this list.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlrestore.restorers.pipeline import PipelineRestorer


class FlowRestorer(PipelineRestorer):
    scheduler_class = "FlowMatchEulerDiscreteScheduler"

    def prepare(self, networks: dict[str, Any]) -> None:
        import diffusers

        self.scheduler = getattr(diffusers, self.scheduler_class).from_pretrained(self.folder, subfolder="scheduler")

    def times(self, steps: int, size: tuple[int, int]) -> list[float]:
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        tokens = (height // self.multiple) * (width // self.multiple)
        shifted = {"mu": self.shift_of(tokens, steps)} if self.scheduler.config.use_dynamic_shifting else {}
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shifted)
        return self.scheduler.sigmas.tolist()

    def shift_of(self, tokens: int, steps: int) -> float:
        """mu, linear in the number of tokens of the generated image: `calculate_shift` of the pipelines."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        known = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        given = {key: self.scheduler.config[key] for key in known if self.scheduler.config.get(key) is not None}
        return calculate_shift(tokens, **{key.replace("image_seq_len", "seq_len"): v for key, v in given.items()})
