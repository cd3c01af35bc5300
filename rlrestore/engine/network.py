"""Which network interface the ranks talk over: the one that leads to rank 0.

Left alone, gloo asks what the host's name resolves to, which is 127.0.1.1 on many machines and the wrong card on others.
"""

from __future__ import annotations

import os
import socket

import psutil


def interface_towards(address: str) -> str | None:
    """Name of the interface whose address packets to `address` leave from; None if it cannot be told."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing: it only chooses the route
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == family and entry.address.split("%")[0] == own for entry in addresses):
            return name
    return None


def use_interface_towards(address: str) -> None:
    """Bind gloo and NCCL to it, unless the environment has chosen already."""
    if name := interface_towards(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
