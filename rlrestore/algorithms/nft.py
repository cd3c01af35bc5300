"""DiffusionNFT: forward-process policy improvement, arXiv 2509.16117.

Good samples pull the velocity toward their own flow-matching target, bad ones push it away, through implicit positive
and negative policies v+- = (1 -+ b) v_old +- b v (eq. 8-10; the loss is `objectives.nft_loss_N`). It needs final images
only, any ODE solver, and an old policy that makes the rollouts and follows slowly. `beta` is also the strength of a
built-in proximal term: small is bold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlrestore.algorithms.base import Algorithm, Batch, Loss, Needs, Point, Policies, Visit, check_options
from rlrestore.algorithms.objectives import nft_loss_N, nft_old_decay, velocity_mse_N
from rlrestore.diffusion.sampling import Chain, seeded_noise
from rlrestore.seeds import derive_seed


@dataclass
class NftConfig:
    beta: float = 1.0  # b
    old_decay: int = 1  # 0 hard copy | 1 ramp to 0.5 by 0.001 a step | 2 delayed ramp to 0.999
    times: int = 4  # points of the forward process a sample is trained at, stratified over t_range
    t_range: tuple[float, float] = (0.1, 1.0)  # high times move the composition, low ones texture and noise
    # One eps for all members of a group at a time: advantages sum to 0, so what it adds to every member cancels (as DGPO,
    # arXiv 2510.08425, does; the paper draws one for each).
    shared_noise: bool = False
    adaptive: bool = True  # the paper's self-normalising weights
    updates: int = 1  # optimiser steps an iteration


class Nft(Algorithm):
    def __init__(self, config: NftConfig):
        check_options(
            config,
            ("beta", config.beta > 0, "positive; published values are 1 and 0.1 (smaller is bolder)"),
            ("old_decay", config.old_decay in (0, 1, 2), "0 (hard copy), 1 (to 0.5) or 2 (to 0.999)"),
            ("times", config.times >= 1, "at least 1"),
            ("t_range", 0 < config.t_range[0] < config.t_range[1] <= 1, "two times in (0, 1], the smaller first"),
            ("updates", config.updates >= 1, "at least 1"),
        )
        self.config = config
        self.needs = Needs(old_policy=True)
        self.updates = config.updates

    def points(self, chain: Chain, seed: int) -> list[Point]:
        generator = torch.Generator().manual_seed(seed)
        count, (low, high) = self.config.times, self.config.t_range
        offsets = torch.rand(count, generator=generator, dtype=torch.float64)
        times = low + (high - low) * (torch.arange(count) + offsets) / count
        return [Point(float(t.float()), -1, derive_seed(seed, "nft-point", index)) for index, t in enumerate(times)]

    def loss(self, policies: Policies, batch: Batch, point: Point) -> Loss:
        eps = self._noise(batch, point)
        t_B = torch.full((len(eps),), point.t, device=eps.device)
        z_t = (1 - point.t) * batch.z_0 + point.t * eps
        v_old = policies.old_velocity(z_t, t_B, batch.condition)
        v = policies.velocity(z_t, t_B, batch.condition)
        loss = nft_loss_N(v, v_old, z_t, batch.z_0, t_B, batch.advantage_B, self.config.beta, self.config.adaptive)
        metrics = {
            "old_deviate": velocity_mse_N(v.detach(), v_old),
            "matching_error": velocity_mse_N(v.detach(), eps - batch.z_0),
            "z0_rms": batch.z_0.square().flatten(1).mean(1).sqrt(),
        }
        return Loss(loss, metrics, {}, Visit(z_t, t_B, v))

    def _noise(self, batch: Batch, point: Point) -> Tensor:
        """[B, *latent], a function of the point and of each row, whichever rank and micro-batch it is in."""
        seeds = [
            derive_seed(point.seed, "eps", row.group, *(() if self.config.shared_noise else (row.member,)))
            for row in batch.rows_B
        ]
        return seeded_noise(seeds, tuple(batch.z_0.shape[1:]))[0].to(batch.z_0.device)

    def old_decay(self, optimiser_steps: int) -> float:
        return nft_old_decay(self.config.old_decay, optimiser_steps)
