"""Sampling chunks: condition once a task, sample its members, decode, fix the colour, round to 8-bit pixels.

Tasks that bring restorations of their own (`Task.recorded`) are not sampled: their members are those, encoded.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from envs.types import Task
from rlrestore.diffusion.sampling import Chain, sample
from rlrestore.restorers.base import Condition, Restorer
from rlrestore.restorers.colour import colour_drift_B, fixed_for_tasks, stack_lq
from rlrestore.types import Chunk, Images, Latents, ProbeReport


class Sampler:
    """A restorer at work on tasks. Keeps the conditions of the tasks it has seen until `forget`."""

    def __init__(self, restorer: Restorer):
        self.restorer = restorer
        self._conditions: dict[str, Condition] = {}

    def condition(self, chunk: Chunk) -> Condition:
        """B rows. Each LQ is encoded alone, so that the encoding does not depend on what it is batched with."""
        counts = {group: sum(row.group == group for row in chunk.rows) for group in chunk.groups}
        return Condition.cat([self._encode(chunk.tasks[group]).repeat(count) for group, count in counts.items()])

    def sample(
        self, chunk: Chunk, chain: Chain, net: nn.Module, version: int, weights_sha: str
    ) -> tuple[Images, Latents]:
        start = time.perf_counter()
        condition = self.condition(chunk)
        if any(task.recorded for task in chunk.tasks.values()):
            return self._recorded(chunk, condition, start, version, weights_sha)
        seeds, temperatures = [row.seed for row in chunk.rows], [row.temperature for row in chunk.rows]
        z_0, trajectory = sample(self.restorer, condition, seeds, chain, net, temperatures)
        tasks = chunk.tasks_of(slice(None))
        with torch.no_grad():
            decoded = self.restorer.decode(z_0, condition)
            drift = float(colour_drift_B(decoded, stack_lq(tasks, decoded)).mean())
            pixels = to_pixels(fixed_for_tasks(self.restorer.colour_fix, decoded, tasks)).cpu()
        images = Images(
            chunk.index, pixels, float(z_0.mean()), float(z_0.square().mean().sqrt()), drift,
            len(seeds) * chain.evaluations, time.perf_counter() - start,
        )  # fmt: skip
        return images, Latents(chunk.index, z_0.cpu(), trajectory and trajectory.to("cpu"), version, weights_sha)

    def probe(self, chunk: Chunk, chain: Chain, net: nn.Module, repeats: int = 4) -> ProbeReport:
        """Seconds of encoding one LQ and of sampling one chunk, the fastest of some repeats; nothing of training."""
        self.sample(chunk, chain, net, 0, "")  # warms up
        encode_s, sample_s = [], []
        for _ in range(repeats):
            self.forget()
            start = time.perf_counter()
            self.condition(chunk)
            encoded = time.perf_counter()
            self.sample(chunk, chain, net, 0, "")
            encode_s.append((encoded - start) / len(chunk.groups))
            sample_s.append(time.perf_counter() - encoded)
        self.forget()
        return ProbeReport(min(encode_s), min(sample_s), 0.0)

    def _recorded(
        self, chunk: Chunk, condition: Condition, start: float, version: int, weights_sha: str
    ) -> tuple[Images, Latents]:
        pictures = torch.stack([chunk.tasks[row.group].recorded[row.member].image for row in chunk.rows])
        with torch.no_grad():
            z_0 = bounded_latent(self.restorer, pictures.to(self.restorer.device), condition)
        drift = float(colour_drift_B(pictures, stack_lq(chunk.tasks_of(slice(None)), pictures)).mean())
        mean, rms = float(z_0.mean()), float(z_0.square().mean().sqrt())
        images = Images(chunk.index, to_pixels(pictures), mean, rms, drift, 0, time.perf_counter() - start)
        return images, Latents(chunk.index, z_0.cpu(), None, version, weights_sha)

    def forget(self) -> None:
        self._conditions.clear()

    def _encode(self, task: Task) -> Condition:
        if task.id not in self._conditions:
            self._conditions[task.id] = self.restorer.condition(task.lq[None].to(self.restorer.device), [task.types])
        return self._conditions[task.id]


def to_pixels(images: Tensor) -> Tensor:
    """[..., 3, H, W] float in [0, 1] -> uint8, rounded half to even as PNG writers do."""
    return (images * 255).round().to(torch.uint8)


def bounded_latent(restorer: Restorer, images: Tensor, condition: Condition) -> Tensor:
    """z_0 of images that the restorer did not make, clamped: residuals beyond 8 stds would own a batch."""
    return restorer.encode(images, condition).clamp(-8, 8)
