"""A pool of reward workers that survives what rewards do to it.

Chunks are scored in the order they are sampled, each by a fixed worker, so results do not depend on timing. A worker
that dies, stops answering, or has left hung calls behind is replaced, and what was queued on it is sent again; a chunk
whose worker is lost twice comes back invalid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rewards.base import Scores
from rewards.rubric import TermConfig
from rlrestore.types import Chunk

ATTEMPTS = 2


@dataclass
class _Job:
    chunk: Chunk
    chunk_ref: Any
    images_ref: Any
    names: tuple[str, ...]
    worker: int
    ref: Any
    attempts: int = 1


class RewardPools:
    """Pools that score different terms of the same chunks, each on workers of its own kind and number.

    A slow judge in its own pool keeps nobody waiting but the one who wants all scores of a chunk.
    """

    def __init__(self, pools: Mapping[str, RewardPool]):
        self.pools = dict(pools)
        self.cycle = math.lcm(*(len(pool.workers) for pool in pools.values()))  # keys that fall on the same workers
        self.asked: dict[int, tuple[str, ...]] = {}

    @property
    def ready(self) -> list[Any]:
        return [ref for pool in self.pools.values() for ref in pool.ready]

    @property
    def workers(self) -> list[Any]:
        return [worker for pool in self.pools.values() for worker in pool.workers]

    @property
    def replaced(self) -> int:
        return sum(pool.replaced for pool in self.pools.values())

    def submit(self, key: int, chunk: Chunk, chunk_ref: Any, images_ref: Any, names: Sequence[str]) -> None:
        self.asked[key] = tuple(names)
        for pool in self.pools.values():
            if mine := [name for name in names if name in pool.terms]:
                pool.submit(key, chunk, chunk_ref, images_ref, mine)

    def collect(self, key: int) -> dict[str, Scores]:
        """Scores of one submitted chunk by term, in the order in which they were asked for."""
        found: dict[str, Scores] = {}
        for pool in self.pools.values():
            if key in pool.jobs:
                found |= pool.collect(key)
        return {name: found[name] for name in self.asked.pop(key)}


class RewardPool:
    def __init__(
        self, spawn: Callable[[int], Any], workers: int, terms: Mapping[str, TermConfig], threads: int, start_s: float
    ):
        self.spawn, self.terms, self.threads = spawn, dict(terms), threads
        self.start_s = start_s  # a replaced worker has to start before it scores
        self.workers = [spawn(index) for index in range(workers)]
        self.ready = [worker.setup.remote(self.terms, threads) for worker in self.workers]
        self.jobs: dict[int, _Job] = {}
        self.replaced = 0

    def submit(self, key: int, chunk: Chunk, chunk_ref: Any, images_ref: Any, names: Sequence[str]) -> None:
        worker = key % len(self.workers)
        job = _Job(chunk, chunk_ref, images_ref, tuple(names), worker, None)
        job.ref = self._send(job)
        self.jobs[key] = job

    def collect(self, key: int) -> dict[str, Scores]:
        """Scores of one submitted chunk, whose images exist already."""
        job = self.jobs[key]
        # what may be queued before it on its worker, each term within its own limit
        ahead = sum(other.worker == job.worker for other in self.jobs.values())
        limit_s = self.start_s + ahead * sum(self.terms[name].timeout_s for name in job.names)
        while True:
            try:
                scores, abandoned = ray.get(job.ref, timeout=limit_s)
                del self.jobs[key]
                if abandoned:
                    self._replace(job.worker)
                return scores
            except (GetTimeoutError, RayActorError) as error:
                lost = "timeout" if isinstance(error, GetTimeoutError) else "died"
                job.attempts += 1
                if job.attempts > ATTEMPTS:
                    del self.jobs[key]
                    self._replace(job.worker)
                    return {
                        name: Scores.failed(len(job.chunk.rows), f"infra: reward worker {lost}") for name in job.names
                    }
                self._replace(job.worker)
            except RayTaskError as error:
                del self.jobs[key]
                cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
                raise cause from error

    def _send(self, job: _Job) -> Any:
        return self.workers[job.worker].score.remote(job.chunk_ref, job.images_ref, job.names)

    def _replace(self, index: int) -> None:
        ray.kill(self.workers[index])
        self.replaced += 1
        self.workers[index] = self.spawn(index)
        self.workers[index].setup.remote(self.terms, self.threads, True)
        for job in self.jobs.values():
            if job.worker == index:
                job.ref = self._send(job)
