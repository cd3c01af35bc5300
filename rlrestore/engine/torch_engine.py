"""The plain engine: torch AdamW, float32, gradients added over ranks by one all-reduce a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlrestore.checkpoint import load_tensors, save_tensors
from rlrestore.engine.base import Engine, EngineOptions, NonFiniteError
from rlrestore.engine.group import forget_rendezvous
from rlrestore.learning.optimiser import adamw, load_optimiser_tensors, optimiser_tensors, set_lr


class TorchEngine(Engine):
    def __init__(self, network: nn.Module, options: EngineOptions, rank: int, world: int):
        self.network, self.options, self.rank, self.world = network, options, rank, world
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.optimiser = adamw(self.parameters.values(), options.lr, options.betas, options.weight_decay)

    def backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {float(loss.detach())}")
        loss.backward()

    def step(self, lr: float) -> float:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        if self.world > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.options.grad_clip or float("inf"))
        if not torch.isfinite(norm):
            self.optimiser.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the gradient norm is {float(norm)}")
        set_lr(self.optimiser, lr)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def stream_parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.parameters[name].detach()) for name in (self.parameters if names is None else names))

    def save(self, folder: Path) -> None:
        if self.rank == 0:  # ranks hold the same state
            save_tensors(folder / "parameters.safetensors", dict(self.stream_parameters()))
            save_tensors(folder / "optimiser.safetensors", optimiser_tensors(self.optimiser, self.names))
        if self.world > 1:
            dist.barrier()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        for name, value in load_tensors(folder / "parameters.safetensors").items():
            self.parameters[name].copy_(value)
        load_optimiser_tensors(self.optimiser, self.names, load_tensors(folder / "optimiser.safetensors"))

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():  # one rank has joined none, and leaves another engine's alone
            dist.destroy_process_group()
            forget_rendezvous()
