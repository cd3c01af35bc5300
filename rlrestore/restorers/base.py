"""The one convention that samplers and losses speak.

State `z_t = (1 - t) z_0 + t eps`, `eps ~ N(0, I)`, t in [0, 1] with 1 = noise; velocity `v = eps - z_0`, so that
`z_0 = z_t - t v`. A family adapts its own parametrisation, scales and layouts here, at its edge, and nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rlrestore.diffusion.schedules import time_schedule


@dataclass(frozen=True)
class Condition:
    """What depends on the LQ photo alone: encoded once a group, shared by its K samples and all steps.

    Every tensor field of a subclass has the batch as its first axis; other fields are equal over the batch.
    """

    size: tuple[int, int]  # (H, W) of the photo in pixels, before padding

    def _map_tensors(self, function) -> Self:
        changed = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)

    def repeat(self, count: int) -> Self:
        """Each row `count` times in a row: group-major order, as rollouts are laid out."""
        return self._map_tensors(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def take(self, rows: slice | Tensor) -> Self:
        return self._map_tensors(lambda tensor: tensor[rows])

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        first = conditions[0]
        changed: dict[str, Any] = {
            field.name: torch.cat([getattr(condition, field.name) for condition in conditions])
            for field in dataclasses.fields(first)
            if isinstance(getattr(first, field.name), Tensor)
        }
        return dataclasses.replace(first, **changed)


class Restorer(ABC):
    """A conditional flow or diffusion model with its encode and decode. Not a module: an engine owns the denoiser.

    `denoiser` is the network that training moves. `velocity` takes another one of the same make (the old policy, the
    reference, an engine's wrapper) as `net`, so that there is one arithmetic for all of them.
    """

    denoiser: nn.Module
    multiple: int  # photo sides are padded to a multiple of this inside `condition`
    t_max: float = 1.0  # where sampling starts: below 1 for variance-preserving models
    colour_fix: str = "none"  # of `restorers.colour.FIXES`: what every decoded picture goes through before it is seen
    one_step: bool = False  # no schedule and no density: the network is defined at t = 1 alone
    trainable: tuple[str, ...] = ()  # patterns of the denoiser's parameters that training moves; () is all
    saves_frozen: bool = True  # whether `save` wants the denoiser's frozen parameters beside the trained ones

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @abstractmethod
    def to(self, device: torch.device | str, denoiser: bool = True) -> Self:
        """Move all networks; what is passed in must then be on that device, results are on it.

        Without `denoiser` that one stays where it is, for an engine that takes it from there.
        """

    @abstractmethod
    def condition(self, lq_BCHW: Tensor, types_B: Sequence[Collection[str]] = ()) -> Condition:
        """LQ photos [B, 3, H, W] in [0, 1] -> what the denoiser needs of them. No gradient.

        `types_B`: degradation types of each, for a restorer that is told what is wrong; () is unknown.
        """

    @abstractmethod
    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """Shape of one sample's latent, without the batch axis."""

    def times(self, steps: int, size: tuple[int, int]) -> list[float]:
        """The family's own schedule for photos of this size: steps + 1 falling times, the last one 0."""
        return time_schedule(steps, t_max=self.t_max).tolist()

    def endpoint(self, noise: Tensor, condition: Condition) -> Tensor:
        """What lies at t = 1 of the path that `noise` [B, *latent] stands for: the noise itself."""
        return noise

    def start(self, noise: Tensor, t: float, condition: Condition) -> Tensor:
        """The state at the first time of a schedule."""
        return self.endpoint(noise, condition)

    def training_time(self, t: float) -> float:
        """Where in the model's own range of times a forward-process point t in (0, 1] lies."""
        return t * self.t_max

    @abstractmethod
    def velocity(self, z_t: Tensor, t_B: Tensor, condition: Condition, net: nn.Module | None = None) -> Tensor:
        """v = eps - z_0 at [B, *latent] for times [B] float32; float32 out."""

    @abstractmethod
    def decode(self, z_0: Tensor, condition: Condition) -> Tensor:
        """Latent -> [B, 3, H, W] float32 in [0, 1], cropped to the photo's size."""

    @abstractmethod
    def encode(self, image_BCHW: Tensor, condition: Condition) -> Tensor:
        """Photos [B, 3, H, W] in [0, 1] -> latent z_0; the inverse of decode up to its clamp."""

    def twin(self, role: str) -> nn.Module:
        """Another frozen policy that starts as the denoiser is, for `role` scratch | old | reference | behaviour.

        Its named parameters include those that training moves. Here a whole copy.
        """
        return copy.deepcopy(self.denoiser).requires_grad_(False)

    def supervised_modules(self) -> dict[str, nn.Module]:
        """Networks that `rlrestore finetune` trains, by name."""
        return {"denoiser": self.denoiser}

    def supervised_loss(
        self, lq_BCHW: Tensor, gt_BCHW: Tensor, t_B: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of those networks that require gradients, a scalar, and what to log of it.

        Here flow matching (arXiv 2210.02747): mean_d (v - (eps - z_0))^2.
        """
        condition = self.condition(lq_BCHW)
        loss_B = self.flow_matching_error(self.encode(gt_BCHW, condition), condition, t_B, generator)
        return loss_B.mean(), {"flow": float(loss_B.detach().mean())}

    def flow_matching_error(self, z_0: Tensor, condition: Condition, t_B: Tensor, generator: torch.Generator) -> Tensor:
        eps = self.endpoint(torch.randn(z_0.shape, generator=generator).to(z_0.device), condition)
        t_B = torch.tensor([self.training_time(t) for t in t_B.tolist()], device=z_0.device)
        t = t_B.view(-1, *[1] * (z_0.ndim - 1))
        v = self.velocity((1 - t) * z_0 + t * eps, t_B, condition)
        return (v - (eps - z_0)).square().flatten(1).mean(1)

    @abstractmethod
    def save(self, folder: Path, denoiser: Mapping[str, Tensor] | None = None) -> None:
        """Write all that opens it again into an existing folder (safetensors and json only).

        `denoiser` replaces the denoiser's own parameters, by name.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 of the frozen parts: two restorers that differ here do not share checkpoints of the denoiser."""
