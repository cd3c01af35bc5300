"""Rewards that fail on purpose, for chaos tests; not in the registry.

Which rollouts fail is a pure function of (task id, seed), so the same ones fail in every process and on every retry.
A good row scores the mean brightness of the image.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec


@dataclass(frozen=True)
class FaultyParams:
    mode: Literal["nan", "raises", "hangs"] = "nan"
    rate: float = 0.1  # share of the rollouts that fail
    seconds: float = 3600.0  # how long a hanging one sleeps
    salt: str = ""  # another set of failing rollouts


def fails(item: Restoration, rate: float, salt: str = "") -> bool:
    """True for about `rate` of all (task id, seed)."""
    digest = hashlib.sha256(f"{salt}|{item.task.id}|{item.seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < rate


class FaultyReward(ImageReward):
    params: FaultyParams

    @classmethod
    def spec_for(cls, params: FaultyParams) -> RewardSpec:
        return RewardSpec(
            name=f"faulty_{params.mode}",
            version="1",
            higher_is_better=True,
            range=(0.0, 1.0),
            needs=frozenset(),
            block="quality",
            scale=0.1,
            differentiable=False,
            deterministic=True,
            licence="own code",
        )

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        bad = [fails(item, self.params.rate, self.params.salt) for item in items]
        if any(bad) and self.params.mode == "raises":
            raise RuntimeError("faulty reward: asked to raise")
        if any(bad) and self.params.mode == "hangs":
            time.sleep(self.params.seconds)
        return torch.tensor(
            [
                math.nan if b and self.params.mode == "nan" else float(i.image.mean())
                for b, i in zip(bad, items, strict=True)
            ]
        )


FAULTY: dict[str, tuple[type, type[FaultyReward]]] = {"faulty": (FaultyParams, FaultyReward)}
