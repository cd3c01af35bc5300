"""D3PO: preference between the best and the worst rollouts of a group, step by step.

    L = -log sigmoid( b [ log clamp(rho_w, 1 - e, 1 + e) - log clamp(rho_l, 1 - e, 1 + e) ] ),   rho = p / p_ref

arXiv 2311.13231 (eq. 15). Ratios are of mean-reduced log-probs, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, check_options
from rlrestore.algorithms.objectives import d3po_loss_P
from rlrestore.algorithms.pairs import pair_rows, spread_over_groups
from rlrestore.algorithms.trajectory import Replay, TrajectoryAlgorithm, TrajectoryConfig
from rlrestore.diffusion.kernels import log_ratio_mean


@dataclass
class D3poConfig(TrajectoryConfig):
    updates: int = 1
    beta: float = 0.1
    clip_range: float = 0.1
    pairs: int = 1  # the N best of a group against its N worst


class D3po(TrajectoryAlgorithm):
    config: D3poConfig
    needs = Needs(trajectory=True, reference=True, groups=True)

    def __init__(self, config: D3poConfig):
        super().__init__(config)
        check_options(
            config,
            ("beta", config.beta > 0, "positive, e.g. 0.1"),
            ("clip_range", 0 < config.clip_range < 1, "between 0 and 1"),
            ("pairs", config.pairs >= 1, "at least 1"),
        )

    def objective(self, replay: Replay, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert replay.mean_reference is not None
        log_rho_B = log_ratio_mean(replay.mean, replay.mean_reference, replay.z_next, replay.std)
        pairs = pair_rows(batch, self.config.pairs)
        loss_P = d3po_loss_P(
            log_rho_B[pairs.winner_P], log_rho_B[pairs.loser_P], self.config.beta, self.config.clip_range
        )
        return spread_over_groups(loss_P, pairs, batch), {}
