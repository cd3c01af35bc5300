"""GRPO-Guard: the clipped ratio without its bias, every step with the same say.

    rho_g = exp(mean_d z (mu - mu_old)),  z = (x' - mu_old) / S        L = PPO clip of rho_g / size of the step

On policy the log of the plain ratio has mean -KL < 0, so a tight clip never binds for good samples; that of rho_g has mean 0.
The division makes the gradient's size independent of S and of the step's length. arXiv 2510.22319; published for Flow-SDE
(size |dt|), here also for the kernels that re-noise (size |d mu / d v|).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch
from rlrestore.algorithms.grpo import Grpo, GrpoConfig
from rlrestore.algorithms.objectives import guard_log_ratio_N
from rlrestore.algorithms.trajectory import Replay


@dataclass
class GrpoGuardConfig(GrpoConfig):
    clip_range: float = 4e-6


class GrpoGuard(Grpo):
    def objective(self, replay: Replay, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        guarded_B = guard_log_ratio_N(replay.mean, replay.mean_old, replay.z_next, replay.std)
        loss_B, metrics = self.clipped(guarded_B, replay, batch)
        return loss_B / replay.scale, {**metrics, "guard_log_ratio": guarded_B.detach()}
