"""What an algorithm is: how it turns rollouts and their credit into a loss. The learner is blind to which one it runs.

An algorithm says what it needs, which points of a rollout it trains on (steps of the recorded chain, or times of the
forward process), and gives the loss of one micro-batch at one point. It owns no network, no optimiser and no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from envs.types import Task
from rlrestore.diffusion.sampling import Chain, Trajectory
from rlrestore.restorers.base import Condition, Restorer
from rlrestore.types import Row


@dataclass(frozen=True)
class Needs:
    trajectory: bool = False  # stochastic steps recorded by the rollout (a sampler other than "ode")
    old_policy: bool = False  # a slow copy that also makes the rollouts
    reference: bool = False  # the frozen start
    groups: bool = False  # all rollouts of a photo in one micro-batch
    reward: bool = False  # the mix as a function with a gradient


@dataclass(frozen=True)
class Point:
    """Where on its way between noise and image a sample is trained."""

    t: float  # time in (0, 1]
    position: int  # index into the recorded window; -1 for the forward process
    seed: int  # of noise that training draws


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the same rows that were sampled together, so that a replay repeats the rollout's arithmetic."""

    condition: Condition  # B rows
    z_0: Tensor  # [B, *latent] float32, the rollouts' final latents
    trajectory: Trajectory | None  # B rows
    advantage_B: Tensor  # [B] float32
    weight_B: Tensor  # [B] float32, 0 for rows without credit
    rows_B: tuple[Row, ...]  # which group and member each row is
    tasks_B: tuple[Task, ...]  # what each row restores


@dataclass(frozen=True)
class Visit:
    """Where the current policy was asked, and what it said: regularisers work on this."""

    z_t: Tensor  # [B, *latent] float32
    t_B: Tensor  # [B] float32
    v: Tensor  # [B, *latent] float32, with its gradient
    v_reference: Tensor | None  # [B, *latent] what the frozen start says there, if the algorithm asked it


@dataclass(frozen=True)
class Loss:
    value_B: Tensor  # [B] the loss a sample, before masks and means
    metrics: dict[str, Tensor]  # name -> [B] detached, averaged over kept samples by the learner
    extremes: dict[str, Tensor]  # name -> [B] detached, of which the learner takes the maximum over kept samples
    visit: Visit
    spreads: dict[str, Tensor] = field(
        default_factory=dict
    )  # name -> [B] detached, logged as a histogram a step of the chain


@dataclass(frozen=True)
class Policies:
    """The networks a loss may ask, all through the restorer's one convention."""

    restorer: Restorer
    current: nn.Module
    old: nn.Module | None = None
    reference: nn.Module | None = None
    reward: Callable[[Tensor, Sequence[Task]], Tensor] | None = None  # images [B, 3, H, W] and their tasks -> mix [B]
    rows: Counter[str] = field(default_factory=Counter)  # evaluated so far, by network

    def velocity(self, z_t: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        self.rows["current"] += len(z_t)
        return self.restorer.velocity(z_t, t_B, condition, self.current)

    @torch.no_grad()
    def old_velocity(self, z_t: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        assert self.old is not None, "the algorithm uses an old policy that its Needs do not declare"
        self.rows["old"] += len(z_t)
        return self.restorer.velocity(z_t, t_B, condition, self.old)

    @torch.no_grad()
    def reference_velocity(self, z_t: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        assert self.reference is not None, "the algorithm uses a reference that its Needs do not declare"
        self.rows["reference"] += len(z_t)
        return self.restorer.velocity(z_t, t_B, condition, self.reference)


def check_options(config: Any, *rules: tuple[str, bool, str]) -> None:
    """ValueError for the first (key, whether it is good, what is wanted) that is not good."""
    for key, good, wanted in rules:
        if not good:
            raise ValueError(f"algorithm.{key}={getattr(config, key)} must be {wanted}")


class Algorithm(ABC):
    needs: Needs
    updates: int = 1  # optimiser steps an iteration; the iteration's micro-batches are dealt out to them

    def kept_steps(self, steps: int, seed: int) -> tuple[int, ...]:
        """Deterministic steps before which a rollout keeps its state; only asked for without `needs.trajectory`."""
        return ()

    @abstractmethod
    def points(self, chain: Chain, seed: int) -> list[Point]:
        """Where to train in this iteration: the same list on every rank, a function of the chain and the seed."""

    @abstractmethod
    def loss(self, policies: Policies, batch: Batch, point: Point) -> Loss:
        """Loss of one micro-batch at one point; gradients flow through `policies.velocity` only."""

    def old_decay(self, optimiser_steps: int) -> float:
        """d of old <- d old + (1 - d) current after an iteration; only asked for when `needs.old_policy`."""
        raise NotImplementedError
