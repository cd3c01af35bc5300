"""What moves the weights: one interface over plain torch and DeepSpeed.

An engine owns the denoiser, its optimiser and the gradient. `network` is what a forward goes through. The caller owns
accumulation: any number of `backward`, then one `step`. Losses are scaled by the caller so that the SUM over ranks and
backwards is the loss to minimise; the engine adds gradients over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite: nothing was updated, published or saved."""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine needs of the config, the same on all ranks."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float  # global norm, 0 for none
    zero: int
    precision: str  # of the weights: float32 | bfloat16
    micro_batch: int
    partition_threshold: int = 100_000  # ZeRO-3 leaves parameters with fewer elements whole
    optimiser: str = "adamw"  # adamw | adamw8bit
    offload: str = "none"  # to the host's memory: none | optimiser | weights (ZeRO-3: the shards, too)


class Engine(ABC):
    network: nn.Module
    rank: int
    world: int

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar; NonFiniteError if it is not finite."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """One optimiser step on what was accumulated; returns the global gradient norm before clipping.

        NonFiniteError if the gradient is not finite, with the weights as they were.
        """

    @abstractmethod
    def stream_parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole trainable parameters (or those of `names`) one by one, detached, float32 (master weights).

        Collective: consume it to its end on every rank.
        """

    @torch.no_grad()
    def assign(self, network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write whole values into parameters that are not the optimiser's, by name: a copy's or a frozen adapter's.

        Collective, because a frozen adapter of the network may be sharded with it, and the values as well.
        """
        parameters = dict(network.named_parameters())
        for name, value in weights:
            parameters[name].copy_(value)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Weights and optimiser of this rank into an existing folder on shared storage. Collective."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """The state that `save` wrote at the same world size. Collective."""

    @abstractmethod
    def close(self) -> None:
        """Leave the process group, if any."""
