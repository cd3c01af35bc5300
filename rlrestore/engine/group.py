"""The process group of the trainer ranks, made by us before DeepSpeed looks for one: bounded time-outs, no MPI discovery."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_group(rank: int, world: int, address: str, port: int, timeout_s: float, local_rank: int = 0) -> None:
    """Collective over `world` processes; every collective in it fails after `timeout_s`.

    A process that is a member already, because it builds another learner, stays one.
    """
    if dist.is_initialized():
        assert (dist.get_rank(), dist.get_world_size()) == (rank, world), "this process is in another group"
        return
    os.environ.update(
        MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank)
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
