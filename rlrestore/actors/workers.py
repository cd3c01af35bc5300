"""The actors: each wraps one plain object and forwards calls. Heavy imports happen in `setup`, in the worker's process."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rewards.base import Scores
    from rewards.rubric import TermConfig
    from rlrestore.diffusion.sampling import Chain
    from rlrestore.learning.weights import Published
    from rlrestore.types import Chunk, Images, Latents, ProbeReport, UpdateReport, UpdateRequest


def _quiet_threads(threads: int, peers: int = 1) -> None:
    """`threads` of torch; 0 shares this node's cores with its `peers`, which work at the same time."""
    from rlrestore.quiet import quiet

    quiet()
    import torch

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // peers))


class TrainerWorker:
    """One trainer rank."""

    def address(self) -> tuple[str, int]:
        """(address that peers reach this node by, a port that is free now)."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def setup(
        self, recipe: Any, rank: int, world: int, address: str, port: int, threads: int, peers: int, timeout_s: float
    ) -> int:
        """Join the group and build the learner; returns the number of trainable parameters."""
        _quiet_threads(threads, peers)
        from rlrestore.engine.group import join_group

        if world > 1 or recipe.engine == "deepspeed":
            join_group(rank, world, address, port, timeout_s)
        self.learner = recipe.build(rank, world)
        return self.learner.trained

    def sample(self, chunk: Chunk, chain: Chain) -> Images:
        return self.learner.sample(chunk, chain)

    def load_scratch(self, which: str) -> None:
        self.learner.load_scratch(which)

    def sample_with(self, chunk: Chunk, chain: Chain, which: str) -> Images:
        return self.learner.sample_with(chunk, chain, which)

    def publish(self, which: str, bucket: int) -> Published | None:
        return self.learner.publish(which, bucket)

    def reanchor(self, chunks: Sequence[Chunk], *latents: Latents) -> list[Tensor]:
        self.learner.give(latents)
        return self.learner.reanchor(chunks)

    def update(self, request: UpdateRequest, chain: Chain, *latents: Latents) -> UpdateReport:
        self.learner.give(latents)
        return self.learner.update(request, chain)

    def probe(self, chunk: Chunk, chain: Chain) -> ProbeReport:
        return self.learner.probe(chunk, chain)

    def save(self, folder: str) -> None:
        self.learner.save(Path(folder))

    def load(self, folder: str) -> None:
        self.learner.load(Path(folder))

    def export(self, folder: str, which: str) -> None:
        self.learner.export(Path(folder), which)

    def close(self) -> None:
        self.learner.close()


class RolloutWorker:
    """A restorer with a copy of the weights. It refuses to serve a version that it does not hold."""

    def setup(
        self, restorer: Any, trainable: Sequence[str], threads: int, peers: int, precision: str = "float32"
    ) -> None:
        """`precision`: the engine's, so that this copy computes as the trainers' network does."""
        _quiet_threads(threads, peers)
        import torch

        from rlrestore.build import best_device, build_restorer
        from rlrestore.iteration.rollout import Sampler
        from rlrestore.learning.optimiser import select_trainable

        self.sampler = Sampler(build_restorer(restorer).to(best_device()))
        self.network = self.sampler.restorer.denoiser
        self.names = select_trainable(self.network, trainable or self.sampler.restorer.trainable)
        self.network.requires_grad_(False)
        if precision == "bfloat16":
            self.network.to(torch.bfloat16)
        self.version, self.weights_sha = -1, ""
        self.newest, self.expected = -1, 0  # version of the newest bucket, and which bucket is due

    def receive(self, published: Published) -> tuple[int, str]:
        """Load one bucket after checking it; returns the version and the sha256 of what is now in the network.

        Between the first bucket and the last this worker holds a mixture, and serves nothing.
        """
        from rlrestore.learning.weights import SyncError, bucket_names, held_sha256, receive

        shapes = {name: p.shape for name, p in self.network.named_parameters() if name in set(self.names)}
        buckets = bucket_names(shapes)
        if (published.bucket, published.buckets) != (self.expected, len(buckets)):
            raise SyncError(
                f"bucket {published.bucket} of {published.buckets} came where {self.expected} of {len(buckets)} was due"
            )
        receive(published, self.network, buckets[published.bucket], self.newest)
        sha256 = held_sha256(published, self.network)
        last = published.bucket == len(buckets) - 1
        self.expected = 0 if last else published.bucket + 1
        self.newest, self.version = published.version, published.version if last else -1
        self.weights_sha = sha256
        self.sampler.forget()
        return published.version, sha256

    def sample(self, chunk: Chunk, chain: Chain, version: int) -> tuple[Images, Latents]:
        from rlrestore.learning.weights import SyncError

        if self.version != version:
            raise SyncError(
                f"this rollout worker holds weights version {self.version}, version {version} was asked for"
            )
        return self.sampler.sample(chunk, chain, self.network, self.version, self.weights_sha[:16])

    def probe(self, chunk: Chunk, chain: Chain) -> ProbeReport:
        return self.sampler.probe(chunk, chain, self.network)


class RewardWorker:
    """The whole mix in one process."""

    def setup(self, terms: Mapping[str, TermConfig], threads: int, replaces: bool = False) -> None:
        _quiet_threads(threads)
        from rewards.registry import build_reward
        from rlrestore.iteration.scoring import Scorer

        self.scorer = Scorer(terms, lambda term: build_reward(term.kind, term.params), replaces)

    def score(self, chunk: Chunk, images: Images, names: Sequence[str] | None) -> tuple[dict[str, Scores], int]:
        """Scores by term, and how many hung calls this process has left behind."""
        return self.scorer.score(images.restorations(chunk), names), self.scorer.abandoned

    def pid(self) -> int:
        return os.getpid()
