"""AdamW and its state as plain tensors, so that checkpoints need no pickle; and the EMA of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def select_trainable(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Set requires_grad by name (`re.search`, any of the patterns; none means all) and return the trainable names.

    ValueError if a pattern matches nothing.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"engine.trainable: no parameter matches {pattern!r}; names look like {names[0]} and {names[-1]}"
            )
    chosen = [name for name in names if not patterns or any(re.search(pattern, name) for pattern in patterns)]
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in set(chosen))
    return chosen


STATES = ("exp_avg", "exp_avg_sq", "step")


def adamw(parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
    return torch.optim.AdamW(parameters, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)


def adamw8bit(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW whose moments have 8 bits (arXiv 2110.02861), of the optional package bitsandbytes."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """AdamW state by parameter name: "NAME/exp_avg" and so on. Empty before the first step."""
    return {
        f"{name}/{key}": optimiser.state[parameter][key].detach().clone()
        for parameter, name in names.items()
        if parameter in optimiser.state
        for key in STATES
    }


def load_optimiser_tensors(
    optimiser: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    optimiser.state.clear()
    if not tensors:
        return
    for parameter, name in names.items():
        if f"{name}/step" in tensors:  # a parameter that never had a gradient has no state
            optimiser.state[parameter] = {
                key: tensors[f"{name}/{key}"].clone().to(parameter.device if key != "step" else "cpu") for key in STATES
            }


class Ema:
    """float32 shadow of parameters; `update` with decay d: shadow <- d shadow + (1 - d) parameter."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.shadow = {name: value.detach().float().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        for name, value in parameters.items():
            self.shadow[name].lerp_(value.detach().float(), 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        assert tensors.keys() == self.shadow.keys()
        for name, value in tensors.items():
            self.shadow[name].copy_(value)
