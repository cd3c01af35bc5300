"""Which photos to train on: more often those whose rollouts still differ in reward, rarely those on which all are alike.

A group whose members score alike teaches nothing. Of `candidates` x G tasks that the env draws, G are kept by chance, with weights in
proportion to the spread that their photo's groups had before; photos not seen yet weigh as much as the average. Off with
`candidates: 1`. The spread of the past is part of a checkpoint. (Edit-R1 and OARS drop solved photos for good; here they
stay possible, because a policy may lose what it had.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from envs.base import Env
from envs.types import Task
from rewards.rubric import RubricScores
from rlrestore.config.sections import CurriculumConfig
from rlrestore.seeds import derive_seed


class Curriculum:
    def __init__(self, config: CurriculumConfig, seed: int):
        self.config, self.seed = config, seed
        self.spread: dict[str, float] = {}  # photo -> running mean of the in-group std of the mix

    def draw(self, env: Env, iteration: int, groups: int) -> list[Task]:
        """G tasks of an iteration, a function of the env, the seed and what was learnt so far."""
        tasks = list(env.draw(iteration, groups * self.config.candidates))
        if len(tasks) == groups:
            return tasks
        weight = torch.tensor([self._weight(task) for task in tasks], dtype=torch.float64)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "curriculum", iteration))
        chosen = torch.multinomial(weight, groups, replacement=False, generator=generator)
        return [tasks[index] for index in sorted(chosen.tolist())]

    def learn(self, tasks: Sequence[Task], scores: RubricScores, groups: Collection[int] | None = None) -> None:
        """Remember how much the members of each group, or of these `groups`, differed."""
        if self.config.candidates == 1:
            return
        mix_GK, valid_GK = scores.mix_N.reshape(len(tasks), -1), scores.valid_N.reshape(len(tasks), -1)
        for group, (task, mix, valid) in enumerate(zip(tasks, mix_GK, valid_GK, strict=True)):
            if int(valid.sum()) < 2 or (groups is not None and group not in groups):
                continue
            now = float(mix[valid].double().std(correction=0))
            past = self.spread.get(task.photo, now)
            self.spread[task.photo] = self.config.memory * past + (1 - self.config.memory) * now

    def metrics(self, tasks: Sequence[Task]) -> dict[str, float]:
        if self.config.candidates == 1:
            return {}
        return {
            "curriculum/photos_known": float(len(self.spread)),
            "curriculum/weight_mean": math.fsum(self._weight(task) for task in tasks) / len(tasks),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"spread": self.spread}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.spread = dict(state["spread"])

    def _weight(self, task: Task) -> float:
        """Spread of its photo over the average photo's, at least `floor`; 1 for a photo not seen yet."""
        average = math.fsum(self.spread.values()) / max(1, len(self.spread))  # whatever their order: files sort it
        if task.photo not in self.spread or average == 0:
            return 1.0
        return max(self.config.floor, self.spread[task.photo] / average)
