"""Diffusion-DPO on line: the best rollouts of a group are preferred to its worst.

    inside = -(beta / 2) [(err_w - err_l) - (err_ref_w - err_ref_l)],   L = -log sigmoid(inside)

arXiv 2311.12908 (eq. 14), errors of the velocity, means over latent elements, the same t and eps for winner and loser; the N
best against the N worst with the weights inside a group of DP2O-SR (arXiv 2510.18851; its weights between groups are left
out). log 2 at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, Policies, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, ForwardConfig, Noised
from rlrestore.algorithms.objectives import dpo_loss_P
from rlrestore.algorithms.pairs import pair_rows, spread_over_groups


@dataclass
class DpoConfig(ForwardConfig):
    shared_noise: bool = True
    beta: float = 2000.0  # of mean-reduced errors; 100 to 5000 are published
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
            ("beta", config.beta > 0, "positive, e.g. 2000"),
            ("pairs", config.pairs >= 1, "at least 1"),
            ("winner_weight", config.winner_weight >= 0, "0 or positive"),
        )

    def objective(self, noised: Noised, policies: Policies, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        error_B = noised.error_B
        gain_B = noised.error_reference_B - error_B  # > 0: closer to the rollout than the start is
        pairs = pair_rows(batch, self.config.pairs)
        loss_P = dpo_loss_P(gain_B[pairs.winner_P], gain_B[pairs.loser_P], self.config.beta)
        loss_P = loss_P + self.config.winner_weight * error_B[pairs.winner_P]
        return spread_over_groups(loss_P, pairs, batch), {"implicit_reward": self.config.beta / 2 * gain_B.detach()}
