"""ReFL: one prediction at a random late step, decoded at once, L = relu(ceiling - mix).

arXiv 2304.05977: the step is drawn from the last quarter of the sampler (30..39 of 40), all rollouts of an iteration share it;
`ceiling` is 2 there, for a reward of unit variance: what is good enough teaches nothing more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch, Policies, Visit, check_options
from rlrestore.algorithms.direct import DirectAlgorithm, DirectConfig, ask
from rlrestore.diffusion.sampling import Chain


@dataclass
class ReflConfig(DirectConfig):
    begin: float = 0.75  # share of the steps before the first one that may be drawn
    ceiling: float = math.inf  # of the mix


class Refl(DirectAlgorithm):
    config: ReflConfig

    def __init__(self, config: ReflConfig):
        super().__init__(config)
        check_options(config, ("begin", 0 <= config.begin < 1, "in [0, 1)"))

    def kept_steps(self, steps: int, seed: int) -> tuple[int, ...]:
        first = min(int(self.config.begin * steps), steps - 1)
        return (first + seed % (steps - first),)

    def finish(self, policies: Policies, batch: Batch, z: Tensor, chain: Chain, index: int) -> tuple[Tensor, Visit]:
        visit = ask(policies, batch, z, chain.times[index])
        return z - chain.times[index] * visit.v, visit

    def objective(self, mix_B: Tensor) -> Tensor:
        return -mix_B if math.isinf(self.config.ceiling) else (self.config.ceiling - mix_B).clamp_min(0)
