"""What is planned: the work of one iteration, the machines, and the seconds of a unit of each work.

`Workload` follows from the config alone, `Constants` were measured (`probe.py`, `past_run.py`) or come from elsewhere
(`published.py`), `Cluster` is what the user would rent. Bytes are bytes, seconds wall seconds of one process.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

from rlrestore.config.sections import TrainConfig
from rlrestore.diffusion.sampling import Chain

KINDS = ("local", "colocated", "separate")
FLOAT_BYTES = 4
STATES_A_STEP = 3  # a recorded step holds the state before it, the state after it, and the mean (sampling.Trajectory)


@dataclass(frozen=True)
class Cost:
    """Seconds of a call on n rows: `fixed_s + n * row_s`."""

    fixed_s: float = 0.0
    row_s: float = 0.0

    def of(self, rows: float) -> float:
        return self.fixed_s + rows * self.row_s

    def times(self, factor: float) -> Cost:
        return Cost(self.fixed_s * factor, self.row_s * factor)


@dataclass(frozen=True)
class Bytes:
    """What one thing weighs on the wire and in the object store."""

    task: int  # LQ and reference, if any, float32
    image: int  # a restoration as rewards get it, uint8
    latent: int  # z_0 and the recorded trajectory of one rollout, float32
    published: int  # the weights that samplers get, float32
    gradient: int  # what trainers add over ranks in one optimiser step
    gathered: int = 0  # ZeRO-3: sharded weights that a forward or a backward collects


@dataclass(frozen=True)
class Workload:
    """One iteration, and how many there are."""

    groups: int  # G
    samples: int  # K
    chunk_rows: int  # rollouts of one sampling forward
    micro_rows: int  # of one training forward and backward
    points: int  # trained points of a rollout
    updates: int  # optimiser steps
    kind: str  # placement: local | colocated | separate
    ranks: int
    rollout_actors: int  # of `separate`
    reward_workers: int
    staleness: int  # versions that rollouts lag (`asynchrony.ahead`); 0 is synchronous
    iterations: int
    evaluations: int  # of base and tuned together
    evaluation_rows: int  # images of one of them
    checkpoints: int
    tasks_drawn: int  # an iteration
    bytes: Bytes

    @property
    def rollouts(self) -> int:
        return self.groups * self.samples

    @property
    def samplers(self) -> int:
        return self.rollout_actors if self.kind == "separate" else self.ranks

    @property
    def chunks(self) -> list[int]:
        """Rows of each chunk, as `stages.make_chunks` cuts them."""
        full, rest = divmod(self.rollouts, self.chunk_rows)
        return [self.chunk_rows] * full + ([rest] if rest else [])

    def replace(self, **changes) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Constants:
    """Seconds of the units of work, and where they come from."""

    sample: Cost  # a chunk through the whole chain, decoded
    train: Cost  # a micro-batch at one point: forwards and backward
    step_s: float  # an optimiser step and the copies that follow, with the all-reduce of `ranks`
    score: Cost  # a chunk by all terms of the mix
    draw_s: float  # a task
    driver_s: float  # an iteration's credit and log
    source: str
    terms_s: dict[str, float] = field(default_factory=dict)  # an image, by term
    evaluation_row_s: float = 0.0  # an image of an evaluation with all its scores
    checkpoint_s: float = 0.0
    noise: float = 0.0  # std of a unit of work over its mean
    threads: int = 1  # cores that a trainer or sampler kept busy when this was measured
    ranks: int = 1  # that were measured together

    def replace(self, **changes) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Cluster:
    """The machines. Ranks and rollout actors fill nodes in order, reward workers are spread."""

    nodes: int = 1
    per_node: int = 1  # trainers and samplers on a node: its GPUs
    gpus: bool = False  # network work runs on GPUs, so that only scoring uses cores
    cores: float | None = None  # of a node; None: processes never wait for a core
    link_Bps: float = 25e9  # a node's network, one direction (200 Gbit/s)
    device_link_Bps: float = 300e9  # between the GPUs of one node
    store_Bps: float = 2e9  # object store: 25 MB put and read in 13 ms (measured on two cores)
    latency_s: float = 20e-6  # of a message between nodes
    call_s: float = 1.7e-3  # the driver's time for one actor call (measured on two cores)


def workload_of(config: TrainConfig, chain: Chain, points: int, updates: int, sizes: Bytes) -> Workload:
    """`chain` and `points` of any iteration: all have as many steps and points."""
    evaluate, steps = config.evaluate, config.run.steps
    during = (steps - 1) // evaluate.every if evaluate.every else 0
    saved = -(-steps // config.checkpoint.every) if config.checkpoint.every else 1
    local = config.placement.kind == "local"
    return Workload(
        groups=config.rollout.groups, samples=config.rollout.samples,
        chunk_rows=min(config.rollout.batch, config.rollout.groups * config.rollout.samples),
        micro_rows=config.engine.micro_batch, points=points, updates=updates, kind=config.placement.kind,
        ranks=1 if local else config.placement.ranks, rollout_actors=config.placement.rollout_actors,
        reward_workers=config.placement.reward_workers, staleness=config.asynchrony.ahead, iterations=steps,
        evaluations=2 + during, evaluation_rows=evaluate.tasks * evaluate.samples, checkpoints=saved,
        tasks_drawn=config.rollout.groups * config.curriculum.candidates, bytes=sizes,
    )  # fmt: skip


def byte_sizes(
    size_px: tuple[int, int], has_gt: bool, latent: tuple[int, ...], chain: Chain, trained: int, precision_bytes: int,
    sharded: int = 0,
) -> Bytes:  # fmt: skip
    """`trained` parameters move, `sharded` are spread over ranks (ZeRO-3)."""
    pixels = 3 * size_px[0] * size_px[1]
    elements = 1
    for side in latent:
        elements *= side
    recorded = len(chain.window)
    return Bytes(
        task=FLOAT_BYTES * pixels * (2 if has_gt else 1),
        image=pixels,
        latent=FLOAT_BYTES * (elements * (1 + STATES_A_STEP * recorded) + recorded),
        published=FLOAT_BYTES * trained,
        gradient=precision_bytes * trained,
        gathered=precision_bytes * sharded,
    )
