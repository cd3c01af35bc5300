"""Published weights: safetensors bytes with a version and a sha256, refused when wrong or stale."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn


class SyncError(RuntimeError):
    """Weights arrived damaged, for another model, or older than what is already there."""


@dataclass(frozen=True)
class Published:
    version: int  # iterations trained
    sha256: str  # of `blob`
    blob: bytes  # safetensors, float32 or the network's dtype


def publish(tensors: Mapping[str, Tensor], version: int) -> Published:
    blob = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    return Published(version, hashlib.sha256(blob).hexdigest(), blob)


@torch.no_grad()
def receive(published: Published, network: nn.Module, names: Collection[str], current_version: int) -> None:
    """Load the parameters `names` into `network` after all checks; on SyncError the network is untouched."""
    digest = hashlib.sha256(published.blob).hexdigest()
    if digest != published.sha256:
        raise SyncError(
            f"weights version {published.version} have sha256 {digest[:16]}, expected {published.sha256[:16]}"
        )
    if published.version < current_version:
        raise SyncError(f"weights version {published.version} are older than version {current_version} already in use")
    try:
        tensors = load(published.blob)
    except SafetensorError as error:
        raise SyncError(f"weights version {published.version} are not safetensors: {error}") from error
    own = dict(network.named_parameters())
    unknown, absent = tensors.keys() - set(names), set(names) - tensors.keys()
    if unknown or absent:
        raise SyncError(f"weights do not fit this network: unknown {sorted(unknown)[:3]}, missing {sorted(absent)[:3]}")
    for name in sorted(names):  # an error names the same one each time; safetensors has no fixed order
        value = tensors[name]
        if value.shape != own[name].shape:
            raise SyncError(
                f"weights do not fit this network: {name} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
            )
    for name, value in tensors.items():
        own[name].copy_(value)
