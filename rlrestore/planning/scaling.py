"""Where a run stops scaling, and what stops it: the simulation on 1, 2, 4, ... up to 1,024 GPUs.

strong: the iteration stays as it is (G, K), so that chunks and micro-batches become fewer and smaller. weak: G grows with
the GPUs. Reward workers grow with the GPUs in both, at the ratio of the config. The bottleneck is the part whose being free
would shorten the iteration most; a GPU that doubles the fleet and gains less than `WORTH` is where it stops.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlrestore.planning.pipeline import Pipeline, pipeline_of
from rlrestore.planning.simulate import Simulated, simulate, without
from rlrestore.planning.workload import Cluster, Constants, Workload

WORTH = 1.25  # images a second of twice the GPUs over those of once; 2 is perfect
LARGEST = 1024


@dataclass(frozen=True)
class Scale:
    """One size of the fleet."""

    gpus: int
    nodes: int
    rollouts: int  # of an iteration
    reward_workers: int
    iteration_s: float
    images_per_s: float
    efficiency: float  # images a second and GPU, over those of the smallest fleet
    bottleneck: str  # of PARTS
    gain: float  # share of the iteration that would go if the bottleneck were free


def doubled(per_node: int, largest: int = LARGEST) -> Iterator[tuple[int, int]]:
    """(GPUs, nodes): powers of two, whole nodes beyond the first."""
    gpus = 1
    while gpus <= largest:
        nodes = max(1, math.ceil(gpus / per_node))
        yield (gpus if nodes == 1 else nodes * per_node), nodes
        gpus *= 2


def at_size(work: Workload, cluster: Cluster, gpus: int, nodes: int, weak: bool) -> tuple[Workload, Cluster]:
    """The same job on `gpus` GPUs. Placement `separate` splits them between samplers and trainers as the config does."""
    held = work.ranks + (work.rollout_actors if work.kind == "separate" else 0)
    ratio = gpus / held
    ranks = max(1, round(work.ranks * ratio))
    actors = max(1, gpus - ranks) if work.kind == "separate" else work.rollout_actors
    samplers = actors if work.kind == "separate" else ranks
    groups = max(1, round(work.groups * ratio)) if weak else work.groups
    rows = max(1, min(work.chunk_rows, groups * work.samples // max(samplers, ranks)))
    moved = work.replace(
        kind="colocated" if work.kind == "local" else work.kind, ranks=ranks, rollout_actors=actors, groups=groups,
        chunk_rows=rows, micro_rows=min(work.micro_rows, rows), tasks_drawn=round(work.tasks_drawn * groups / work.groups),
        reward_workers=max(1, round(work.reward_workers * ratio)),
    )  # fmt: skip
    return moved, dataclasses.replace(cluster, nodes=nodes, per_node=min(cluster.per_node, gpus))


def sweep(work: Workload, constants: Constants, cluster: Cluster, weak: bool, largest: int = LARGEST) -> list[Scale]:
    """One row a size, smallest first."""
    rows: list[Scale] = []
    for gpus, nodes in doubled(cluster.per_node, largest):
        if work.kind == "separate" and gpus < 2:
            continue
        sized, machines = at_size(work, cluster, gpus, nodes, weak)
        pipe = pipeline_of(sized, constants, machines)
        played = play(pipe)
        part, gain = bottleneck(pipe, played)
        speed = sized.rollouts / played.iteration_s
        first = rows[0].images_per_s / rows[0].gpus if rows else speed / gpus
        rows.append(
            Scale(
                gpus, nodes, sized.rollouts, sized.reward_workers, played.iteration_s, speed, speed / gpus / first, part, gain
            )
        )  # fmt: skip
    return rows


def bottleneck(pipe: Pipeline, played: Simulated) -> tuple[str, float]:
    """(part, share of the iteration that goes when it is free), the largest share.

    A part cannot save more time than it takes: parts are tried from the largest down, until none left could win.
    """
    best, best_gain = "sampling", 0.0
    for part, most_s in sorted(_seconds(pipe, played).items(), key=lambda item: -item[1]):
        if most_s / played.iteration_s <= best_gain:
            break
        gain = 1 - play(without(pipe, part)).iteration_s / played.iteration_s
        if gain > best_gain:
            best, best_gain = part, gain
    return best, best_gain


def _seconds(pipe: Pipeline, played: Simulated) -> dict[str, float]:
    """What each part takes at the most of an iteration's latency."""
    return {
        "sampling": played.sample_s,
        "scoring": sum(pipe.score_s) / pipe.reward_workers + max(pipe.score_s),
        "training": played.update_s,
        "optimiser step": pipe.step_s * len(pipe.train_s) * (1 + pipe.noise),
        "gradient network": pipe.reduce_s * len(pipe.train_s),
        "publishing": pipe.publish_s,
        "object store": max(pipe.hand_s) + pipe.give_s,
        "driver": pipe.before_s + pipe.after_s,
        "stragglers": played.sample_s + played.update_s if pipe.noise else 0.0,
    }


def play(pipe: Pipeline) -> Simulated:
    """As few iterations as tell: without chance a synchronous pipeline repeats itself at once."""
    return simulate(pipe, iterations=4 if pipe.noise or pipe.staleness else 1, warmup=1 + 3 * pipe.staleness)


def stops_at(rows: Sequence[Scale]) -> Scale | None:
    """The last size before a doubling that gains less than WORTH; None if every doubling is worth it."""
    for small, large in itertools.pairwise(rows):
        if large.images_per_s < WORTH ** (math.log2(large.gpus / small.gpus)) * small.images_per_s:
            return small
    return None


def why(work: Workload, next_size: Scale) -> str:
    """One sentence on what limits the size after the last good one."""
    chunks = math.ceil(next_size.rollouts / work.chunk_rows)
    reasons = {
        "sampling": f"an iteration has {next_size.rollouts} rollouts for {next_size.gpus} GPUs: chunks become so small that "
        "their fixed cost stays; raise rollout.groups",
        "training": f"an iteration has {next_size.rollouts} rollouts for {next_size.gpus} ranks: micro-batches cannot be "
        "dealt out further; raise rollout.groups",
        "scoring": "the reward workers do not keep up: raise placement.reward_workers or make the slowest reward cheaper",
        "optimiser step": "each rank's optimiser step (and the copies that follow) does not shrink with the ranks: more "
        "micro-batches a step, or a higher engine.zero",
        "gradient network": "adding gradients over ranks: fewer trained parameters (LoRA), fewer updates an iteration, or a "
        "faster network",
        "publishing": "sending weights to the samplers: LoRA, or asynchrony.ahead hides it",
        "object store": "images and latents on their way: larger chunks, or colocated, which keeps latents where they are",
        "driver": f"one driver asks for {chunks} chunks and draws the tasks, one after the other: larger rollout.batch",
        "stragglers": "every barrier waits for the slowest: fewer optimiser steps an iteration, or asynchrony.ahead",
    }  # fmt: skip
    return reasons[next_size.bottleneck]
