"""One trainer rank: the policies, the gradient, the copies that follow. Plain class; `actors` wraps it for Ray.

In: chunks that were sampled, with advantages and weights. Out: moved weights and a report. The same object also samples
(placements `local` and `colocated`) from its behaviour policy: the old policy where the algorithm keeps one, the EMA where
the config says so, else the current weights. A collective method is called on every rank with the same arguments.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from envs.types import Task
from rlrestore.algorithms.base import Algorithm, Batch, Loss, Point, Policies
from rlrestore.algorithms.objectives import ema_decay
from rlrestore.checkpoint import load_tensors, read_json, save_tensors, write_json_atomic
from rlrestore.config.sections import RegulariseConfig
from rlrestore.diffusion.sampling import Chain
from rlrestore.engine.base import Engine, NonFiniteError
from rlrestore.iteration.rollout import Sampler
from rlrestore.learning.anchor import importance, join_trajectories, reanchor
from rlrestore.learning.kept import Kept
from rlrestore.learning.lr import warmup_factor
from rlrestore.learning.optimiser import select_trainable
from rlrestore.learning.regularisers import penalties
from rlrestore.learning.weights import Published, bucket_names, publish
from rlrestore.restorers.base import Restorer
from rlrestore.types import Chunk, Images, Latents, ProbeReport, UpdateReport, UpdateRequest, plan_updates


class StaleRolloutError(RuntimeError):
    """A rollout was made by weights older than `placement.max_staleness` allows."""


class Learner:
    def __init__(
        self,
        restorer: Restorer,
        algorithm: Algorithm,
        make_engine: Callable[[nn.Module], Engine],
        *,
        lr: float,
        warmup: int,
        ema_cap: float,
        micro_batch: int,
        max_staleness: int,
        trainable: Sequence[str] = (),
        regularise: RegulariseConfig | None = None,
        reward: Callable[[Tensor, Sequence[Task]], Tensor] | None = None,
        ema_samples: bool = False,
    ):
        self.restorer, self.algorithm, self.sampler = restorer, algorithm, Sampler(restorer)
        self.lr, self.warmup, self.ema_cap = lr, warmup, ema_cap
        self.micro_batch, self.max_staleness = micro_batch, max_staleness
        self.regularise = regularise or RegulariseConfig()
        network = restorer.denoiser
        names = set(select_trainable(network, trainable or restorer.trainable))
        self.trained = sum(value.numel() for name, value in network.named_parameters() if name in names)
        # Copies are made before the engine may partition the network. All named weights are the trainable ones only: the
        # others are the same everywhere.
        self.frozen = {
            name: value.detach().clone()
            for name, value in network.named_parameters()
            if name not in names and restorer.saves_frozen
        }
        self.scratch = restorer.twin("scratch")  # evaluation weights are swapped in here
        self.old = restorer.twin("old") if algorithm.needs.old_policy else None
        needs_reference = algorithm.needs.reference or self.regularise.asks_reference
        self.reference = restorer.twin("reference") if needs_reference else None
        assert not (ema_samples and algorithm.needs.old_policy), "checks.py refuses two slow copies"
        self.ema_policy = restorer.twin("behaviour") if ema_samples else None  # holds the EMA; rollouts are its
        self.engine = make_engine(network)
        rank, world = self.engine.rank, self.engine.world
        self.base = Kept(self.engine.stream_parameters(), rank, world)
        self.ema = Kept(self.engine.stream_parameters(), rank, world)
        self.old_shadow = Kept(self.engine.stream_parameters(), rank, world) if self.old is not None else None
        # An engine may have rounded the weights that it took over; the copies start where it does, and where a resume finds them.
        for twin in (self.old, self.reference):
            if twin is not None:
                self.engine.assign(twin, self.base.whole())
        self.policies = Policies(restorer, self.engine.network, self.old, self.reference, reward)
        self.iteration = 0  # iterations trained: the version of the weights
        self.optimiser_steps = 0
        self.latents: dict[int, Latents] = {}

    # -- sampling ----------------------------------------------------------------------------------------------

    @property
    def behaviour(self) -> nn.Module:
        copies = [net for net in (self.old, self.ema_policy) if net is not None]
        return copies[0] if copies else self.engine.network

    def sample(self, chunk: Chunk, chain: Chain) -> Images:
        """Sample from the behaviour policy and keep the latents for `update`."""
        images, latents = self.sampler.sample(chunk, chain, self.behaviour, self.iteration, "")
        self.latents[chunk.index] = latents
        return images

    def sample_with(self, chunk: Chunk, chain: Chain, which: str) -> Images:
        """Sample with weights `base`, `ema` or `current`, which were put in place by `load_scratch`."""
        return self.sampler.sample(chunk, chain, self.scratch, self.iteration, which)[0]

    @torch.no_grad()
    def load_scratch(self, which: str) -> None:
        """Collective."""
        self.engine.assign(self.scratch, self.stream(which))

    # -- weights -----------------------------------------------------------------------------------------------

    def stream(self, which: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Trainable parameters one by one, whole, float32: base | current | ema | behaviour. Collective to its end."""
        if which == "base":
            return self.base.whole(names)
        if which == "ema" or (which == "behaviour" and self.ema_policy is not None):
            return self.ema.whole(names)
        if which == "behaviour" and self.old_shadow is not None:
            return self.old_shadow.whole(names)
        return self.engine.stream_parameters(names)

    def weights(self, which: str) -> dict[str, Tensor]:
        """The same, all at once, on every rank. Collective."""
        return dict(self.stream(which))

    def _on_rank_0(self, named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """In memory of the CPU on rank 0, empty on the others. Collective."""
        return {name: value.cpu() for name, value in named if self.engine.rank == 0}

    def publish(self, which: str, bucket: int = 0) -> Published | None:
        """One bucket of the weights as rank 0 sends it, None on the others. Collective.

        In the precision that the behaviour policy computes in, so that who receives them samples what it would.
        """
        buckets = bucket_names(self.base.shapes)
        weights = self._on_rank_0(self.stream(which, buckets[bucket]))
        if self.engine.rank != 0:
            return None
        dtypes = {name: parameter.dtype for name, parameter in self.behaviour.named_parameters()}
        tensors = {name: value.to(dtypes[name]) for name, value in weights.items()}
        return publish(tensors, self.iteration, bucket, len(buckets))

    # -- training ----------------------------------------------------------------------------------------------

    def give(self, latents: Sequence[Latents]) -> None:
        """Latents that somebody else sampled (placement `separate`)."""
        for item in latents:
            if self.iteration - item.version > self.max_staleness:
                raise StaleRolloutError(
                    f"chunk {item.chunk} was sampled by version {item.version}, the trainer is at {self.iteration} and "
                    f"placement.max_staleness is {self.max_staleness}"
                )
            self.latents[item.chunk] = item

    @torch.no_grad()
    def reanchor(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Make the current policy the anchor of given rollouts' ratios; [B] importance of each chunk's. Collective."""
        found = []
        for chunk in chunks:
            latents, condition = self.latents[chunk.index], self.sampler.condition(chunk)
            assert latents.trajectory is not None, "only trajectory methods have ratios"
            parts, ratios = [], []
            for first in range(
                0, len(chunk.rows), self.micro_batch
            ):  # the slices of the update: its arithmetic, bit for bit
                rows = slice(first, first + self.micro_batch)
                before = latents.trajectory.take(rows).to(self.restorer.device)
                anchored, log_ratio_BS = reanchor(self.policies, before, condition.take(rows))
                parts.append(anchored.to("cpu"))
                ratios.append(importance(log_ratio_BS, before.z_NS[0, 0].numel()).cpu())
            self.latents[chunk.index] = replace(latents, trajectory=join_trajectories(parts))
            found.append(torch.cat(ratios))
        return found

    def update(self, request: UpdateRequest, chain: Chain) -> UpdateReport:
        """All optimiser steps of one iteration. NonFiniteError leaves weights as they were. Collective."""
        start = time.perf_counter()
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        maxima: dict[str, float] = {}
        spreads: dict[str, list[float]] = defaultdict(list)
        grad_norms: list[float] = []
        skipped, lr = 0, 0.0
        self.policies.rows.clear()
        points = self.algorithm.points(chain, request.point_seed)
        plan = plan_updates([len(chunk.rows) for chunk in request.chunks], self.micro_batch, self.algorithm.updates)
        for micro_batches, total in zip(plan, request.totals, strict=True):
            on_policy = not grad_norms  # no step since the rollout
            if total == 0:
                skipped += 1
                continue
            for position, first, last in micro_batches:
                batch = self._batch(request, position, slice(first, last))
                for point in points:
                    loss = self._loss(self.policies, batch, point)
                    value = (loss.value_B * batch.weight_B).sum() / (total * len(points))
                    if not bool(torch.isfinite(value)):
                        raise NonFiniteError(_what_is_not_finite(loss, request.iteration))
                    self.engine.backward(value)
                    _add(sums, maxima, loss, batch.weight_B, on_policy)
                    for name, value_B in loss.spreads.items():
                        spreads[name] += value_B[batch.weight_B > 0].tolist()
            lr = self.lr * warmup_factor(self.optimiser_steps, self.warmup)
            grad_norms.append(self.engine.step(lr))
            self.optimiser_steps += 1
        self._follow(bool(grad_norms))
        self.latents.clear()
        self.sampler.forget()
        return UpdateReport(
            {name: (value, weight) for name, (value, weight) in sums.items()},
            maxima, tuple(grad_norms), lr, skipped, dict(self.policies.rows), time.perf_counter() - start,
            {name: tuple(values) for name, values in spreads.items()},
        )  # fmt: skip

    def _loss(self, policies: Policies, batch: Batch, point: Point) -> Loss:
        """The algorithm's loss plus the penalties of `regularise`."""
        loss = self.algorithm.loss(policies, batch, point)
        value_B, metrics = loss.value_B, dict(loss.metrics)
        for name, (weight, penalty_B) in penalties(self.regularise, policies, batch, point, loss.visit).items():
            value_B = value_B + weight * penalty_B
            metrics[f"regularise_{name}"] = penalty_B.detach()
        return replace(loss, value_B=value_B, metrics=metrics)

    def _batch(self, request: UpdateRequest, position: int, rows: slice) -> Batch:
        chunk = request.chunks[position]
        latents = self.latents[chunk.index]
        trajectory, device = latents.trajectory, self.restorer.device
        return Batch(
            self.sampler.condition(chunk).take(rows),
            latents.z_0[rows].to(device),
            None if trajectory is None else trajectory.take(rows).to(device),
            request.advantages[position][rows].to(device),
            request.weights[position][rows].to(device),
            chunk.rows[rows],
            chunk.tasks_of(rows),
        )

    @torch.no_grad()
    def _follow(self, moved: bool) -> None:
        self.iteration += 1
        if not moved:
            return
        self.ema.update(self.engine.stream_parameters(), ema_decay(self.iteration - 1, self.ema_cap))
        if self.old is not None and self.old_shadow is not None:
            self.old_shadow.update(self.engine.stream_parameters(), self.algorithm.old_decay(self.optimiser_steps))
            self.engine.assign(self.old, self.old_shadow.whole())
        if self.ema_policy is not None:
            self.engine.assign(self.ema_policy, self.ema.whole())

    # -- measuring ---------------------------------------------------------------------------------------------

    def probe(self, chunk: Chunk, chain: Chain, repeats: int = 4) -> ProbeReport:
        """Time the bare arithmetic, the fastest of some repeats: what a sampler does, and the loss with backward of one
        micro-batch. Changes nothing."""
        report = self.sampler.probe(chunk, chain, self.scratch, repeats)
        latents = self.sampler.sample(chunk, chain, self.behaviour, 0, "")[1]
        rows = slice(0, self.micro_batch)
        device = self.restorer.device
        ones = torch.ones(len(chunk.rows), device=device)
        trajectory = latents.trajectory and latents.trajectory.take(rows).to(device)
        batch = Batch(
            self.sampler.condition(chunk).take(rows), latents.z_0[rows].to(device), trajectory, ones[rows], ones[rows],
            chunk.rows[rows], chunk.tasks_of(rows),
        )  # fmt: skip
        policies = replace(self.policies, current=self.scratch.requires_grad_(True))
        points = self.algorithm.points(chain, 0)[:1]
        train_s = []
        for _ in range(repeats):
            start = time.perf_counter()
            self._loss(policies, batch, points[0]).value_B.mean().backward()
            train_s.append(time.perf_counter() - start)
            self.scratch.zero_grad(set_to_none=True)
        self.scratch.requires_grad_(False)
        self.sampler.forget()
        return replace(report, train_micro_s=min(train_s))

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Into an existing folder on shared storage. Collective."""
        (folder / "engine").mkdir(exist_ok=True)
        self.engine.save(folder / "engine")
        for name, kept in (("ema", self.ema), ("base", self.base), ("old", self.old_shadow)):
            if kept is None:
                continue
            tensors = self._on_rank_0(kept.whole())
            if self.engine.rank == 0:
                save_tensors(folder / f"{name}.safetensors", tensors)
        if self.engine.rank == 0:
            write_json_atomic(
                folder / "learner.json", {"iteration": self.iteration, "optimiser_steps": self.optimiser_steps}
            )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Collective."""
        self.engine.load(folder / "engine")
        self.ema.load(load_tensors(folder / "ema.safetensors"))
        self.base.load(load_tensors(folder / "base.safetensors"))
        if self.reference is not None:
            self.engine.assign(self.reference, self.base.whole())
        if self.old is not None and self.old_shadow is not None:
            self.old_shadow.load(load_tensors(folder / "old.safetensors"))
            self.engine.assign(self.old, self.old_shadow.whole())
        if self.ema_policy is not None:
            self.engine.assign(self.ema_policy, self.ema.whole())
        counters = read_json(folder / "learner.json")
        self.iteration, self.optimiser_steps = counters["iteration"], counters["optimiser_steps"]

    def export(self, folder: Path, which: str) -> None:
        """A folder that `restorer.weights` opens, with weights `ema` or `current`. Collective; rank 0 writes."""
        weights = self._on_rank_0(self.stream(which))
        if self.engine.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.restorer.save(folder, {**self.frozen, **weights})

    def close(self) -> None:
        self.engine.close()


def _what_is_not_finite(loss: Loss, iteration: int) -> str:
    named = {"loss": loss.value_B, **loss.metrics, **loss.extremes}
    broken = [name for name, value_B in named.items() if not bool(torch.isfinite(value_B).all())]
    return (
        f'not finite in the update of iteration {iteration}: {", ".join(broken)} (docs/metrics.md, "Policy"). Nothing was '
        "updated, published or saved: lower engine.lr, or look at the pictures of the last checkpoint"
    )


def _add(sums: dict[str, list[float]], maxima: dict[str, float], loss: Loss, weight_B: Tensor, on_policy: bool) -> None:
    """Add one micro-batch to the iteration's metrics, kept rows only. NAME_on_policy is the maximum before the first step."""
    kept = weight_B > 0
    if not bool(kept.any()):
        return
    for name, value_B in {"loss": loss.value_B.detach(), **loss.metrics}.items():
        sums[name][0] += float((value_B * weight_B).sum())
        sums[name][1] += float(weight_B.sum())
    for name, value_B in loss.extremes.items():
        largest = float(value_B[kept].max())
        for key in (name, f"{name}_on_policy") if on_policy else (name,):
            maxima[key] = max(maxima.get(key, 0.0), largest)
