"""Stale rollouts seen by the policy that is going to train on them: a new anchor for their ratios, and their importance.

Pure functions of a micro-batch; `asynchrony.py` says why, `Learner.reanchor` calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlrestore.algorithms.base import Policies
from rlrestore.diffusion.kernels import gaussian_logp_mean, log_ratio_mean
from rlrestore.diffusion.sampling import Trajectory
from rlrestore.restorers.base import Condition


@torch.no_grad()
def reanchor(policies: Policies, trajectory: Trajectory, condition: Condition) -> tuple[Trajectory, Tensor]:
    """The same transitions with the current policy as their anchor, and [B, S] log p_current / p_behaviour a latent element."""
    means, logps, ratios = [], [], []
    for position, index in enumerate(trajectory.chain.window):
        z_t, z_next = trajectory.z_NS[:, position], trajectory.z_next_NS[:, position]
        t_B = torch.full((len(z_t),), trajectory.chain.times[index], device=z_t.device)
        v = policies.restorer.velocity(z_t, t_B, condition, policies.current)
        gaussian = trajectory.chain.step(z_t, v, index)
        ratios.append(log_ratio_mean(gaussian.mean, trajectory.mean_NS[:, position], z_next, gaussian.std))
        means.append(gaussian.mean)
        logps.append(gaussian_logp_mean(z_next, gaussian.mean, gaussian.std))
    anchored = replace(trajectory, mean_NS=torch.stack(means, 1), logp_NS=torch.stack(logps, 1))
    return anchored, torch.stack(ratios, 1)


def importance(log_ratio_BS: Tensor, elements: int) -> Tensor:
    """[B] likelihood ratio of a recorded step, the geometric mean over the S steps. `elements` of one latent: nats, not means."""
    return (log_ratio_BS.double() * elements).mean(1).exp().float()


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """Rows of all parts, which share a chain."""

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Trajectory(parts[0].chain, cat("z_NS"), cat("z_next_NS"), cat("mean_NS"), cat("logp_NS"))
