"""GRPO on the recorded steps of a flow: clipped ratios of Gaussian transitions, group-relative advantages.

    rho = p(x_{t'} | x_t) / p_old(x_{t'} | x_t)        L = max(-A rho, -A clamp(rho, 1 - e, 1 + e)) + beta KL(p || p_ref)

Flow-GRPO, arXiv 2505.05470 (eq. 5, 6), with the sampler of CPS (arXiv 2509.05952) by default: it leaves no noise in the
result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, check_options
from rlrestore.algorithms.objectives import clip_flags_N, ppo_clip_loss_N
from rlrestore.algorithms.trajectory import Replay, TrajectoryAlgorithm, TrajectoryConfig

CLIP_LATENT_SIZE = 65536  # latent elements that `clip_range` is stated for: SD3 at 512 px


@dataclass
class GrpoConfig(TrajectoryConfig):
    # e for a latent of 65536 elements; scaled by sqrt(65536 / D) for D (Flow-GRPO-Fast's value)
    clip_range: float = 1e-5


class Grpo(TrajectoryAlgorithm):
    config: GrpoConfig

    def __init__(self, config: GrpoConfig):
        super().__init__(config)
        in_range = 0 < config.clip_range <= 0.01
        check_options(config, ("clip_range", in_range, "above 0 and at most 0.01: log-probs are means over the latent"))

    def objective(self, replay: Replay, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.clipped(replay.log_ratio_B, replay, batch)

    def clipped(self, log_ratio_B: Tensor, replay: Replay, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        clip = self.config.clip_range * math.sqrt(CLIP_LATENT_SIZE / replay.elements)
        flags = clip_flags_N(log_ratio_B, batch.advantage_B, clip, clip)
        metrics = {
            "clip_frac_high": flags.high_N, "clip_frac_low": flags.low_N, "clip_frac_blocked": flags.blocked_N,
        }  # fmt: skip
        return ppo_clip_loss_N(log_ratio_B, batch.advantage_B, clip, clip), metrics
