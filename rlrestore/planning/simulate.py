"""A discrete-event simulation of the pipeline (simpy): who waits for whom when samplers, reward workers and trainers
stream, work takes a random time, and processes of a node share its cores.

One iteration: the driver draws and submits; each sampler makes its chunks in order; a finished chunk goes to its reward
worker (chunk index modulo workers, as `actors.rewards` does it); when all are scored, the trainers update, with a
barrier at every optimiser step, and publish a version. With a staleness of s, iteration i + s is submitted just before the
update of iteration i (`asynchrony.py`); with 0 the loop is synchronous.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from rlrestore.planning.pipeline import Pipeline

Process = Generator[simpy.Event, object, None]


@dataclass(frozen=True)
class Simulated:
    """Means over the iterations after the warm-up."""

    iteration_s: float  # between one publication and the next
    sample_s: float  # from the first chunk asked for until the last one is sampled
    score_s: float  # from then until the last one is scored
    update_s: float
    publish_s: float
    busy: dict[str, float]  # share of the time that samplers | rewards | trainers | driver worked
    lag: float  # versions between the weights that sampled and those that were trained


class SharedCores:
    """Processor sharing: work that asks for more cores than there are goes on at the same slower rate for all.

    `cores` None never slows. Work is in seconds at full speed; a job asks for `demand` cores.
    """

    def __init__(self, env: simpy.Environment, cores: float | None):
        self.env, self.cores = env, cores
        self.left: dict[int, float] = {}
        self.demand: dict[int, float] = {}
        self.done: dict[int, simpy.Event] = {}
        self.number, self.changed, self.epoch = 0, 0.0, 0

    def work(self, seconds: float, demand: float) -> simpy.Event:
        if self.cores is None or demand == 0 or seconds <= 0:
            return self.env.timeout(max(0.0, seconds))
        self._advance()
        self.number += 1
        self.left[self.number], self.demand[self.number] = seconds, demand
        event = self.done[self.number] = self.env.event()
        self._schedule()
        return event

    def _rate(self) -> float:
        asked = sum(self.demand.values())
        return 1.0 if self.cores is None or asked <= self.cores else self.cores / asked

    def _advance(self) -> None:
        passed = (self.env.now - self.changed) * self._rate() if self.left else 0.0
        self.changed = self.env.now
        for job in self.left:
            self.left[job] -= passed

    def _schedule(self) -> None:
        self.epoch += 1
        if self.left:
            self.env.process(self._finish(min(self.left.values()) / self._rate(), self.epoch))

    def _finish(self, wait: float, epoch: int) -> Process:
        yield self.env.timeout(max(0.0, wait))
        if epoch != self.epoch:
            return  # somebody came or left meanwhile
        self._advance()
        for job in [job for job, left in self.left.items() if left <= 1e-9]:
            del self.left[job], self.demand[job]
            self.done.pop(job).succeed()
        self._schedule()


class _Run:
    """The state of one simulation."""

    def __init__(self, pipe: Pipeline, seed: int):
        self.pipe, self.env = pipe, simpy.Environment()
        self.rng = np.random.default_rng(seed)
        self.sigma = math.sqrt(math.log1p(pipe.noise**2))
        self.nodes = [SharedCores(self.env, pipe.cores) for _ in range(pipe.nodes)]
        self.devices = [simpy.Resource(self.env) for _ in pipe.shares]
        self.workers = [simpy.Resource(self.env) for _ in range(pipe.reward_workers)]
        self.queues: list[simpy.Event] = [self.env.timeout(0) for _ in pipe.shares]
        self.version = 0
        self.times: list[dict[str, float]] = []
        self.busy: dict[str, float] = defaultdict(float)

    def chance(self) -> float:
        """A factor of mean 1."""
        return float(self.rng.lognormal(-(self.sigma**2) / 2, self.sigma)) if self.sigma else 1.0

    def node(self, index: int) -> SharedCores:
        return self.nodes[min(index // self.pipe.per_node, self.pipe.nodes - 1)]

    def on(self, resource: simpy.Resource, kind: str, work: Iterator[simpy.Event]) -> Process:
        with resource.request() as turn:
            yield turn
            start = self.env.now
            yield from work
            self.busy[kind] += self.env.now - start

    # -- stages ------------------------------------------------------------------------------------------------

    def iteration(self, number: int, submitted: simpy.Event, ready: simpy.Event) -> Process:
        """Rollouts of one iteration, until all its scores are there."""
        yield submitted
        times = self.times[number]
        times["version"], times["submitted"] = self.version, self.env.now
        first = itertools.accumulate((len(share) for share in self.pipe.shares), initial=0)
        scored: list[simpy.Event] = []
        for index, offset in zip(range(len(self.pipe.shares)), first, strict=False):
            self.queues[index] = self.env.process(self.sampler(index, offset, self.queues[index], scored))
        yield simpy.AllOf(self.env, list(self.queues))
        times["sampled"] = self.env.now
        yield simpy.AllOf(self.env, scored)
        times["scored"] = self.env.now
        ready.succeed()

    def sampler(self, index: int, offset: int, before: simpy.Event, scored: list[simpy.Event]) -> Process:
        yield before  # an actor works in the order in which it was asked
        for position, seconds in enumerate(self.pipe.shares[index]):
            event = self.node(index).work
            work = (event(seconds * self.chance(), self.pipe.threads) for _ in range(1))
            yield from self.on(self.devices[index], "samplers", work)
            score = self.env.process(self.score(offset + position))
            scored.append(score)
            if self.pipe.local:
                yield score

    def score(self, chunk: int) -> Process:
        yield self.env.timeout(self.pipe.hand_s[chunk])
        worker = chunk % self.pipe.reward_workers
        node = self.nodes[worker % self.pipe.nodes]
        work = (node.work(self.pipe.score_s[chunk] * self.chance(), 1.0) for _ in range(1))
        yield from self.on(self.workers[worker], "rewards", work)

    def trainer(self, submitted: list[simpy.Event], ready: list[simpy.Event]) -> Process:
        """The driver's loop: credit, submit what comes `staleness` later, update, publish."""
        ahead = self.pipe.staleness
        for first in submitted[: max(1, ahead)]:
            yield from self.submit(first)
        for number, event in enumerate(ready):
            yield event
            yield from self.drive(self.pipe.after_s)
            if ahead:
                yield from self.submit(*submitted[number + ahead : number + ahead + 1])
            times = self.times[number]
            times["credited"] = self.env.now
            times["lag"] = self.version - times["version"]
            yield self.env.timeout(self.pipe.give_s)
            for seconds in self.pipe.train_s:
                yield simpy.AllOf(self.env, [self.env.process(self.rank(rank, s)) for rank, s in enumerate(seconds)])
                yield self.env.timeout(self.pipe.reduce_s)
            times["updated"] = self.env.now
            yield self.env.timeout(self.pipe.publish_s)
            times["published"] = self.env.now
            self.version = number + 1
            if not ahead:
                yield from self.submit(*submitted[number + 1 : number + 2])

    def submit(self, *events: simpy.Event) -> Process:
        for event in events:
            yield from self.drive(self.pipe.before_s)
            event.succeed()

    def drive(self, seconds: float) -> Process:
        yield self.env.timeout(seconds)
        self.busy["driver"] += seconds

    def rank(self, rank: int, seconds: float) -> Process:
        work = (self.node(rank).work(seconds * self.chance() + self.pipe.step_s, self.pipe.threads) for _ in range(1))
        if self.pipe.colocated:
            yield from self.on(self.devices[rank], "trainers", work)
            return
        start = self.env.now
        yield from work
        self.busy["trainers"] += self.env.now - start


def simulate(pipe: Pipeline, iterations: int = 12, warmup: int = 4, seed: int = 0) -> Simulated:
    """Play `iterations` + `warmup` iterations; the same seed gives the same numbers."""
    run = _Run(pipe, seed)
    total = (
        iterations + warmup + pipe.staleness
    )  # the last ones keep the pipeline full until the measured ones are done
    run.times = [{} for _ in range(total)]
    submitted, ready = ([run.env.event() for _ in range(total)] for _ in range(2))
    for number in range(total):
        run.env.process(run.iteration(number, submitted[number], ready[number]))
    run.env.run(run.env.process(run.trainer(submitted, ready)))
    kept = run.times[warmup : warmup + iterations]
    begin = run.times[warmup - 1]["published"] if warmup else 0.0

    def mean(last: str, first: str) -> float:
        return sum(times[last] - times[first] for times in kept) / len(kept)

    units = {
        "samplers": len(pipe.shares), "rewards": pipe.reward_workers, "trainers": len(pipe.train_s[0]), "driver": 1,
    }  # fmt: skip
    return Simulated(
        (kept[-1]["published"] - begin) / len(kept),
        mean("sampled", "submitted"), mean("scored", "sampled"), mean("updated", "credited"),
        mean("published", "updated"),
        {kind: run.busy[kind] / count / run.env.now for kind, count in units.items()},
        sum(times["lag"] for times in kept) / len(kept),
    )  # fmt: skip


def without(pipe: Pipeline, part: str) -> Pipeline:
    """The pipeline with one part at no cost; see PARTS."""
    return dataclasses.replace(pipe, **PARTS[part](pipe))


PARTS: dict[str, Callable[[Pipeline], dict[str, Any]]] = {
    "sampling": lambda pipe: {"shares": tuple(tuple(0.0 for _ in share) for share in pipe.shares)},
    "scoring": lambda pipe: {"score_s": tuple(0.0 for _ in pipe.score_s)},
    "training": lambda pipe: {"train_s": tuple(tuple(0.0 for _ in ranks) for ranks in pipe.train_s)},
    "optimiser step": lambda pipe: {"step_s": 0.0},
    "gradient network": lambda pipe: {"reduce_s": 0.0},
    "publishing": lambda pipe: {"publish_s": 0.0},
    "object store": lambda pipe: {"hand_s": tuple(0.0 for _ in pipe.hand_s), "give_s": 0.0},
    "driver": lambda pipe: {"before_s": 0.0, "after_s": 0.0},
    "stragglers": lambda pipe: {"noise": 0.0},
}
