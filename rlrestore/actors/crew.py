"""The crew on Ray, `colocated` and `separate`.

colocated: each trainer rank samples its share of the chunks and keeps their latents. separate: rollout actors sample from
published weights, and latents travel to the ranks through the object store. Rewards have workers of their own in both; a
chunk is sent to them when it is submitted for sampling, so that it is scored as soon as it exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rewards.base import Scores
from rewards.rubric import TermConfig
from rlrestore.actors.cluster import bundle_list, fetch, node_order, remove_placement_group, reserve, spawn, start_ray
from rlrestore.actors.rewards import RewardPool
from rlrestore.actors.workers import RewardWorker, RolloutWorker, TrainerWorker
from rlrestore.config import PlacementConfig, RayConfig
from rlrestore.crew import Crew, Scored, StageTimes, deal
from rlrestore.diffusion.sampling import Chain
from rlrestore.types import Chunk, Images, ProbeReport, UpdateReport, UpdateRequest
from rlrestore.weights import Published, SyncError

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
    ):
        self.placement, self.times = placement, times
        self.reward_names, self.all_names = tuple(reward_names), tuple(terms)
        self.ranks = placement.ranks
        self.separate = placement.kind == "separate"
        self.samplers = placement.rollout_actors if self.separate else placement.ranks
        self.limit_s = placement.stage_timeout_s
        self.version = -1  # of the published weights
        self.latents: dict[int, Any] = {}  # chunk -> ref, of `separate`
        self.owns_ray = not ray.is_initialized()  # who started Ray ends it
        start_ray(ray_config, sum(bundle["CPU"] for bundle in bundle_list(placement)))
        self.group = reserve(placement)
        try:
            self._start(recipe, terms)
        except BaseException:
            self.close()
            raise

    def _start(self, recipe: LearnerRecipe, terms: Mapping[str, TermConfig]) -> None:
        placement, start_s = self.placement, self.placement.start_timeout_s
        gpus, world = float(placement.gpus), placement.ranks
        threads = placement.threads or max(1, (os.cpu_count() or 1) // max(world, self.samplers))
        order = node_order(self.group, range(world))
        self.trainers = [spawn(TrainerWorker, self.group, bundle, placement.rank_cpus, gpus) for bundle in order]
        self.rollouts = [
            spawn(RolloutWorker, self.group, world + index, placement.rollout_cpus, gpus)
            for index in range(self.samplers if self.separate else 0)
        ]
        first_reward = world + len(self.rollouts)
        self.rewards = RewardPool(
            lambda index: spawn(RewardWorker, self.group, first_reward + index, placement.reward_cpus, 0.0),
            placement.reward_workers, terms, 1, start_s,
        )  # fmt: skip
        address, port = fetch(self.trainers[0].address.remote(), start_s, "the start of trainer rank 0")
        starting = [
            trainer.setup.remote(recipe, rank, world, address, port, threads, self.limit_s)
            for rank, trainer in enumerate(self.trainers)
        ] + [
            rollout.setup.remote(recipe.restorer, recipe.trainable, threads, recipe.options.precision)
            for rollout in self.rollouts
        ]
        fetch(starting, start_s, "the start of trainers and rollout workers (placement.start_timeout_s)")
        fetch(self.rewards.ready, start_s, "the start of reward workers (placement.start_timeout_s)")
        self.publish()

    # -- sampling and scoring --------------------------------------------------------------------------------------

    def roll_out(self, chunks: Sequence[Chunk], chain: Chain) -> Iterator[Scored]:
        self.latents.clear()
        chain_ref = ray.put(chain)
        submitted = []
        for worker, share in enumerate(deal(len(chunks), self.samplers)):
            for index in share:
                chunk_ref = ray.put(chunks[index])
                if self.separate:
                    images_ref, self.latents[chunks[index].index] = (
                        self.rollouts[worker].sample.options(num_returns=2).remote(chunk_ref, chain_ref, self.version)
                    )
                else:
                    images_ref = self.trainers[worker].sample.remote(chunk_ref, chain_ref)
                submitted.append((chunks[index], chunk_ref, images_ref))
        yield from self._score(submitted, self.reward_names, self.samplers)

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
        yield from self._score(submitted, self.all_names if names is None else names, self.ranks)
        fetch(idle, self.limit_s, "sampling beside the others")

    def score(self, chunks: Sequence[Chunk], images: Sequence[Images], names: Sequence[str]) -> list[dict[str, Scores]]:
        for key, (chunk, item) in enumerate(zip(chunks, images, strict=True)):
            self.rewards.submit(key, chunk, ray.put(chunk), ray.put(item), names)
        return [self.rewards.collect(key) for key in range(len(chunks))]

    def _score(
        self, submitted: Sequence[tuple[Chunk, Any, Any]], names: Sequence[str], samplers: int
    ) -> Iterator[Scored]:
        """Queue on reward workers in the order in which the samplers finish (round by round), yield in chunk order."""
        start = time.perf_counter()
        for key in _round_robin(deal(len(submitted), samplers)):
            chunk, chunk_ref, images_ref = submitted[key]
            self.rewards.submit(key, chunk, chunk_ref, images_ref, names)
        ready = [fetch(images_ref, self.limit_s, f"sampling chunk {chunk.index}") for chunk, _, images_ref in submitted]
        sampled = time.perf_counter()
        scored = [
            Scored(chunk, images, self.rewards.collect(key))
            for key, ((chunk, _, _), images) in enumerate(zip(submitted, ready, strict=True))
        ]
        self.times.add("sample", sampled - start)
        self.times.add("score", time.perf_counter() - sampled)  # what sampling did not hide
        yield from scored

    # -- training and weights ----------------------------------------------------------------------------------------

    def update(self, requests: Sequence[UpdateRequest], chain: Chain) -> list[UpdateReport]:
        start = time.perf_counter()
        refs = []
        for trainer, request in zip(self.trainers, requests, strict=True):
            latents = [self.latents[chunk.index] for chunk in request.chunks] if self.separate else []
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
        rest = [self._publish(bucket) for bucket in range(1, first.buckets)]
        sha256 = hashlib.sha256("".join(part.sha256 for part in (first, *rest)).encode()).hexdigest()
        moved = first.version > self.version >= 0
        self.unchanged = self.unchanged + 1 if moved and sha256 == self.weights_sha else 0
        if self.unchanged:
            warnings.warn(
                f"{self.unchanged} update(s) in a row changed no published weight (version {first.version}): all groups were "
                "dropped, the learning rate is 0, or nothing that is published is trained",
                stacklevel=2,
            )
        self.version, self.weights_sha = first.version, sha256
        self.times.add("publish", time.perf_counter() - start)

    def _publish(self, bucket: int) -> Published:
        """From the ranks to the rollout workers, through the object store; what arrived is compared with what was sent."""
        refs = [trainer.publish.remote("behaviour", bucket) for trainer in self.trainers]
        published = fetch(refs[0], self.limit_s, "gathering weights")
        fetch(refs[1:], self.limit_s, "gathering weights")
        answers = fetch(
            [worker.receive.remote(refs[0]) for worker in self.rollouts], self.limit_s, "publishing weights"
        )
        for version, sha256 in answers:
            if (version, sha256) != (published.version, published.sha256):
                raise SyncError(
                    f"a rollout worker holds version {version} ({sha256[:16]}) after version {published.version} "
                    f"({published.sha256[:16]}) was published"
                )
        return published

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
            remove_placement_group(self.group)
        if self.owns_ray:
            ray.shutdown()


def _round_robin(shares: Sequence[range]) -> list[int]:
    """First of each share, then second of each, ...: the order in which parallel samplers finish."""
    longest = max(map(len, shares), default=0)
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]
