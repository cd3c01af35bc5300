"""Policy gradients on the recorded stochastic steps of a rollout: what all of them share.

A step is a Gaussian transition N(mu, S^2); its log-probability and its KL are means over latent elements
(`diffusion.kernels`). A method is the one function `objective`, from a `Replay` and advantages to a loss.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrestore.algorithms.base import Algorithm, Batch, Loss, Needs, Point, Policies, Visit, check_options
from rlrestore.diffusion.kernels import gaussian_kl_mean, gaussian_logp_mean, log_ratio_mean
from rlrestore.diffusion.sampling import Chain


@dataclass
class TrajectoryConfig:
    kl_beta: float = 0.0  # weight of the exact KL to the frozen start, a latent element
    updates: int = 2  # optimiser steps an iteration; all but the first are off-policy


@dataclass(frozen=True)
class Replay:
    """One recorded step of B rollouts, seen by the policy that trains. Gradients flow through `mean` and `log_ratio_B`."""

    mean: Tensor  # [B, *latent] of the transition under the current policy
    mean_old: Tensor  # [B, *latent] under the policy that sampled
    z_next: Tensor  # [B, *latent] where the rollout went
    std: Tensor  # [] or [B, 1, ...] of the transition, the same for both
    log_ratio_B: Tensor  # log p / p_old
    mean_reference: Tensor | None  # [B, *latent] under the frozen start, if the method needs it
    scale: float  # size of the step: |dt| of an SDE, |d mean / d v| of cps and ddim

    @property
    def elements(self) -> int:
        """Of one latent."""
        return self.mean[0].numel()


class TrajectoryAlgorithm(Algorithm):
    config: TrajectoryConfig
    needs = Needs(trajectory=True)

    def __init__(self, config: TrajectoryConfig):
        check_options(
            config,
            ("kl_beta", config.kl_beta >= 0, "0 or positive"),
            ("updates", config.updates >= 1, "at least 1"),
        )
        self.config = config
        if config.kl_beta > 0:
            self.needs = replace(self.needs, reference=True)
        self.updates = config.updates

    @abstractmethod
    def objective(self, replay: Replay, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [B] without the KL term, metrics [B] to log)."""

    def points(self, chain: Chain, seed: int) -> list[Point]:
        return [Point(chain.times[index], position, seed) for position, index in enumerate(chain.window)]

    def loss(self, policies: Policies, batch: Batch, point: Point) -> Loss:
        trajectory = batch.trajectory
        assert trajectory is not None
        position, step = point.position, trajectory.chain.window[point.position]
        z_t, z_next = trajectory.z_NS[:, position], trajectory.z_next_NS[:, position]
        t_B = torch.full((len(z_t),), point.t, device=z_t.device)
        v = policies.velocity(z_t, t_B, batch.condition)
        gaussian = trajectory.chain.step(z_t, v, step)
        mean_old = trajectory.mean_NS[:, position]
        v_reference = mean_reference = None
        if self.needs.reference:
            v_reference = policies.reference_velocity(z_t, t_B, batch.condition)
            mean_reference = trajectory.chain.step(z_t, v_reference, step).mean
        log_ratio_B = log_ratio_mean(gaussian.mean, mean_old, z_next, gaussian.std)
        replay = Replay(
            gaussian.mean,
            mean_old,
            z_next,
            gaussian.std,
            log_ratio_B,
            mean_reference,
            trajectory.chain.step_scale(step),
        )
        loss_B, metrics = self.objective(replay, batch)
        metrics |= {
            "ratio_mean": log_ratio_B.detach().exp(),
            "kl_old": gaussian_kl_mean(gaussian.mean.detach(), mean_old, gaussian.std),
        }
        if mean_reference is not None:
            kl_B = gaussian_kl_mean(gaussian.mean, mean_reference, gaussian.std)
            loss_B = loss_B + self.config.kl_beta * kl_B
            metrics["kl_reference"] = kl_B.detach()
        logp_B = gaussian_logp_mean(z_next, gaussian.mean.detach(), gaussian.std)
        extremes = {
            "ratio_deviation_max": torch.expm1(log_ratio_B.detach()).abs(),
            "logp_deviation_max": (logp_B - trajectory.logp_NS[:, position]).abs(),
        }
        spreads = {f"ratio/step_{step}": metrics["ratio_mean"]}
        return Loss(loss_B, metrics, extremes, Visit(z_t, t_B, v, v_reference), spreads)
