"""Published weights: safetensors bytes with a version and a sha256, refused when wrong or stale.

An adapter travels in one piece, whole networks in buckets of at most `BUCKET_BYTES`, in an order that sender and receiver
both know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

BUCKET_BYTES = 512 * 2**20


class SyncError(RuntimeError):
    """Weights arrived damaged, for another model, or older than what is already there."""


@dataclass(frozen=True)
class Published:
    version: int  # iterations trained
    sha256: str  # of `blob`
    blob: bytes  # safetensors, float32 or the network's dtype
    bucket: int = 0  # which of
    buckets: int = 1


def bucket_names(shapes: Mapping[str, torch.Size], limit: int = BUCKET_BYTES) -> list[tuple[str, ...]]:
    """Names in sorted order, cut where the next one would exceed `limit` bytes of float32; a larger one goes alone."""
    buckets: list[list[str]] = []
    size = limit
    for name in sorted(shapes):
        own = 4 * shapes[name].numel()
        if size + own > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += own
    return [tuple(names) for names in buckets]


def publish(tensors: Mapping[str, Tensor], version: int, bucket: int = 0, buckets: int = 1) -> Published:
    blob = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    return Published(version, hashlib.sha256(blob).hexdigest(), blob, bucket, buckets)


def held_sha256(published: Published, network: nn.Module) -> str:
    """What the published hash would be of what `network` holds now."""
    own = dict(network.named_parameters())
    tensors = {name: own[name].to(value.dtype) for name, value in load(published.blob).items()}
    return publish(tensors, published.version).sha256


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
