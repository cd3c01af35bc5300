"""Direct back-propagation of a differentiable mix through the last part of a rollout: what all of it shares.

The rollout is the ODE and keeps its state before the part that is trained, so training repeats nothing that was sampled.
Credit is not asked: the gradient of the mix says for every pixel what would help. It finds a reward's holes fastest of all
methods: use `regularise`, and watch metrics that are not rewarded.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlrestore.algorithms.base import Algorithm, Batch, Loss, Needs, Point, Policies, Visit, check_options
from rlrestore.diffusion.sampling import Chain
from rlrestore.restorers.colour import fixed_for_tasks


@dataclass
class DirectConfig:
    updates: int = 1  # optimiser steps an iteration


class DirectAlgorithm(Algorithm):
    config: Any
    needs = Needs(reward=True)

    def __init__(self, config: Any):
        check_options(config, ("updates", config.updates >= 1, "at least 1"))
        self.config, self.updates = config, config.updates

    @abstractmethod
    def finish(self, policies: Policies, batch: Batch, z: Tensor, chain: Chain, index: int) -> tuple[Tensor, Visit]:
        """(final latent [B, *latent] from the state z before step `index`, the last point where the policy was asked)."""

    @abstractmethod
    def objective(self, mix_B: Tensor) -> Tensor:
        """[B] to minimise."""

    def points(self, chain: Chain, seed: int) -> list[Point]:
        return [Point(chain.times[chain.window[0]], 0, seed)]

    def loss(self, policies: Policies, batch: Batch, point: Point) -> Loss:
        assert batch.trajectory is not None and policies.reward is not None
        chain = batch.trajectory.chain
        z_0, visit = self.finish(policies, batch, batch.trajectory.z_NS[:, 0], chain, chain.window[0])
        restorer = policies.restorer
        shown = fixed_for_tasks(restorer.colour_fix, restorer.decode(z_0, batch.condition), batch.tasks_B)
        mix_B = policies.reward(shown, batch.tasks_B).to(z_0.device)
        metrics = {"direct_mix": mix_B.detach(), "z0_rms": z_0.detach().square().flatten(1).mean(1).sqrt()}
        return Loss(self.objective(mix_B), metrics, {}, visit)


def ask(policies: Policies, batch: Batch, z: Tensor, t: float, recompute: bool = False) -> Visit:
    """The current policy at one time, with its gradient; `recompute` keeps no activations for the backward."""
    t_B = torch.full((len(z),), t, device=z.device)
    if not recompute:
        return Visit(z, t_B, policies.velocity(z, t_B, batch.condition), None)
    v = checkpoint(policies.velocity, z, t_B, batch.condition, use_reentrant=False)
    assert isinstance(v, Tensor)
    return Visit(z, t_B, v, None)
