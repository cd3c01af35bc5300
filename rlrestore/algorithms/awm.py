"""Advantage weighted matching: flow matching of the rollouts, weighted by their advantages.

    L = (A / 5) w(t, err),   err = mean_d (v - (eps - z_0))^2,   ghuber: w = (t / p) [(err + 1e-10)^p - 1e-10^p]

arXiv 2509.25050. The paper's ratio against the policy that sampled is 1 with one optimiser step an iteration, which is the only
case here; its anchors are `regularise.velocity` (to the start) and the EMA of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, Policies, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, ForwardConfig, Noised
from rlrestore.algorithms.objectives import AWM_WEIGHTS, awm_loss_N


@dataclass
class AwmConfig(ForwardConfig):
    weighting: str = "ghuber"  # uniform | t | t2 | huber | ghuber


class Awm(ForwardAlgorithm):
    config: AwmConfig
    needs = Needs()

    def __init__(self, config: AwmConfig):
        super().__init__(config)
        check_options(
            config,
            ("weighting", config.weighting in AWM_WEIGHTS, f"one of {', '.join(AWM_WEIGHTS)}"),
            ("updates", config.updates == 1, "1: the loss has no ratio that would hold a second step back"),
        )

    def objective(self, noised: Noised, policies: Policies, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return awm_loss_N(noised.v, noised.target, noised.t_B, batch.advantage_B, self.config.weighting), {}
