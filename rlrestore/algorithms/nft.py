"""DiffusionNFT, arXiv 2509.16117: policy improvement on the forward process, without log-probabilities.

The velocity is pulled toward the flow-matching target of good samples and pushed from that of bad ones, through the implicit
positive and negative policies v+- = (1 -+ b) v_old +- b v (eq. 5). The old policy follows slowly and makes the rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, Policies, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, ForwardConfig, Noised
from rlrestore.algorithms.objectives import nft_loss_N, nft_old_decay, velocity_mse_N


@dataclass
class NftConfig(ForwardConfig):
    beta: float = 1.0  # b
    old_decay: int = 1  # 0 hard copy | 1 ramp to 0.5 by 0.001 a step | 2 delayed ramp to 0.999
    adaptive: bool = True  # the paper's self-normalising weights


class Nft(ForwardAlgorithm):
    config: NftConfig
    needs = Needs(old_policy=True)

    def __init__(self, config: NftConfig):
        super().__init__(config)
        check_options(
            config,
            ("beta", config.beta > 0, "positive; published values are 1 and 0.1 (smaller is bolder)"),
            ("old_decay", config.old_decay in (0, 1, 2), "0 (hard copy), 1 (to 0.5) or 2 (to 0.999)"),
        )

    def objective(self, noised: Noised, policies: Policies, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        v_old = policies.old_velocity(noised.z_t, noised.t_B, batch.condition)
        loss_B = nft_loss_N(
            noised.v,
            v_old,
            noised.z_t,
            batch.z_0,
            noised.t_B,
            batch.advantage_B,
            self.config.beta,
            self.config.adaptive,
        )
        return loss_B, {"old_deviate": velocity_mse_N(noised.v.detach(), v_old)}

    def old_decay(self, optimiser_steps: int) -> float:
        return nft_old_decay(self.config.old_decay, optimiser_steps)
