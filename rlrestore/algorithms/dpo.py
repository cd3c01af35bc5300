"""Diffusion-DPO: the best rollouts of a group are preferred to its worst.

    inside = -(beta / 2) [(err_w - err_l) - (err_ref_w - err_ref_l)],   L = -log sigmoid(inside)

arXiv 2311.12908 (eq. 14), means over latent elements, the same t and eps for winner and loser, errors of the velocity or of epsilon
(that of the same network: (1 - t)^2 times it). The N best against the N worst with DP2O-SR's weights inside a group (arXiv
2510.18851; those between groups are `credit.between: spread`). log 2 at the start. Off line the group is what a manifest has
recorded (`env.kind: preferences`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, ForwardConfig, Noised
from rlrestore.algorithms.objectives import dpo_loss_P
from rlrestore.algorithms.pairs import pair_rows, spread_over_groups


@dataclass
class DpoConfig(ForwardConfig):
    shared_noise: bool = True
    error: str = "velocity"  # velocity | epsilon: whose errors are compared
    beta: float = 2000.0  # of mean-reduced errors; 100 to 2000 are published for velocity, 5000 for epsilon
    # the N best of a group against its N worst: N^2 pairs; DP2O-SR: a quarter of the group for small models
    pairs: int = 2
    winner_weight: float = 0.0  # of plain flow matching on the winners, against both errors rising together


class Dpo(ForwardAlgorithm):
    config: DpoConfig
    needs = Needs(reference=True, groups=True)

    def __init__(self, config: DpoConfig):
        super().__init__(config)
        check_options(
            config,
            ("error", config.error in ("velocity", "epsilon"), "velocity or epsilon"),
            ("beta", config.beta > 0, "positive, e.g. 2000"),
            ("pairs", config.pairs >= 1, "at least 1"),
            ("winner_weight", config.winner_weight >= 0, "0 or positive"),
        )

    def objective(self, noised: Noised, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # eps_hat = z_t + (1 - t) v, in flow and in variance-preserving coordinates alike
        unit_B = (1 - noised.t_B).square() if self.config.error == "epsilon" else torch.ones_like(noised.t_B)
        error_B = unit_B * noised.error_B
        gain_B = unit_B * noised.error_reference_B - error_B  # > 0: closer to the rollout than the start is
        pairs = pair_rows(batch, self.config.pairs)
        loss_P = dpo_loss_P(gain_B[pairs.winner_P], gain_B[pairs.loser_P], self.config.beta)
        loss_P = loss_P + self.config.winner_weight * error_B[pairs.winner_P]
        return spread_over_groups(loss_P, pairs, batch), {"implicit_reward": self.config.beta / 2 * gain_B.detach()}
