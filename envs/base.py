"""What every env offers. An env is a source of tasks; it holds no model and gives no score.

Draws are pure functions of (config, step, position): nothing is iterated, so a resumed run needs only its step number,
and a worker that draws positions 4..7 gets what a single process would have got there.
"""

from __future__ import annotations

from typing import Protocol

from envs.types import Task


class Env(Protocol):
    """One source of tasks; `envs.check.check_env` holds every env to what is written here."""

    name: str  # key in ENVS, and the first part of each task's id
    has_gt: bool  # whether every task carries a reference

    def draw(self, step: int, n: int) -> list[Task]:
        """The first n training tasks of this step; a longer draw begins with the same tasks."""
        ...

    def held_out(self, n: int) -> list[Task]:
        """The first n evaluation tasks: the same at every call and for every seed, from photos that `draw` never
        uses.
        """
        ...

    def fingerprint(self) -> str:
        """sha256 (hex) over what defines the data: config, file names and contents. Equal means equal tasks."""
        ...
