"""Rollouts that are sampled while the trainer still works on earlier ones, and what makes training on them right.

With `asynchrony.ahead: n` (placement `separate`) the rollouts of iteration i + n are submitted before iteration i is trained on,
so samplers and trainers work at the same time. Rollouts then lag n versions behind the weights that are trained on them: always, not
depending on who was fast, so a run repeats itself bit for bit.

Trajectory methods are corrected for it in two parts, as decoupled PPO does (arXiv 2505.24298, eq. 5). The anchor of their
ratio becomes the policy that begins to train (its means replace the behaviour's, so the first ratio is 1 again); and every rollout is
weighted by how much likelier that policy makes its recorded steps than the one that sampled, truncated (V-trace's rho-bar, arXiv
1802.01561), or dropped where that is too far from 1. Forward-process methods have no likelihood: their rollouts are used as they
are, within the bound.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from envs.base import Env
from envs.types import Task
from rlrestore.algorithms.base import Algorithm
from rlrestore.config.sections import AsynchronyConfig, TrainConfig
from rlrestore.crew import Crew, Flight, Scored
from rlrestore.diffusion.sampling import Chain
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.curriculum import Curriculum
from rlrestore.iteration.stages import make_chunks, rollout_chain
from rlrestore.types import Chunk


@dataclass(frozen=True)
class Draft:
    """What an iteration samples."""

    iteration: int
    tasks: list[Task]
    chain: Chain
    chunks: list[Chunk]


class Pipeline:
    """Draws iterations and samples them, `ahead` of the one that is trained; 0 samples each when it is asked for, on policy."""

    def __init__(self, config: TrainConfig, env: Env, curriculum: Curriculum, crew: Crew, algorithm: Algorithm):
        self.config, self.env, self.curriculum, self.crew, self.algorithm = config, env, curriculum, crew, algorithm
        self.flying: deque[tuple[Draft, Flight]] = deque()

    def draw(self, iteration: int) -> Draft:
        rollout, seed = self.config.rollout, self.config.run.seed
        tasks = self.curriculum.draw(self.env, iteration, rollout.groups)
        chain = rollout_chain(self.config.sampling, seed, iteration, self.algorithm)
        temperature = self.config.sampling.temperature
        chunks = make_chunks(tasks, rollout.samples, rollout.batch, seed, iteration, temperature=temperature)
        return Draft(iteration, tasks, chain, chunks)

    def take(self, iteration: int) -> tuple[Draft, list[Scored]]:
        """The rollouts of `iteration`, sampled and scored: the next ones in flight, or new ones."""
        if not self.flying:
            draft = self.draw(iteration)
            return draft, list(self.crew.roll_out(draft.chunks, draft.chain))
        draft, flight = self.flying.popleft()
        assert draft.iteration == iteration, "rollouts are taken in the order in which they were submitted"
        return draft, self.crew.collect(flight)

    def look_ahead(self, iteration: int) -> None:
        """Submit what is due before the update of `iteration`."""
        following = self.flying[-1][0].iteration + 1 if self.flying else iteration + 1
        for coming in range(following, min(iteration + self.config.asynchrony.ahead, self.config.run.steps - 1) + 1):
            self.submit(coming)

    def submit(self, iteration: int) -> None:
        draft = self.draw(iteration)
        self.flying.append((draft, self.crew.submit(draft.chunks, draft.chain)))

    def state_dict(self) -> list[tuple[int, int]]:
        """(iteration, version of the weights that sample it) of what is in flight."""
        return [(draft.iteration, flight.version) for draft, flight in self.flying]


def correct(credit: Credit, importance_N: Tensor | None, config: AsynchronyConfig) -> Credit:
    """Weights times truncated importance, 0 where it is outside [1 / drop, drop]; None is on policy and changes nothing."""
    if importance_N is None:
        return credit
    kept_N = (importance_N <= config.drop) & (importance_N >= 1 / config.drop)
    mine_N = credit.weight_N > 0
    weight_N = torch.where(kept_N, credit.weight_N * importance_N.clamp(max=config.truncate), torch.zeros(()))
    count = max(1, int(mine_N.sum()))
    stats = {
        "importance_mean": float(importance_N[mine_N].mean()) if bool(mine_N.any()) else 1.0,
        "importance_truncated_frac": float((kept_N & mine_N & (importance_N > config.truncate)).sum()) / count,
        "importance_dropped_frac": float((~kept_N & mine_N).sum()) / count,
    }
    advantage_N = torch.where(weight_N > 0, credit.advantage_N, torch.zeros(()))
    return replace(credit, advantage_N=advantage_N, weight_N=weight_N, stats={**credit.stats, **stats})
