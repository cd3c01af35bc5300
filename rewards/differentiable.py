"""The mix of a rubric as a function with a gradient, for algorithms that climb it directly instead of sampling around it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from envs.types import Restoration, Task
from rewards.base import ImageReward, Reward
from rewards.rubric import Rubric, TermConfig


class DifferentiableMix:
    """Weighted sum of utilities, `mix_N` of the rubric, of images that were not rounded to 8 bits.

    Every term is an `ImageReward` whose spec says `differentiable`; ValueError names those that are not.
    """

    def __init__(
        self,
        terms: Sequence[TermConfig],
        rewards: Sequence[Reward],
        by_chance: bool = False,
        block_mass: Mapping[str, float] | None = None,
    ):
        """`by_chance`, a control: the mix of every task is multiplied by 1 or -1, which its id decides."""
        self.rubric, self.by_chance = Rubric(terms, block_mass), by_chance
        if blind := not_differentiable(self.rubric):
            raise ValueError(f"{', '.join(blind)} cannot be differentiated")
        self.rewards: list[ImageReward] = []
        for name, reward in zip(self.rubric.names, rewards, strict=True):
            if not isinstance(reward, ImageReward):
                raise ValueError(f"{name} says that it can be differentiated and has no `measure`")
            self.rewards.append(reward)

    def __call__(self, image_BCHW: Tensor, tasks_B: Sequence[Task]) -> Tensor:
        """[B] on the CPU, higher is better; gradients flow to images `[B, 3, H, W]` in [0, 1] wherever they are."""
        items = [Restoration(task, image) for task, image in zip(tasks_B, image_BCHW.cpu(), strict=True)]
        factor_R = self.rubric.weight_R * self.rubric.sign_R / self.rubric.scale_R
        terms = zip(factor_R.tolist(), self.rewards, strict=True)
        mix_B = sum((factor * reward.measure(items) for factor, reward in terms), image_BCHW.new_zeros(()).cpu())
        if self.by_chance:
            coins = [hashlib.sha256(task.id.encode()).digest()[0] % 2 for task in tasks_B]
            mix_B = mix_B * torch.tensor([2.0 * coin - 1 for coin in coins])
        return mix_B


def not_differentiable(rubric: Rubric) -> list[str]:
    """Names of the terms that move the mix and have no gradient."""
    return [name for name, spec in zip(rubric.names, rubric.specs, strict=True) if not spec.differentiable]
