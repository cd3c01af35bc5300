"""The actors: each wraps one plain object and forwards calls. Heavy imports happen in `setup`, in the worker's process."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards.base import Scores
    from rewards.rubric import TermConfig
    from rlrestore.diffusion.sampling import Chain
    from rlrestore.types import Chunk, Images, Latents, ProbeReport, UpdateReport, UpdateRequest
    from rlrestore.weights import Published


def _quiet_threads(threads: int) -> None:
    from rlrestore.quiet import quiet

    quiet()
    import torch

    torch.set_num_threads(threads)


class TrainerWorker:
    """One trainer rank."""

    def address(self) -> tuple[str, int]:
        """(address that peers reach this node by, a port that is free now)."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def setup(self, recipe: Any, rank: int, world: int, address: str, port: int, threads: int, timeout_s: float) -> int:
        """Join the group and build the learner; returns the number of trainable parameters."""
        _quiet_threads(threads)
        from rlrestore.engine.group import join_group

        if world > 1 or recipe.engine == "deepspeed":
            join_group(rank, world, address, port, timeout_s)
        self.learner = recipe.build(rank, world)
        return sum(value.numel() for value in self.learner.base.values())

    def sample(self, chunk: Chunk, chain: Chain) -> Images:
        return self.learner.sample(chunk, chain)

    def load_scratch(self, which: str) -> None:
        self.learner.load_scratch(which)

    def sample_with(self, chunk: Chunk, chain: Chain, which: str) -> Images:
        return self.learner.sample_with(chunk, chain, which)

    def publish(self, which: str) -> Published | None:
        return self.learner.publish(which)

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

    def setup(self, restorer: Any, trainable: Sequence[str], threads: int) -> None:
        _quiet_threads(threads)
        from rlrestore.build import best_device, build_restorer
        from rlrestore.optimiser import select_trainable
        from rlrestore.rollout import Sampler

        self.sampler = Sampler(build_restorer(restorer).to(best_device()))
        self.network = self.sampler.restorer.denoiser
        self.names = select_trainable(self.network, trainable or self.sampler.restorer.trainable)
        self.network.requires_grad_(False)
        self.version, self.weights_sha = -1, ""

    def receive(self, published: Published) -> tuple[int, str]:
        """Load weights after checking them; returns the version and the sha256 of what is now in the network."""
        from rlrestore.weights import publish, receive

        receive(published, self.network, self.names, self.version)
        parameters = dict(self.network.named_parameters())
        held = publish({name: parameters[name] for name in self.names}, published.version)
        self.version, self.weights_sha = published.version, held.sha256
        self.sampler.forget()
        return self.version, self.weights_sha

    def sample(self, chunk: Chunk, chain: Chain, version: int) -> tuple[Images, Latents]:
        from rlrestore.weights import SyncError

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
        from rlrestore.scoring import Scorer

        self.scorer = Scorer(terms, lambda term: build_reward(term.kind, term.params), replaces)

    def score(self, chunk: Chunk, images: Images, names: Sequence[str] | None) -> tuple[dict[str, Scores], int]:
        """Scores by term, and how many hung calls this process has left behind."""
        return self.scorer.score(images.restorations(chunk), names), self.scorer.abandoned

    def pid(self) -> int:
        return os.getpid()
