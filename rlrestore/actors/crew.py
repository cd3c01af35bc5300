"""The crew on Ray, `colocated` and `separate`.

colocated: each trainer rank samples its share of the chunks and keeps their latents. separate: rollout actors sample from
published weights, and latents travel to the ranks through the object store. Rewards have workers of their own in both; a
chunk is sent to them when it is submitted for sampling, so that it is scored as soon as it exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from torch import Tensor

from rewards.base import Scores
from rewards.rubric import TermConfig
from rlrestore.actors.cluster import fetch, reserve, spawn, start_ray
from rlrestore.actors.rewards import RewardPool, RewardPools
from rlrestore.actors.workers import RewardWorker, RolloutWorker, TrainerWorker
from rlrestore.config.sections import PlacementConfig, RayConfig
from rlrestore.crew import Crew, Flight, Scored, StageTimes, deal
from rlrestore.diffusion.sampling import Chain
from rlrestore.learning.weights import Published, SyncError
from rlrestore.placement import pools, split_terms, total
from rlrestore.types import Chunk, Images, ProbeReport, UpdateReport, UpdateRequest

if TYPE_CHECKING:
    from rlrestore.build import LearnerRecipe


class RayCrew(Crew):
    def __init__(
        self,
        recipe: LearnerRecipe,
        terms: Mapping[str, TermConfig],
        reward_names: Sequence[str],
        placement: PlacementConfig,
        ray_config: RayConfig,
        times: StageTimes,
        ahead: int = 0,
        corrects: bool = False,
    ):
        """`ahead`: iterations that may be in flight; `corrects`: stale rollouts have ratios, which need a new anchor."""
        self.placement, self.times = placement, times
        self.reward_names, self.all_names = tuple(reward_names), tuple(terms)
        self.ranks = placement.ranks
        self.separate = placement.kind == "separate"
        self.samplers = placement.rollout_actors if self.separate else placement.ranks
        self.limit_s = placement.stage_timeout_s
        self.version = -1  # of the published weights
        self.latents: dict[int, Any] = {}  # chunk -> ref, of `separate`; none once the trainers hold them
        self.ahead, self.corrects = ahead, corrects
        self.collected_version = 0  # of the weights that sampled `latents`
        self.history: dict[int, list[Any]] = {}  # version -> refs of its buckets, as far back as rollouts in flight
        self.arriving: list[tuple[Published, list[Any]]] = []  # buckets on their way to the samplers, and their answers
        self.next_key = 0  # of a chunk at the reward workers
        self.owns_ray = not ray.is_initialized()  # who started Ray ends it
        start_ray(ray_config, total(pools(placement))["CPU"], placement.start_timeout_s)
        self.reservation = reserve(placement)
        try:
            self._start(recipe, terms)
        except BaseException:
            self.close()
            raise

    def _start(self, recipe: LearnerRecipe, terms: Mapping[str, TermConfig]) -> None:
        placement, start_s = self.placement, self.placement.start_timeout_s
        world, groups = placement.ranks, self.reservation.groups
        self.trainers = [spawn(TrainerWorker, groups["trainer ranks"], bundle) for bundle in self.reservation.trainers]
        self.rollouts = [
            spawn(RolloutWorker, groups["rollout actors"], index)
            for index in range(self.samplers if self.separate else 0)
        ]
        self.rewards = RewardPools({
            pool: RewardPool(
                partial(spawn, RewardWorker, groups[pool]), groups[pool].bundle_count,
                {name: terms[name] for name in names}, 1, start_s,
            )
            for pool, names in split_terms(list(terms), placement).items()
        })  # fmt: skip
        address, port = fetch(self.trainers[0].address.remote(), start_s, "the start of trainer rank 0")
        peers = self.reservation.peers("trainer ranks")
        starting = [
            trainer.setup.remote(recipe, rank, world, address, port, placement.threads, peers[bundle], self.limit_s)
            for rank, (trainer, bundle) in enumerate(zip(self.trainers, self.reservation.trainers, strict=True))
        ]
        if self.separate:
            starting += [
                rollout.setup.remote(
                    recipe.restorer, recipe.trainable, placement.threads, peers, recipe.options.precision
                )
                for rollout, peers in zip(self.rollouts, self.reservation.peers("rollout actors"), strict=True)
            ]
        fetch(starting, start_s, "the start of trainers and rollout workers (placement.start_timeout_s)")
        fetch(self.rewards.ready, start_s, "the start of reward workers (placement.start_timeout_s)")
        self.publish()

    # -- sampling and scoring --------------------------------------------------------------------------------------

    def roll_out(self, chunks: Sequence[Chunk], chain: Chain, of: int = 0) -> Iterator[Scored]:
        others = dict(self.latents) if of else {}
        self.latents.clear()
        yield from self.collect(self.submit(chunks, chain, of))
        self.latents = {**others, **self.latents}

    def submit(self, chunks: Sequence[Chunk], chain: Chain, of: int = 0) -> Flight:
        chain_ref = ray.put(chain)
        submitted, latents = [], {}
        # by index, so that a chunk that replaces another one goes to the rank that will train it
        shares = enumerate(deal(of or len(chunks), self.samplers))
        worker_of = {index: worker for worker, share in shares for index in share}
        for chunk in chunks:
            chunk_ref, worker = ray.put(chunk), worker_of[chunk.index]
            if self.separate:
                images_ref, latents[chunk.index] = (
                    self.rollouts[worker].sample.options(num_returns=2).remote(chunk_ref, chain_ref, self.version)
                )
            else:
                images_ref = self.trainers[worker].sample.remote(chunk_ref, chain_ref)
            submitted.append((chunk, chunk_ref, images_ref))
        return Flight(self.version, self._queue(submitted, self.reward_names, self.samplers), latents)

    def collect(self, flight: Flight) -> list[Scored]:
        self._confirm(flight.version)
        scored = self._gather(flight.submitted)
        self.latents, self.collected_version = dict(flight.latents), flight.version
        return scored

    def generate(
        self, chunks: Sequence[Chunk], chain: Chain, which: str, names: Sequence[str] | None = None
    ) -> Iterator[Scored]:
        """Trainer ranks do it in both placements: they hold the base and the EMA."""
        fetch(
            [trainer.load_scratch.remote(which) for trainer in self.trainers], self.limit_s, f"loading {which} weights"
        )
        chain_ref = ray.put(chain)
        submitted, idle = [], []
        shares = deal(len(chunks), self.ranks)
        for worker, share in enumerate(shares):
            for index in share:
                chunk_ref = ray.put(chunks[index])
                images_ref = self.trainers[worker].sample_with.remote(chunk_ref, chain_ref, which)
                submitted.append((chunks[index], chunk_ref, images_ref))
            # An adapter under ZeRO-3 is asked by all ranks or by none: who has fewer chunks samples one for nobody.
            for _ in range(max(map(len, shares)) - len(share)):
                idle.append(self.trainers[worker].sample_with.remote(chunks[0], chain_ref, which))
        yield from self._gather(self._queue(submitted, self.all_names if names is None else names, self.ranks))
        fetch(idle, self.limit_s, "sampling beside the others")

    def score(self, chunks: Sequence[Chunk], images: Sequence[Images], names: Sequence[str]) -> list[dict[str, Scores]]:
        sent = [(chunk, ray.put(chunk), ray.put(item)) for chunk, item in zip(chunks, images, strict=True)]
        return [self.rewards.collect(key) for key, _, _ in self._queue(sent, names, 1)]

    def _queue(
        self, submitted: Sequence[tuple[Chunk, Any, Any]], names: Sequence[str], samplers: int
    ) -> tuple[tuple[int, Chunk, Any], ...]:
        """To the reward workers in the order in which `samplers` finish (round by round); (key, chunk, images) in chunk order."""
        workers = self.rewards.cycle
        first = -(-self.next_key // workers) * workers  # whichever iteration: a chunk's worker follows from its place
        self.next_key = first + len(submitted)
        for place in _round_robin(deal(len(submitted), samplers)):
            chunk, chunk_ref, images_ref = submitted[place]
            self.rewards.submit(first + place, chunk, chunk_ref, images_ref, names)
        return tuple((first + place, chunk, images_ref) for place, (chunk, _, images_ref) in enumerate(submitted))

    def _gather(self, queued: Sequence[tuple[int, Chunk, Any]]) -> list[Scored]:
        start = time.perf_counter()
        ready = [fetch(images_ref, self.limit_s, f"sampling chunk {chunk.index}") for _, chunk, images_ref in queued]
        sampled = time.perf_counter()
        scored = [
            Scored(chunk, images, self.rewards.collect(key))
            for (key, chunk, _), images in zip(queued, ready, strict=True)
        ]
        self.times.add("sample", sampled - start)
        self.times.add("score", time.perf_counter() - sampled)  # what sampling did not hide
        return scored

    # -- training and weights ----------------------------------------------------------------------------------------

    def importance(self, chunks: Sequence[Chunk]) -> Tensor | None:
        if not self.corrects or self.collected_version == self.version:
            return None
        start = time.perf_counter()
        shares = [[chunks[index] for index in share] for share in deal(len(chunks), self.ranks)]
        refs = [
            trainer.reanchor.remote(share, *(self.latents[chunk.index] for chunk in share))
            for trainer, share in zip(self.trainers, shares, strict=True)
        ]
        found = fetch(refs, self.limit_s, "the importance of rollouts")
        self.latents.clear()
        self.times.add("reanchor", time.perf_counter() - start)
        return torch.cat([values for share in found for values in share])

    def update(self, requests: Sequence[UpdateRequest], chain: Chain) -> list[UpdateReport]:
        start = time.perf_counter()
        refs = []
        for trainer, request in zip(self.trainers, requests, strict=True):
            latents = [self.latents[chunk.index] for chunk in request.chunks] if self.latents else []
            refs.append(trainer.update.remote(request, chain, *latents))
        reports = fetch(refs, self.limit_s, f"the update of iteration {requests[0].iteration}")
        self.latents.clear()
        self.times.add("update", time.perf_counter() - start)
        return reports

    def publish(self) -> None:
        if not self.separate:
            return
        start = time.perf_counter()
        first = self._publish(0)
        parts = [first, *(self._publish(bucket) for bucket in range(1, first.buckets))]
        moved, before = first.version > self.version >= 0, self.weights_sha
        self._serve(parts)
        self.unchanged = self.unchanged + 1 if moved and self.weights_sha == before else 0
        if self.unchanged:
            warnings.warn(
                f"{self.unchanged} update(s) in a row changed no published weight (version {first.version}): all groups were "
                "dropped, the learning rate is 0, or nothing that is published is trained",
                stacklevel=2,
            )
        self.times.add("publish", time.perf_counter() - start)

    def republish(self, folder: Path, version: int) -> None:
        blobs = [path.read_bytes() for path in sorted(folder.glob(f"{_behind(version)}_*.safetensors"))]
        parts = [
            Published(
                version, hashlib.sha256(blob).hexdigest(), blob, bucket, len(blobs)
            )  # the manifest vouched for the files
            for bucket, blob in enumerate(blobs)
        ]
        for part in parts:
            self._send(ray.put(part), part)
        self._serve(parts)

    def _publish(self, bucket: int) -> Published:
        """From the ranks to the rollout workers, through the object store."""
        refs = [trainer.publish.remote("behaviour", bucket) for trainer in self.trainers]
        published = fetch(refs[0], self.limit_s, "gathering weights")
        fetch(refs[1:], self.limit_s, "gathering weights")
        self._send(refs[0], published)
        if not self.ahead:  # otherwise the samplers are busy: they are asked once their rollouts are collected
            self._confirm(published.version)
        return replace(published, blob=b"")

    def _send(self, ref: Any, published: Published) -> None:
        self.arriving.append((replace(published, blob=b""), [worker.receive.remote(ref) for worker in self.rollouts]))
        if self.ahead:
            before = self.history.get(published.version, []) if published.bucket else []
            self.history[published.version] = [*before, ref]

    def _serve(self, parts: Sequence[Published]) -> None:
        """From now on rollouts are sampled by these weights."""
        self.version = parts[0].version
        self.weights_sha = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
        self.history = {v: refs for v, refs in self.history.items() if v >= self.version - self.ahead}

    def _confirm(self, version: int) -> None:
        """What arrived, up to `version`, is compared with what was sent. Samplers do one thing after the other."""
        while self.arriving and self.arriving[0][0].version <= version:
            published, answers = self.arriving.pop(0)
            for held, sha256 in fetch(answers, self.limit_s, "publishing weights"):
                if (held, sha256) != (published.version, published.sha256):
                    raise SyncError(
                        f"a rollout worker holds version {held} ({sha256[:16]}) after version {published.version} "
                        f"({published.sha256[:16]}) was published"
                    )

    def probe(self, chunk: Chunk, chain: Chain) -> list[ProbeReport]:
        trainers = fetch(
            [worker.probe.remote(chunk, chain) for worker in self.trainers], self.limit_s, "the speed probe"
        )
        if not self.separate:
            return trainers
        samplers = fetch(
            [worker.probe.remote(chunk, chain) for worker in self.rollouts], self.limit_s, "the speed probe"
        )
        return [replace(report, encode_task_s=0.0, sample_chunk_s=0.0) for report in trainers] + samplers

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        fetch([trainer.save.remote(str(folder.resolve())) for trainer in self.trainers], self.limit_s, "saving")
        for version, refs in self.history.items():
            if version != self.version:
                for bucket, published in enumerate(fetch(refs, self.limit_s, "saving weights that still sample")):
                    (folder / f"{_behind(version)}_{bucket:04d}.safetensors").write_bytes(published.blob)

    def load(self, folder: Path) -> None:
        fetch(
            [trainer.load.remote(str(folder.resolve())) for trainer in self.trainers],
            self.limit_s,
            "loading a checkpoint",
        )

    def export(self, folder: Path, which: str) -> None:
        refs = [trainer.export.remote(str(folder.resolve()), which) for trainer in self.trainers]
        fetch(refs, self.limit_s, "exporting weights")

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a crew that is already broken must still be taken down
            ray.get([trainer.close.remote() for trainer in getattr(self, "trainers", [])], timeout=10)
        with contextlib.suppress(Exception):
            self.reservation.release()
        if self.owns_ray:
            ray.shutdown()


def _behind(version: int) -> str:
    """Files of a checkpoint with older weights, by which rollouts in flight are sampled."""
    return f"sampling_{version:06d}"


def _round_robin(shares: Sequence[range]) -> list[int]:
    """First of each share, then second of each, ...: the order in which parallel samplers finish."""
    longest = max(map(len, shares), default=0)
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]
