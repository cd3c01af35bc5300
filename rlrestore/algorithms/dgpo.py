"""Direct group preference optimisation: a Bradley-Terry loss between the good and the bad side of a whole group.

    W = sigmoid((beta / G) sum_i A_i (err_i - err_ref_i)),   L = W A err,   W without gradient

arXiv 2510.08425. At the start W = 1/2; it falls as the group is told apart, so solved groups stop pulling. All members of a
group share t and eps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, Policies, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, ForwardConfig, Noised
from rlrestore.algorithms.objectives import dgpo_loss_N


@dataclass
class DgpoConfig(ForwardConfig):
    shared_noise: bool = True
    beta: float = 100.0  # published: 10 to 100 with a frozen reference


class Dgpo(ForwardAlgorithm):
    config: DgpoConfig
    needs = Needs(reference=True, groups=True)

    def __init__(self, config: DgpoConfig):
        super().__init__(config)
        check_options(
            config,
            ("beta", config.beta > 0, "positive; published are 10 to 100"),
        )

    def objective(self, noised: Noised, policies: Policies, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        group_B = torch.tensor([row.group for row in batch.rows_B], device=noised.t_B.device)
        loss_B, weight_B = dgpo_loss_N(
            noised.error_B, noised.error_reference_B, batch.advantage_B, batch.weight_B, group_B, self.config.beta
        )
        return loss_B, {"group_weight": weight_B}
