"""GRPO on the recorded steps of a flow: clipped ratios of Gaussian transitions, group-relative advantages.

    rho = p(x_{t'} | x_t) / p_old(x_{t'} | x_t)        L = max(-A rho, -A clamp(rho, 1 - e, 1 + e)) + beta KL(p || p_ref)

Flow-GRPO, arXiv 2505.05470 (eq. 5, 6), with the sampler of CPS (arXiv 2509.05952) by default: it leaves no noise in the
result. Log-probabilities are means over latent elements, the KL is the exact Gaussian one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlrestore.algorithms.base import Algorithm, Batch, Loss, Needs, Point, Policies, Visit, check_options
from rlrestore.algorithms.objectives import clip_flags_N, ppo_clip_loss_N
from rlrestore.diffusion.kernels import gaussian_kl_mean, gaussian_logp_mean, log_ratio_mean
from rlrestore.diffusion.sampling import Chain

CLIP_LATENT_SIZE = 65536  # latent elements that `clip_range` is stated for: SD3 at 512 px


@dataclass
class GrpoConfig:
    # e for a latent of 65536 elements; scaled by sqrt(65536 / D) for D (Flow-GRPO-Fast's value)
    clip_range: float = 1e-5
    kl_beta: float = 0.0  # weight of the exact KL to the frozen start, a latent element
    updates: int = 2  # optimiser steps an iteration; all but the first are off-policy


class Grpo(Algorithm):
    def __init__(self, config: GrpoConfig):
        check_options(
            config,
            (
                "clip_range",
                0 < config.clip_range <= 0.01,
                "above 0 and at most 0.01: log-probs are means over the latent",
            ),
            ("kl_beta", config.kl_beta >= 0, "0 or positive"),
            ("updates", config.updates >= 1, "at least 1"),
        )
        self.config = config
        self.needs = Needs(trajectory=True, reference=config.kl_beta > 0)
        self.updates = config.updates

    def points(self, chain: Chain, seed: int) -> list[Point]:
        return [Point(chain.times[index], position, seed) for position, index in enumerate(chain.window)]

    def loss(self, policies: Policies, batch: Batch, point: Point) -> Loss:
        trajectory = batch.trajectory
        assert trajectory is not None
        z_t, step = trajectory.z_NS[:, point.position], trajectory.chain.window[point.position]
        t_B = torch.full((len(z_t),), point.t, device=z_t.device)
        v = policies.velocity(z_t, t_B, batch.condition)
        gaussian = trajectory.chain.step(z_t, v, step)
        mean_old = trajectory.mean_NS[:, point.position]
        log_ratio = log_ratio_mean(gaussian.mean, mean_old, trajectory.z_next_NS[:, point.position], gaussian.std)
        clip = self.config.clip_range * math.sqrt(CLIP_LATENT_SIZE / gaussian.mean[0].numel())
        loss = ppo_clip_loss_N(log_ratio, batch.advantage_B, clip, clip)
        flags = clip_flags_N(log_ratio, batch.advantage_B, clip, clip)
        metrics = {
            "ratio_mean": log_ratio.detach().exp(),
            "kl_old": gaussian_kl_mean(gaussian.mean.detach(), mean_old, gaussian.std),
            "clip_frac_high": flags.high_N,
            "clip_frac_low": flags.low_N,
            "clip_frac_blocked": flags.blocked_N,
        }
        if self.config.kl_beta > 0:
            v_reference = policies.reference_velocity(z_t, t_B, batch.condition)
            reference = trajectory.chain.step(z_t, v_reference, step)
            kl = gaussian_kl_mean(gaussian.mean, reference.mean, gaussian.std)
            loss = loss + self.config.kl_beta * kl
            metrics["kl_reference"] = kl.detach()
        logp = gaussian_logp_mean(trajectory.z_next_NS[:, point.position], gaussian.mean.detach(), gaussian.std)
        extremes = {
            "ratio_deviation_max": torch.expm1(log_ratio.detach()).abs(),
            "logp_deviation_max": (logp - trajectory.logp_NS[:, point.position]).abs(),
        }
        return Loss(loss, metrics, extremes, Visit(z_t, t_B, v))
