"""Sampling restorations, with the record that training replays.

Noise belongs to the sample, not to the batch: sample i draws everything from a generator seeded with `seeds[i]`, so the
same seed gives the same picture alone or in a batch (up to the arithmetic of the network's batch size), on any worker.
The last step and all steps outside the window are deterministic; a trajectory holds the window's transitions only. The
window of an "ode" chain has log-probability 0: its states are kept, nothing was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlrestore.diffusion.kernels import DRIFT_KERNELS, KERNELS, StepGaussian, gaussian_logp_mean, trainable
from rlrestore.diffusion.solvers import OdeSolver
from rlrestore.restorers.base import Condition, Restorer


@dataclass(frozen=True)
class Chain:
    """One sampler, fully stated: what a rollout did and what a replay must do."""

    times: tuple[float, ...]  # t_0 > ... > t_T = 0; the values the network and the kernel see
    kernel: str = "ode"  # of the window: a key of KERNELS, or "ode", which adds no noise and only keeps the states
    level: float = 0.0  # noise level of the kernel
    window: tuple[int, ...] = ()  # step indices that are recorded
    solver: str = "euler"  # of the other steps, one of SOLVERS

    @property
    def evaluations(self) -> int:
        """Of the network, a sample."""
        return len(self.times) - 1

    def step(self, z_t: Tensor, v: Tensor, index: int) -> StepGaussian:
        """The Gaussian of recorded step `index`."""
        return KERNELS[self.kernel](z_t, v, self.times[index], self.times[index + 1], self.level, self.times[1])

    def step_scale(self, index: int) -> float:
        """How far step `index` goes: |dt| of an SDE, |d mean / d v| of a kernel that is no step in dt."""
        if self.kernel in DRIFT_KERNELS:
            return self.times[index] - self.times[index + 1]
        return float(self.step(torch.zeros(1, 1), torch.ones(1, 1), index).mean.abs())


@dataclass(frozen=True)
class Trajectory:
    """The recorded transitions of N rollouts. S = len(chain.window)."""

    chain: Chain
    z_NS: Tensor  # [N, S, *latent] float32, state before the step
    z_next_NS: Tensor  # [N, S, *latent] float32, state after it
    mean_NS: Tensor  # [N, S, *latent] float32, mean of the behaviour policy's transition
    logp_NS: Tensor  # [N, S] float32 nats a latent element, under the behaviour policy

    def take(self, rows: slice | Tensor) -> Trajectory:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Trajectory:
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Trajectory:
        return Trajectory(
            self.chain, function(self.z_NS), function(self.z_next_NS), function(self.mean_NS), function(self.logp_NS)
        )


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """[N, *shape] standard normal, and each sample's generator to go on drawing from."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators


@torch.no_grad()
def sample(
    restorer: Restorer,
    condition: Condition,
    seeds: Sequence[int],
    chain: Chain,
    net: nn.Module | None = None,
    temperatures: Sequence[float] | None = None,
) -> tuple[Tensor, Trajectory | None]:
    """Integrate from noise: z_0 [N, *latent] float32, and the trajectory if the chain has a window.

    `condition` has N rows, one a seed; `temperatures` scale the initial noise of each. Costs `chain.evaluations` of the network.
    """
    device = restorer.device
    noise, generators = seeded_noise(seeds, restorer.latent_shape(condition))  # on the CPU: the same on every machine
    if temperatures is not None:
        noise = noise * torch.tensor(temperatures, dtype=torch.float32).view(-1, *[1] * (noise.ndim - 1))
    z = restorer.start(noise.to(device), chain.times[0], condition)
    before, after, means, logps = [], [], [], []
    solver = OdeSolver(chain.solver)
    for index in range(chain.evaluations):
        t = chain.times[index]
        v = restorer.velocity(z, torch.full((len(seeds),), t, device=device), condition, net)
        if index in chain.window and chain.kernel != "ode":
            gaussian = chain.step(z, v, index)
            assert trainable(gaussian.std), "build.py refuses windows that reach a step without noise"
            eps = torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators]).to(device)
            z_next = gaussian.mean + gaussian.std * eps
            before.append(z)
            after.append(z_next)
            means.append(gaussian.mean)
            logps.append(gaussian_logp_mean(z_next, gaussian.mean, gaussian.std))
            z = z_next
            solver.forget()
        else:
            z_next = solver.step(z, v, t, chain.times[index + 1])
            if index in chain.window:
                before.append(z)
                after.append(z_next)
                means.append(z_next)
                logps.append(z.new_zeros(len(z)))
            z = z_next
    if not chain.window:
        return z, None
    return z, Trajectory(
        chain, torch.stack(before, 1), torch.stack(after, 1), torch.stack(means, 1), torch.stack(logps, 1)
    )


def replay_step(
    restorer: Restorer, condition: Condition, trajectory: Trajectory, position: int, net: nn.Module | None = None
) -> StepGaussian:
    """The Gaussian that `net` gives to recorded step `position` (0..S-1); gradients flow through its mean."""
    index = trajectory.chain.window[position]
    z_t = trajectory.z_NS[:, position]
    t_B = torch.full((len(z_t),), trajectory.chain.times[index], device=z_t.device)
    v = restorer.velocity(z_t, t_B, condition, net)
    return trajectory.chain.step(z_t, v, index)


def replay_logp(
    restorer: Restorer, condition: Condition, trajectory: Trajectory, position: int, net: nn.Module | None = None
) -> Tensor:
    """[N] log-probability of recorded step `position` under `net`: on policy it equals `logp_NS[:, position]`."""
    gaussian = replay_step(restorer, condition, trajectory, position, net)
    return gaussian_logp_mean(trajectory.z_next_NS[:, position], gaussian.mean, gaussian.std)
