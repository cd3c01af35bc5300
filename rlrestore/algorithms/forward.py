"""Forward-process methods: what all of them share. They need final images only, from any sampler.

A rollout's z_0 is noised again to a time t, and the velocity there is trained toward or away from eps - z_0. A method is the
one function `objective`, from a `Noised` and advantages to a loss.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrestore.algorithms.base import Algorithm, Batch, Loss, Point, Policies, Visit, check_options
from rlrestore.algorithms.objectives import OLD_DECAYS, old_policy_decay, velocity_mse_N
from rlrestore.diffusion.sampling import Chain, seeded_noise
from rlrestore.seeds import derive_seed


@dataclass
class ForwardConfig:
    times: int = 4  # points of the forward process a sample is trained at, stratified over t_range
    t_range: tuple[float, float] = (0.1, 1.0)  # high times move the composition, low ones texture and noise
    # One eps for all members of a group at a time: advantages sum to 0, so what it adds to every member cancels (as DGPO,
    # arXiv 2510.08425, does; the other papers draw one for each).
    shared_noise: bool = False
    updates: int = 1  # optimiser steps an iteration


@dataclass
class OldPolicyConfig(ForwardConfig):
    # The old policy follows by d old + (1 - d) current; n counts optimiser steps. 0: d = 0, a hard copy; 1: min(0.001 n, 0.5);
    # 2: 0 up to 75 steps, then min(0.0075 (n - 75), 0.999); 3: min(0.001 n, 0.3)
    old_decay: int = 1


@dataclass(frozen=True)
class Noised:
    """B rollouts on their way back to noise, and what the current policy says there."""

    z_t: Tensor  # [B, *latent]
    t_B: Tensor  # [B]
    target: Tensor  # [B, *latent] eps - z_0
    v: Tensor  # [B, *latent] with its gradient
    v_reference: Tensor | None  # [B, *latent] of the frozen start, if the method needs it
    v_old: Tensor | None  # [B, *latent] of the old policy, which made the rollouts, if the method keeps one

    @property
    def error_B(self) -> Tensor:
        """[B] matching error of the current policy, with its gradient."""
        return velocity_mse_N(self.v, self.target)

    @property
    def error_reference_B(self) -> Tensor:
        """[B] matching error of the frozen start."""
        assert self.v_reference is not None, "the method uses a reference that its Needs do not declare"
        return velocity_mse_N(self.v_reference, self.target)

    @property
    def error_old_B(self) -> Tensor:
        """[B] matching error of the policy that made the rollouts; of the current one where no step was taken since."""
        return velocity_mse_N(self.v.detach() if self.v_old is None else self.v_old, self.target)


class ForwardAlgorithm(Algorithm):
    config: ForwardConfig

    def __init__(self, config: ForwardConfig):
        check_options(
            config,
            ("times", config.times >= 1, "at least 1"),
            ("t_range", 0 < config.t_range[0] < config.t_range[1] <= 1, "two times in (0, 1], the smaller first"),
            ("updates", config.updates >= 1, "at least 1"),
            (
                "shared_noise",
                config.shared_noise or not self.needs.groups,
                "true: members are compared at the same t and eps",
            ),
        )
        if isinstance(config, OldPolicyConfig):
            wanted = "0 (hard copy), 1 (to 0.5), 2 (to 0.999) or 3 (to 0.3)"
            check_options(config, ("old_decay", config.old_decay in OLD_DECAYS, wanted))
        self.config = config
        self.updates = config.updates

    @abstractmethod
    def objective(self, noised: Noised, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [B], metrics [B] to log)."""

    def old_decay(self, optimiser_steps: int) -> float:
        assert isinstance(self.config, OldPolicyConfig)
        return old_policy_decay(self.config.old_decay, optimiser_steps)

    def points(self, chain: Chain, seed: int) -> list[Point]:
        generator = torch.Generator().manual_seed(seed)
        count, (low, high) = self.config.times, self.config.t_range
        offsets = torch.rand(count, generator=generator, dtype=torch.float64)
        times = low + (high - low) * (torch.arange(count) + offsets) / count
        return [Point(float(t.float()), -1, derive_seed(seed, "forward-point", index)) for index, t in enumerate(times)]

    def loss(self, policies: Policies, batch: Batch, point: Point) -> Loss:
        restorer = policies.restorer
        eps = restorer.endpoint(self._noise(batch, point), batch.condition)
        t = restorer.training_time(point.t)
        t_B = torch.full((len(eps),), t, device=eps.device)
        z_t = (1 - t) * batch.z_0 + t * eps
        v = policies.velocity(z_t, t_B, batch.condition)
        v_reference = policies.reference_velocity(z_t, t_B, batch.condition) if self.needs.reference else None
        v_old = policies.old_velocity(z_t, t_B, batch.condition) if self.needs.old_policy else None
        noised = Noised(z_t, t_B, eps - batch.z_0, v, v_reference, v_old)
        loss_B, metrics = self.objective(noised, batch)
        if v_old is not None:
            metrics["old_deviate"] = velocity_mse_N(v.detach(), v_old)
        metrics |= {
            "matching_error": velocity_mse_N(v.detach(), noised.target),
            "z0_rms": batch.z_0.square().flatten(1).mean(1).sqrt(),
        }
        return Loss(loss_B, metrics, {}, Visit(z_t, t_B, v, v_reference))

    def _noise(self, batch: Batch, point: Point) -> Tensor:
        """[B, *latent], a function of the point and of each row, whichever rank and micro-batch it is in."""
        seeds = [
            derive_seed(point.seed, "eps", row.group, *(() if self.config.shared_noise else (row.member,)))
            for row in batch.rows_B
        ]
        return seeded_noise(seeds, tuple(batch.z_0.shape[1:]))[0].to(batch.z_0.device)
