"""The records between the stages of the loop. Legend of names:

G groups (tasks of an iteration), K rollouts of each, N = G * K rollouts in group-major order, B rows of one chunk,
S recorded steps, R rewards. `_s` seconds, `std_*` the std of a whole transition. Time t: 1 is noise, 0 is the image.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from envs.types import Restoration, Task
from rlrestore.diffusion.sampling import Trajectory


@dataclass(frozen=True)
class Row:
    """One rollout to make."""

    group: int  # index of the task in its iteration
    member: int  # 0..K-1
    seed: int  # of all of its noise
    temperature: float = 1.0  # scale of its initial noise


@dataclass(frozen=True)
class Chunk:
    """Rows that are sampled in one forward, and trained in it again. The driver makes them; workers never regroup."""

    index: int  # unique in the iteration
    rows: tuple[Row, ...]  # group-major
    tasks: dict[int, Task]  # of the groups in `rows`; LQ (and reference, if any) included

    @property
    def groups(self) -> list[int]:
        """Distinct groups in order of appearance."""
        return list(dict.fromkeys(row.group for row in self.rows))

    def tasks_of(self, rows: slice) -> tuple[Task, ...]:
        return tuple(self.tasks[row.group] for row in self.rows[rows])


@dataclass(frozen=True)
class Latents:
    """What training needs of a sampled chunk. B rows in the chunk's order."""

    chunk: int
    z_0: Tensor  # [B, *latent] float32
    trajectory: Trajectory | None
    version: int  # of the weights that sampled
    weights_sha: str  # first 16 hex digits of their sha256


@dataclass(frozen=True)
class Images:
    """What rewards need of a sampled chunk. B rows in the chunk's order."""

    chunk: int
    pixels: Tensor  # [B, 3, H, W] uint8
    z0_mean: float  # of the chunk, for the log: brightness drift shows here first
    z0_rms: float
    colour_drift: float  # mean over rows of the shift of colour against the LQ, CIELAB (a, b), before any colour fix
    forwards: int  # rows that the network evaluated for them
    seconds: float  # that sampling took in its process

    def restorations(self, chunk: Chunk) -> list[Restoration]:
        floats = self.pixels.to(torch.float32) / 255
        return [Restoration(chunk.tasks[row.group], floats[i], row.seed) for i, row in enumerate(chunk.rows)]


@dataclass(frozen=True)
class UpdateRequest:
    """One iteration's training for one rank."""

    iteration: int
    point_seed: int  # of `Algorithm.points`: equal on all ranks
    chunks: tuple[Chunk, ...]  # this rank's, in order
    advantages: tuple[Tensor, ...]  # a chunk: [B] float32
    weights: tuple[Tensor, ...]  # a chunk: [B] float32
    totals: tuple[float, ...]  # sum of weights over all ranks, a planned optimiser step


@dataclass(frozen=True)
class UpdateReport:
    """What one rank measured while it trained."""

    sums: dict[str, tuple[float, float]]  # name -> (weighted sum, weight)
    maxima: dict[str, float]
    grad_norms: tuple[float, ...]  # a step taken, before clipping
    lr: float
    skipped_steps: int  # planned steps without any kept sample
    rows: dict[str, int]  # evaluated by each network: current (with its backward), old, reference
    seconds: float
    spreads: dict[str, tuple[float, ...]] = field(default_factory=dict)  # name -> every kept row, for histograms


@dataclass(frozen=True)
class ProbeReport:
    """Seconds that the bare network takes in this process while its peers do the same."""

    encode_task_s: float  # one LQ, which a group shares
    sample_chunk_s: float  # one chunk through the whole chain: forwards only
    train_micro_s: float  # one micro-batch at one point: the algorithm's forwards and one backward


def plan_updates(chunk_rows: list[int], micro_batch: int, updates: int) -> list[list[tuple[int, int, int]]]:
    """Deal a rank's micro-batches (chunk position, first row, end row) to `updates` optimiser steps, in order.

    The same function runs on the driver, which needs the sum of weights of each step over all ranks.
    """
    micro = [
        (position, start, min(start + micro_batch, rows))
        for position, rows in enumerate(chunk_rows)
        for start in range(0, rows, micro_batch)
    ]
    edges = [round(len(micro) * update / updates) for update in range(updates + 1)]
    return [micro[start:end] for start, end in itertools.pairwise(edges)]
