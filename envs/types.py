"""The records that cross the borders between envs, rewards and the learner.

Shapes: images are `[3, H, W]` float32 RGB in [0, 1] (sRGB), on the CPU, contiguous.
This module imports nothing of ours: it is the lowest layer (`tests/test_layout.py` holds that).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Recorded:
    """A restoration of a task that exists already."""

    image: Tensor  # [3, H, W] float32 in [0, 1], rounded to 8 bits, same size as the task's lq
    score: float  # higher is better; comparable within its task


@dataclass(frozen=True)
class Task:
    """One LQ photo to restore, with what is known of it."""

    id: str  # stable and unique: same id, same bytes, e.g. "photos/coffee@128+64x0#1f3a"
    lq: Tensor  # [3, H, W] float32 in [0, 1], at the size of the wanted result
    types: tuple[str, ...]  # degradation types, e.g. ("blur", "noise", "compression"); () is unknown
    prompt: str = ""  # for text-conditioned restorers; never shown to a judge
    gt: Tensor | None = None  # [3, H, W] reference of the same size, if there is one
    record: Mapping[str, float] = field(default_factory=dict)  # what the degradation did, by name
    recorded: tuple[Recorded, ...] = ()  # taken instead of rollouts, member by member (`envs.preferences`)

    @property
    def photo(self) -> str:
        """The photo that it is a crop of: its id up to the first "@"."""
        return self.id.split("@", 1)[0]


@dataclass(frozen=True)
class Restoration:
    """One result to be judged: a task and an image made for it."""

    task: Task
    image: Tensor  # [3, H, W] float32 in [0, 1], already rounded to 8 bits, same size as task.lq
    seed: int = 0  # noise seed of the rollout that made it
