"""The closed forms: how long the pieces of an iteration take, and the iteration itself where nothing waits for chance.

    sample   the chunks of the busiest sampler, each fixed + rows * row seconds; colocated ranks sample their own share
    score    all chunks over the reward workers; streamed, so that only what sampling did not hide counts
    update   the micro-batches of the busiest rank * points, then `updates` optimiser steps and their all-reduce
    publish  weights to the samplers' nodes, in a tree (`separate` only)
    synchronous   sample + what of scoring it did not hide + update + publish + driver
    staleness s   max(sample, score, update + publish + driver, (sample + unhidden score + driver) / s): the slowest stage; an
                  iteration's rollouts have s iterations from their submission to their use (`asynchrony.py`)

`simulate.py` plays the same pieces event by event; `tests/unit/test_planning.py` holds the two to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlrestore.crew import deal
from rlrestore.planning.workload import Cluster, Constants, Cost, Workload
from rlrestore.types import plan_updates


@dataclass(frozen=True)
class Pipeline:
    """An iteration as durations; what the simulation plays. Seconds."""

    shares: tuple[tuple[float, ...], ...]  # of each chunk, a sampler
    score_s: tuple[float, ...]  # a chunk, in chunk order
    hand_s: tuple[float, ...]  # a chunk's images from its sampler to its reward worker
    train_s: tuple[tuple[float, ...], ...]  # an optimiser step: forwards and backwards of each rank
    step_s: float  # one optimiser step, without the network
    reduce_s: float  # adding the gradient over ranks, once an optimiser step
    give_s: float  # latents to the trainers (`separate`)
    publish_s: float
    before_s: float  # the driver, before the first chunk is asked for: tasks drawn, chunks put and submitted
    after_s: float  # the driver, after the last score: credit, log
    reward_workers: int
    colocated: bool  # samplers are the trainers
    staleness: int
    local: bool = False  # one process: scoring does not overlap sampling
    noise: float = 0.0  # std over mean of each piece of work
    nodes: int = 1
    per_node: int = 1
    cores: float | None = None  # of a node, shared by its processes; None: never short
    threads: float = 1.0  # cores that a trainer or sampler asks for; 0 when it works on a GPU


def pipeline_of(work: Workload, constants: Constants, cluster: Cluster) -> Pipeline:
    chunks = work.chunks
    sampler_shares = deal(len(chunks), work.samplers)
    shares = tuple(tuple(constants.sample.of(chunks[i]) for i in share) for share in sampler_shares)
    local = work.kind == "local"
    plans = [
        plan_updates([chunks[i] for i in share], work.micro_rows, work.updates)
        for share in deal(len(chunks), work.ranks)
    ]
    gather_s = 2 * work.bytes.gathered / collective_Bps(work.ranks, cluster) if work.bytes.gathered else 0.0
    train_s = tuple(
        tuple(
            work.points * sum(constants.train.of(last - first) + gather_s for _, first, last in plan[update])
            for plan in plans
        )
        for update in range(work.updates)
    )
    separate = work.kind == "separate"
    return Pipeline(
        shares=shares,
        score_s=tuple(constants.score.of(rows) for rows in chunks),
        hand_s=tuple(0.0 if local else hand_over_s(rows * work.bytes.image, cluster) for rows in chunks),
        train_s=train_s,
        step_s=constants.step_s,
        reduce_s=all_reduce_s(work.bytes.gradient, work.ranks, cluster) if constants.ranks != work.ranks else 0.0,
        give_s=hand_over_s(-(-work.rollouts // work.ranks) * work.bytes.latent, cluster) if separate else 0.0,
        publish_s=publish_s(work.bytes.published, work.samplers, cluster) if separate else 0.0,
        before_s=work.tasks_drawn * constants.draw_s + (0 if local else len(chunks) * 2 * cluster.call_s),
        after_s=constants.driver_s + (0 if local else (2 * len(chunks) + work.ranks) * cluster.call_s),
        reward_workers=1 if local else work.reward_workers,
        colocated=not separate,
        staleness=work.staleness if separate else 0,
        local=local,
        noise=constants.noise,
        nodes=cluster.nodes,
        per_node=cluster.per_node,
        cores=None if local else cluster.cores,
        threads=0.0 if cluster.gpus else float(constants.threads),
    )


def collective_Bps(ranks: int, cluster: Cluster) -> float:
    """What one rank sends in a ring: inside a node over the devices' links, across nodes its share of the node's link."""
    if ranks <= cluster.per_node or cluster.nodes == 1:
        return cluster.device_link_Bps if cluster.gpus else cluster.store_Bps
    return min(cluster.device_link_Bps, cluster.link_Bps) if cluster.gpus else cluster.link_Bps


def all_reduce_s(size: int, ranks: int, cluster: Cluster) -> float:
    """Ring: 2 (W - 1) / W of the bytes through the slowest link; latency of a tree, 2 log2 W messages."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) / ranks * size / collective_Bps(ranks, cluster) + 2 * math.log2(ranks) * cluster.latency_s


def hand_over_s(size: int, cluster: Cluster) -> float:
    """Into the object store and out of it, over the network if there are several nodes."""
    return size / cluster.store_Bps + (size / cluster.link_Bps + cluster.latency_s if cluster.nodes > 1 else 0.0)


def publish_s(size: int, samplers: int, cluster: Cluster) -> float:
    """Gather, hash, send to each node in a tree (Ray's object manager), load in every process of a node at once."""
    nodes = min(cluster.nodes, -(-samplers // cluster.per_node))
    hops = math.ceil(math.log2(nodes)) if nodes > 1 else 0
    return 2 * size / cluster.store_Bps + hops * (size / cluster.link_Bps + cluster.latency_s) + 2 * size / HASH_BPS


HASH_BPS = 1e9  # sha256 of published weights, one core; sender and receiver


@dataclass(frozen=True)
class Stages:
    """Seconds of an iteration by stage, as the log has them: `score` is what sampling did not hide."""

    sample: float
    score: float
    update: float
    publish: float
    driver: float
    iteration: float


def closed_form(pipe: Pipeline) -> Stages:
    """Without chance and without processes that wait for a core."""
    sample = max(sum(share) for share in pipe.shares)
    busy = sum(pipe.score_s) / pipe.reward_workers
    score_end = busy if pipe.local else max(busy + _first_chunk_s(pipe), sample + pipe.score_s[-1] + pipe.hand_s[-1])
    score = busy if pipe.local else score_end - sample
    update = pipe.give_s + sum(max(ranks) + pipe.step_s + pipe.reduce_s for ranks in pipe.train_s)
    driver = pipe.before_s + pipe.after_s
    trainer = update + pipe.publish_s + driver
    if pipe.staleness == 0:
        period = sample + score + trainer
    else:
        period = max(sample, busy, trainer, (sample + score + driver) / pipe.staleness)
    return Stages(sample, score, update, pipe.publish_s, driver, period)


def _first_chunk_s(pipe: Pipeline) -> float:
    return min(share[0] for share in pipe.shares if share) + pipe.hand_s[0]


def workers_to_hide(pipe: Pipeline) -> int:
    """Reward workers with which scoring keeps up with sampling (asynchronous: with the slowest stage)."""
    stages = closed_form(pipe)
    window = max(stages.sample, stages.update + stages.publish) if pipe.staleness else stages.sample
    return max(1, math.ceil(sum(pipe.score_s) / window)) if window else 1


def samplers_to_feed(pipe: Pipeline) -> int:
    """Rollout actors that make an iteration's chunks while the trainer uses the one before."""
    stages = closed_form(pipe)
    total = sum(sum(share) for share in pipe.shares)
    return max(1, math.ceil(total / (stages.update + stages.publish)))


def scaled(cost: Cost, rows: int) -> float:
    """Seconds a row when `rows` go together."""
    return cost.of(rows) / rows
