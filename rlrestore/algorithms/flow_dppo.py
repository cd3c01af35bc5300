"""Flow-DPPO: a trust region in the exact KL instead of a clip of the ratio.

    L = -A rho, dropped where KL(p_old, p) >= delta and the step would lead further away

Moves back toward the policy that sampled are never blocked. arXiv 2606.11025 (eq. 12-14).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, check_options
from rlrestore.algorithms.objectives import dppo_loss_N
from rlrestore.algorithms.trajectory import Replay, TrajectoryAlgorithm, TrajectoryConfig
from rlrestore.diffusion.kernels import gaussian_kl_mean


@dataclass
class FlowDppoConfig(TrajectoryConfig):
    delta: float = 1e-6  # KL a latent element; the paper finds 1e-5 less stable, 1e-7 slow


class FlowDppo(TrajectoryAlgorithm):
    config: FlowDppoConfig

    def __init__(self, config: FlowDppoConfig):
        super().__init__(config)
        check_options(config, ("delta", config.delta > 0, "positive, e.g. 1e-6"))

    def objective(self, replay: Replay, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        kl_B = gaussian_kl_mean(replay.mean.detach(), replay.mean_old, replay.std)
        loss_B, dropped_B = dppo_loss_N(replay.log_ratio_B, kl_B, batch.advantage_B, self.config.delta)
        return loss_B, {"trust_region_dropped": dropped_B}
