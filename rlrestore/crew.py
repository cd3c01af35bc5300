"""Who does the work of an iteration: the interface that the loop sees, and the crew of one process.

A crew samples chunks, scores them, trains on them and hands weights around. `local` does it all here, in order;
`rlrestore.actors` has the same on Ray, where scoring streams: a chunk goes to the reward workers as soon as it exists.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.base import Scores
from rlrestore.diffusion.sampling import Chain
from rlrestore.iteration.scoring import Scorer
from rlrestore.learning.learner import Learner
from rlrestore.types import Chunk, Images, ProbeReport, UpdateReport, UpdateRequest


class WorkerLostError(RuntimeError):
    """A process of the crew died or stopped answering; the run can be resumed from its last checkpoint."""


@dataclass(frozen=True)
class Scored:
    """One chunk, sampled and scored."""

    chunk: Chunk
    images: Images
    scores: dict[str, Scores]  # by term name, rows in the chunk's order


@dataclass
class StageTimes:
    """Seconds of the current iteration by stage, as the driver sees them."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class Flight:
    """Rollouts that were submitted and not yet collected."""

    version: int  # of the weights that sample them
    submitted: tuple[Any, ...]  # the crew's own, a chunk each
    latents: dict[int, Any]  # chunk -> the crew's own


class Crew(ABC):
    ranks: int  # trainer ranks: chunks are dealt to them in contiguous runs
    samplers: int  # processes that sample
    weights_sha: str = ""  # of the last published weights
    unchanged: int = 0  # updates in a row that published what was published before

    @abstractmethod
    def roll_out(self, chunks: Sequence[Chunk], chain: Chain, of: int = 0) -> Iterator[Scored]:
        """Sample from the behaviour policy and score, in the order of `chunks`; latents stay with the crew.

        `of`: these chunks replace those of the same index among the `of` chunks of the iteration.
        """

    def submit(self, chunks: Sequence[Chunk], chain: Chain) -> Flight:
        """Begin `roll_out` with the weights that are published now, and return; only where samplers are processes of their own."""
        raise NotImplementedError

    def collect(self, flight: Flight) -> list[Scored]:
        """Wait for what was submitted; its latents become those that `update` trains on."""
        raise NotImplementedError

    def importance(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """[N] how much likelier the policy makes the collected rollouts than the one that sampled them, whose place it takes in
        their ratios; None where they are on policy, or the method has no ratios."""
        return None

    def republish(self, folder: Path, version: int) -> None:
        """Bring the older weights that `save` kept for rollouts in flight to the samplers again."""
        raise NotImplementedError

    @abstractmethod
    def generate(
        self, chunks: Sequence[Chunk], chain: Chain, which: str, names: Sequence[str] | None = None
    ) -> Iterator[Scored]:
        """Sample with weights base | ema | current; nothing is kept. Scored with all terms, gold ones too, or those named."""

    @abstractmethod
    def score(self, chunks: Sequence[Chunk], images: Sequence[Images], names: Sequence[str]) -> list[dict[str, Scores]]:
        """Scores of pictures that are there already, a chunk at a time, with the terms named."""

    @abstractmethod
    def update(self, requests: Sequence[UpdateRequest], chain: Chain) -> list[UpdateReport]:
        """Train on what `roll_out` sampled: one request a rank."""

    @abstractmethod
    def publish(self) -> None:
        """Bring the new behaviour policy to whoever samples."""

    @abstractmethod
    def probe(self, chunk: Chunk, chain: Chain) -> list[ProbeReport]:
        """Bare arithmetic, measured in all processes at the same time: samplers first, then trainers' own."""

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @abstractmethod
    def load(self, folder: Path) -> None: ...

    @abstractmethod
    def export(self, folder: Path, which: str) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


def deal(count: int, workers: int) -> list[range]:
    """Contiguous shares of `count` chunks, sizes differing by one at the most."""
    edges = [round(count * worker / workers) for worker in range(workers + 1)]
    return [range(start, end) for start, end in itertools.pairwise(edges)]


class LocalCrew(Crew):
    """Everything in this process."""

    ranks = samplers = 1

    def __init__(self, learner: Learner, scorer: Scorer, reward_names: Sequence[str], times: StageTimes):
        self.learner, self.scorer, self.reward_names, self.times = learner, scorer, list(reward_names), times

    def roll_out(self, chunks: Sequence[Chunk], chain: Chain, of: int = 0) -> Iterator[Scored]:
        for chunk in chunks:
            start = time.perf_counter()
            images = self.learner.sample(chunk, chain)
            sampled = time.perf_counter()
            scores = self.scorer.score(images.restorations(chunk), self.reward_names)
            self.times.add("sample", sampled - start)
            self.times.add("score", time.perf_counter() - sampled)
            yield Scored(chunk, images, scores)

    def generate(
        self, chunks: Sequence[Chunk], chain: Chain, which: str, names: Sequence[str] | None = None
    ) -> Iterator[Scored]:
        self.learner.load_scratch(which)
        for chunk in chunks:
            images = self.learner.sample_with(chunk, chain, which)
            yield Scored(chunk, images, self.scorer.score(images.restorations(chunk), names))
        self.learner.sampler.forget()

    def score(self, chunks: Sequence[Chunk], images: Sequence[Images], names: Sequence[str]) -> list[dict[str, Scores]]:
        return [self.scorer.score(item.restorations(chunk), names) for chunk, item in zip(chunks, images, strict=True)]

    def update(self, requests: Sequence[UpdateRequest], chain: Chain) -> list[UpdateReport]:
        start = time.perf_counter()
        reports = [self.learner.update(request, chain) for request in requests]
        self.times.add("update", time.perf_counter() - start)
        return reports

    def publish(self) -> None:
        """Nothing to do: the learner samples from its own weights."""

    def probe(self, chunk: Chunk, chain: Chain) -> list[ProbeReport]:
        return [self.learner.probe(chunk, chain)]

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)

    def export(self, folder: Path, which: str) -> None:
        self.learner.export(folder, which)

    def close(self) -> None:
        self.learner.close()
