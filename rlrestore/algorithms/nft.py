"""DiffusionNFT, arXiv 2509.16117: policy improvement on the forward process, without log-probabilities.

The velocity is pulled toward the flow-matching target of good samples and pushed from that of bad ones, through the implicit
positive and negative policies v+- = (1 -+ b) v_old +- b v (eq. 5). The old policy follows slowly and makes the rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, Needs, check_options
from rlrestore.algorithms.forward import ForwardAlgorithm, Noised, OldPolicyConfig
from rlrestore.algorithms.objectives import nft_loss_N


@dataclass
class NftConfig(OldPolicyConfig):
    beta: float = 1.0  # b
    adaptive: bool = True  # the paper's self-normalising weights


class Nft(ForwardAlgorithm):
    config: NftConfig
    needs = Needs(old_policy=True)

    def __init__(self, config: NftConfig):
        super().__init__(config)
        wanted = "positive; published values are 1 and 0.1 (smaller is bolder)"
        check_options(config, ("beta", config.beta > 0, wanted))

    def objective(self, noised: Noised, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert noised.v_old is not None
        loss_B = nft_loss_N(
            noised.v, noised.v_old, noised.z_t, batch.z_0, noised.t_B, batch.advantage_B, self.config.beta, self.config.adaptive
        )  # fmt: skip
        return loss_B, {}
