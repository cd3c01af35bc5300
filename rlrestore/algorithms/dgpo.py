"""Direct group preference optimisation: a Bradley-Terry loss between the good and the bad side of a whole group.

    W = sigmoid((beta / G) sum_i A_i (err_i - err_ref_i)),   L = W A err,   W without gradient

arXiv 2510.08425. At the start W = 1/2; it falls as the group is told apart, so solved groups stop pulling. All members of a
group share t and eps. A member whose error has moved from the old policy's by more than `clip_range` in its own direction is
held there. The paper's KL to the start is `regularise.velocity`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, Noised, OldPolicyConfig
from rlrestore.algorithms.objectives import dgpo_clipped_N, dgpo_loss_N


@dataclass
class DgpoConfig(OldPolicyConfig):
    shared_noise: bool = True
    beta: float = 100.0  # published: 10 to 100 with a frozen reference
    clip_range: float = 1e-2  # e; 0: none, and no old policy. Published: 1e-3 to 1e-2, or 1e-5 to 1e-4 without guidance
    old_decay: int = 3


class Dgpo(ForwardAlgorithm):
    config: DgpoConfig
    needs = Needs(reference=True, groups=True)

    def __init__(self, config: DgpoConfig):
        super().__init__(config)
        check_options(
            config,
            ("beta", config.beta > 0, "positive; published are 10 to 100"),
            ("clip_range", 0 <= config.clip_range < 1, "in [0, 1)"),
        )
        if config.clip_range > 0:
            self.needs = replace(self.needs, old_policy=True)

    def objective(self, noised: Noised, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        error_B, metrics = noised.error_B, {}
        if self.config.clip_range > 0:
            held_B = dgpo_clipped_N(error_B, noised.error_old_B, batch.advantage_B, self.config.clip_range)
            error_B = torch.where(held_B, error_B.detach(), error_B)
            metrics["clip_frac_blocked"] = held_B.float()
        group_B = torch.tensor([row.group for row in batch.rows_B], device=noised.t_B.device)
        loss_B, weight_B = dgpo_loss_N(
            error_B, noised.error_reference_B, batch.advantage_B, batch.weight_B, group_B, self.config.beta
        )
        return loss_B, {**metrics, "group_weight": weight_B}
