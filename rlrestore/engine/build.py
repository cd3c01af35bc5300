"""Engines by kind. DeepSpeed is imported only when it is chosen."""

from __future__ import annotations

import os
import socket

from torch import nn

from rlrestore.engine.base import Engine, EngineOptions
from rlrestore.engine.torch_engine import TorchEngine

ENGINES = ("deepspeed", "torch")


def build_engine(kind: str, network: nn.Module, options: EngineOptions, rank: int = 0, world: int = 1) -> Engine:
    """An engine over `network`. With several ranks, or DeepSpeed, the process group must exist (`group.join_group`)."""
    if kind == "torch":
        return TorchEngine(network, options, rank, world)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    from rlrestore.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(network, options, rank, world)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
