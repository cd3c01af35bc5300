"""LoRA through peft: several adapters on one network, and each of them seen as a policy of its own.

The trained adapter is called `default`, as diffusers expects. Copies of the policy (the old one, the reference, the
scratch of evaluation) are further adapters of the same rank: megabytes beside one frozen network, not a second one.
Adapters must exist before DeepSpeed sees the network.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

DEFAULT = "default"
TRAINED = (rf"\.lora_[AB]\.{DEFAULT}\.",)  # pattern of the parameters that training moves


@dataclass(frozen=True)
class LoraSpec:
    """`targets` are patterns of whole module names or of their ends; alpha / rank scales the adapter's output."""

    rank: int
    alpha: int
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"restorer.lora_rank={self.rank} and lora_alpha={self.alpha} must be at least 1")


def matched_modules(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear and convolution layers that the targets mean. ValueError if one of them means nothing."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in layers if re.search(rf"(^|\.)(?:{target})$", name)]
        if not found:
            raise ValueError(
                f"restorer.lora_targets: no linear or convolution layer is called '{target}'; layers are called like "
                f"{', '.join(layers[: len(layers) // 2 + 1 : max(1, len(layers) // 4)])}"
            )
        chosen.update(found)
    return [name for name in layers if name in chosen]


def add_lora(network: nn.Module, spec: LoraSpec, seed: int) -> None:
    """Put the trained adapter onto a diffusers model: Gaussian A from `seed`, B = 0, so that nothing changes yet."""
    modules = matched_modules(network, spec.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _add(network, _peft_config(spec, modules), DEFAULT)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(re.search(TRAINED[0], name) is not None)


class Policy(nn.Module):
    """One adapter of a shared network, called like the network: its parameters are that adapter's, named as `default`.

    The network is not a submodule, so that it is neither copied nor frozen with its views. Calls from several threads
    would disturb one another.
    """

    def __init__(self, network: nn.Module, adapter: str):
        super().__init__()
        self.adapter = adapter
        self._shared = (network,)
        self._layers = tuple(_lora_layers(network))

    @property
    def network(self) -> nn.Module:
        return self._shared[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _activate(self._layers, self.adapter)
        try:
            return self.network(*args, **kwargs)
        finally:
            _activate(self._layers, DEFAULT)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        mark = re.compile(rf"\.(lora_[AB])\.{self.adapter}\.")
        for name, parameter in self.network.named_parameters():
            if mark.search(name):
                yield mark.sub(rf".\1.{DEFAULT}.", name), parameter


@torch.no_grad()
def new_policy(network: nn.Module, adapter: str) -> Policy:
    """A frozen copy of the trained adapter of every part of `network` that has one."""
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for part in network.children():
        configs = getattr(part, "peft_config", None)
        if configs is not None and adapter not in configs:
            _add(part, configs[DEFAULT], adapter)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(flags.get(name, False))
    policy = Policy(network, adapter)
    trained = dict(Policy(network, DEFAULT).named_parameters())
    for name, parameter in policy.named_parameters():
        parameter.copy_(trained[name])
    return policy


def _peft_config(spec: LoraSpec, modules: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=modules, init_lora_weights="gaussian")


def _add(part: Any, config: Any, adapter: str) -> None:
    """float32 adapter weights on a network of any precision; `default` stays the active one."""
    from peft import inject_adapter_in_model  # what diffusers' add_adapter calls; not every model has that

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # it is what we want
        inject_adapter_in_model(config, part, adapter)
    if hasattr(part, "_hf_peft_config_loaded"):
        part._hf_peft_config_loaded = True  # so that diffusers' own adapter methods work on it
    for name, parameter in part.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    _activate(tuple(_lora_layers(part)), DEFAULT)


def _lora_layers(network: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in network.modules() if isinstance(module, BaseTunerLayer))


def _activate(layers: tuple[Any, ...], adapter: str) -> None:
    """peft's own `set_adapter` also flips requires_grad of all adapters, under the optimiser's feet."""
    for layer in layers:
        layer._active_adapter = [adapter]
