"""DRaFT-K: the gradient of the mix through the last K steps of the sampler, L = -mix.

arXiv 2309.17400; K = 1 is as good as more for most rewards and the cheapest. AlignProp (arXiv 2310.03739) is the same with a random K
and `recompute`: the activations of one step only are held, for one more forward a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, Policies, Visit, check_options
from rlrestore.algorithms.direct import DirectAlgorithm, DirectConfig, ask
from rlrestore.diffusion.kernels import ode_step
from rlrestore.diffusion.sampling import Chain


@dataclass
class DraftConfig(DirectConfig):
    last: int = 1  # K; each costs a backward, and the memory of a forward
    recompute: bool = False  # each step's activations are computed again in the backward instead of kept


class Draft(DirectAlgorithm):
    config: DraftConfig

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        check_options(config, ("last", config.last >= 1, "at least 1"))

    def kept_steps(self, steps: int, seed: int) -> tuple[int, ...]:
        return (max(0, steps - self.config.last),)

    def finish(self, policies: Policies, batch: Batch, z: Tensor, chain: Chain, index: int) -> tuple[Tensor, Visit]:
        for step in range(index, chain.evaluations):
            visit = ask(policies, batch, z, chain.times[step], self.config.recompute)
            z = ode_step(z, visit.v, chain.times[step], chain.times[step + 1])
        return z, visit

    def objective(self, mix_B: Tensor) -> Tensor:
        return -mix_B
