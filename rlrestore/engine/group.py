"""The process group of the trainer ranks, made by us before DeepSpeed looks for one: bounded time-outs, no MPI discovery.

On one machine (a loopback address) the rendezvous and gloo listen on 127.0.0.1 only; torch's own default is all interfaces.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from rlrestore.engine.network import use_interface_towards


def join_group(rank: int, world: int, address: str, port: int, timeout_s: float, local_rank: int = 0) -> None:
    """Collective over `world` processes; every collective in it fails after `timeout_s`. An existing membership is kept."""
    if dist.is_initialized():
        assert (dist.get_rank(), dist.get_world_size()) == (rank, world), "this process is in another group already"
        return
    os.environ.update(
        MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank)
    )
    timeout = timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not ipaddress.ip_address(address).is_loopback:
        use_interface_towards(address)
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
        return
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    listen_fd = _loopback_listener(address, port) if rank == 0 else None
    store = dist.TCPStore(address, port, world, rank == 0, timeout, master_listen_fd=listen_fd)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def forget_rendezvous() -> None:
    """After a group is left: whoever reads these variables (accelerate does) would wait for ranks that are gone."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


def _loopback_listener(address: str, port: int) -> int:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(128)
    return listener.detach()
