"""The checks of `doctor` that need Ray: a Ray of this machine, or the nodes of a cluster and the network between them."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlrestore.actors.cluster import start_ray
from rlrestore.config.sections import RayConfig
from rlrestore.doctor import FAIL, OK, WARN, Finding
from rlrestore.errors import ClusterError

MEGABYTES = 64  # of the tensor that nodes sum up
SLOW_MB_S = 100.0  # a gigabit link


def check_ray(address: str | None, limit_s: float) -> list[Finding]:
    """Start or join Ray, as a run would, and leave it as it was."""
    start = time.monotonic()
    try:
        start_ray(RayConfig(address), 1, limit_s)
    except ClusterError as error:
        return [Finding("ray", FAIL, str(error), "what the message says; docs/launching.md")]
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        found = f"{len(nodes)} node(s), {_amount(ray.cluster_resources())} in {time.monotonic() - start:.0f} s"
        findings = [Finding("ray", OK, found), _object_store()]
        return findings + (between_nodes(nodes, limit_s) if address else [_loopback()])
    finally:
        ray.shutdown()


def _amount(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"


def _object_store() -> Finding:
    start = time.monotonic()
    size = 25 * 2**20
    assert len(ray.get(ray.put(bytes(size)))) == size
    seconds = time.monotonic() - start
    slow = "its memory may lie on a disk: see `object store`" if seconds > 2 else ""
    return Finding("object store, used", WARN if slow else OK, f"25 MB there and back in {seconds:.2f} s", slow)


def _loopback() -> Finding:
    """Whether every socket of this machine's Ray is out of others' reach."""
    family = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
    open_to_all = set()
    for process in [psutil.Process(), *family]:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.startswith(("127.", "::1")):
                    open_to_all.add(f"{process.name()} {connection.laddr.ip}:{connection.laddr.port}")
    if open_to_all:
        remedy = "they ask for a token; keep them behind a firewall"
        return Finding("ray ports", WARN, f"beyond loopback: {', '.join(sorted(open_to_all))}", remedy)
    return Finding("ray ports", OK, "all on loopback")


def between_nodes(nodes: list[dict[str, Any]], limit_s: float) -> list[Finding]:
    """One process a node joins a group as trainer ranks do and sums a tensor: gloo on CPUs, NCCL where all nodes have GPUs."""
    if len(nodes) < 2:
        return [Finding("between nodes", OK, "one node")]
    gpus = all(node["Resources"].get("GPU") for node in nodes)
    members = [
        ray.remote(_Member)
        .options(
            num_cpus=0,
            num_gpus=1 if gpus else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote()
        for node in nodes
    ]
    names = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    try:
        address, port = ray.get(members[0].address.remote(), timeout=limit_s)
        joined = [
            member.total.remote(rank, len(members), address, port, limit_s) for rank, member in enumerate(members)
        ]
        results = ray.get(joined, timeout=limit_s + 60)
    except GetTimeoutError:
        return [_unconnected(names, f"no answer within {limit_s + 60:g} s")]
    except Exception as error:
        return [_unconnected(names, " ".join(str(error).strip().splitlines()[-1].split()))]
    finally:
        for member in members:
            ray.kill(member)
    backend, interface, mb_s = results[0]
    wrong = [name for name, result in zip(names, results, strict=True) if result[0] != backend]
    if wrong:
        return [
            Finding(
                "between nodes",
                FAIL,
                f"{', '.join(wrong)} cannot use {backend}",
                "the same torch build and driver on all",
            )
        ]
    slow = (
        f"set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the fast network's interface (now {interface})"
        if mb_s < SLOW_MB_S
        else ""
    )
    found = f"{backend} over {len(nodes)} nodes ({interface}): {mb_s:.0f} MB/s all-reduced"
    return [Finding("between nodes", WARN if slow else OK, found, slow)]


def _unconnected(names: list[str], why: str) -> Finding:
    remedy = "open all TCP ports between the nodes; set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME to the interface that connects them"
    return Finding("between nodes", FAIL, f"{', '.join(names)}: {why}", remedy)


class _Member:
    """A process on one node."""

    def address(self) -> tuple[str, int]:
        from rlrestore.actors.workers import TrainerWorker

        return TrainerWorker().address()

    def total(self, rank: int, world: int, address: str, port: int, limit_s: float) -> tuple[str, str, float]:
        """(backend, interface, MB/s of the second all-reduce)."""
        import torch
        import torch.distributed as dist

        from rlrestore.engine.group import join_group

        join_group(rank, world, address, port, limit_s)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for _ in range(2):
            values = torch.ones(MEGABYTES * 2**18, device=device)  # float32
            start = time.perf_counter()
            dist.all_reduce(values)
            assert float(values[-1]) == world
            seconds = time.perf_counter() - start
        backend = dist.get_backend()
        dist.destroy_process_group()
        return backend, os.environ.get("GLOO_SOCKET_IFNAME", "default interface"), MEGABYTES / seconds
