"""REINFORCE on the recorded steps: L = -A log p(x_{t'} | x_t), the policy gradient with nothing added.

DDPO's score-function form (arXiv 2305.13301, eq. 5). One optimiser step an iteration by default: nothing holds a second one
back. The value is that of -A log(p / p_old), which is 0 on policy and has the same gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrestore.algorithms.base import Batch
from rlrestore.algorithms.trajectory import Replay, TrajectoryAlgorithm, TrajectoryConfig


@dataclass
class ReinforceConfig(TrajectoryConfig):
    updates: int = 1


class Reinforce(TrajectoryAlgorithm):
    def objective(self, replay: Replay, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return -batch.advantage_B * replay.log_ratio_B, {}
