"""Advantage weighted matching: flow matching of the rollouts, weighted by their advantages.

    l = -w(t, err),  err = mean_d (v - (eps - z_0))^2,  rho = exp(l - l_old)
    L = max(-A/5 rho, -A/5 clamp(rho, 1 - e, 1 + e)) + old_beta mean_d (v - v_old)^2

arXiv 2509.25050. With one optimiser step an iteration and `old_beta: 0` no old policy is kept: rho is 1 and the gradient is that of
A/5 w(t, err). The paper's anchor to the start is `regularise.velocity`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, Noised, OldPolicyConfig
from rlrestore.algorithms.objectives import AWM_WEIGHTS, awm_loss_N, awm_weighted_N, velocity_mse_N


@dataclass
class AwmConfig(OldPolicyConfig):
    weighting: str = "ghuber"  # uniform | t | t2 | huber | ghuber
    clip_range: float = (
        1.0  # e; 1 never blocks a bad sample, published with old_beta 1; 1e-5 goes with an old_beta of 0.1
    )
    old_beta: float = 1.0  # of mean_d (v - v_old)^2; 0 for none
    old_decay: int = 3


class Awm(ForwardAlgorithm):
    config: AwmConfig
    needs = Needs()

    def __init__(self, config: AwmConfig):
        super().__init__(config)
        check_options(
            config,
            ("weighting", config.weighting in AWM_WEIGHTS, f"one of {', '.join(AWM_WEIGHTS)}"),
            ("clip_range", 0 < config.clip_range <= 1, "above 0 and at most 1"),
            ("old_beta", config.old_beta >= 0, "0 or positive"),
        )
        if config.updates > 1 or config.old_beta > 0:
            self.needs = replace(self.needs, old_policy=True)

    def objective(self, noised: Noised, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        weighted_B, weighted_old_B = (
            awm_weighted_N(error_B, noised.t_B, self.config.weighting)
            for error_B in (noised.error_B, noised.error_old_B)
        )
        loss_B = awm_loss_N(weighted_B, weighted_old_B, batch.advantage_B, self.config.clip_range)
        if self.config.old_beta > 0:
            assert noised.v_old is not None
            loss_B = loss_B + self.config.old_beta * velocity_mse_N(noised.v, noised.v_old)
        return loss_B.to(noised.v.dtype), {}
