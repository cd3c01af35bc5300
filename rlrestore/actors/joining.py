"""Joining a cluster that stands: what can be wrong with its address, its token or its nodes, each said in one line.

Ray's own answers come late (20 s for a wrong token) and run over pages; what can be seen beforehand is looked at first.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private.utils import read_ray_address
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlrestore.errors import ClusterError

# Of what decides the numbers or the wire formats: the same on every node.
SAME_EVERYWHERE = ("rlrestore", "ray", "torch", "deepspeed", "diffusers", "numpy", "safetensors")
CONNECT_S = 10.0


def join(address: str, init: Callable[[], Any]) -> None:
    """Call `init` (ray.init with its options) for the cluster at `address` (auto | host:port). ClusterError says what is wrong."""
    named = os.environ.get("RAY_ADDRESS", "")
    found = address if address != "auto" else named if ":" in named and "://" not in named else read_ray_address()
    if not found:
        raise ClusterError(
            "ray.address=auto finds no Ray on this machine: start it with ray start, set RAY_ADDRESS, or give ray.address=host:port"
        )
    where = found if found == address else f"{found} (ray.address={address})"
    _knock(found, where)
    try:
        init()
    except Exception as error:  # Ray raises bare ones: RuntimeError, ConnectionError, ValueError
        raise ClusterError(_reason(where, str(error))) from error


def token() -> tuple[str, str] | None:
    """(the token that Ray will use, where it stands), in Ray's own order; None if there is none."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return value, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    value = path.read_text().strip() if path.is_file() else ""
    return (value, str(path)) if value else None


def _knock(address: str, where: str) -> None:
    """Ask the cluster for its id, with our token: what Ray asks first, too."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {where} ({error.strerror or error}): start Ray's head there (ray start --head --port={port}), "
            "or mend the address"
        ) from error
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # what follows would need the certificates
    ours = token()
    metadata = [("authorization", f"Bearer {ours[0]}")] if ours else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray does
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=CONNECT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                wanted = "use the one that its nodes were started with"
                raise ClusterError(
                    f"the cluster at {where} refuses the token from {ours[1]}: {wanted}"
                    if ours
                    else f"the cluster at {where} asks for a token and there is none here: {wanted}, in RAY_AUTH_TOKEN or in a file "
                    "named by RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
                ) from error
            raise ClusterError(f"what answers at {where} is no Ray head ({error.code().name})") from error


def _reason(where: str, text: str) -> str:
    if "ersion mismatch" in text:
        cluster, here = (
            ", ".join(f"{name} {version}" for name, version in re.findall(r"(Ray|Python): (\S+)", part))
            for part in text.split("This process", 1)
        )
        return f"the cluster at {where} has {cluster} and this machine {here}: install the same versions on every node"
    return f"Ray cannot be joined at {where}: {' '.join(text.split())[:300]}"


def check_nodes(timeout_s: float) -> None:
    """ClusterError if a node of the joined cluster has other versions than this process, or no rlrestore at all."""
    ours = versions_here()
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in alive}
    asked = {
        node_id: ray.remote(num_cpus=0, max_retries=0)(versions_here)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        .remote()
        for node_id in names
    }
    for node_id, ref in asked.items():
        try:
            theirs = ray.get(ref, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ClusterError(
                f"node {names[node_id]} did not start a process within {timeout_s:g} s (placement.start_timeout_s)"
            ) from error
        except Exception as error:
            last = str(error).strip().splitlines()[-1]
            raise ClusterError(f"node {names[node_id]} cannot run rlrestore: {last}. Install it there, too") from error
        if differing := differences(ours, theirs):
            raise ClusterError(f"node {names[node_id]} has {differing}: install the same versions on every node")


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """ "torch 2.9 where this machine has 2.14", joined; empty if they are the same."""
    return ", ".join(
        f"{name} {theirs.get(name) or 'not at all'} where this machine has {ours.get(name) or 'none'}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    )


def versions_here() -> dict[str, str]:
    """Runs on every node; imports nothing heavy."""
    found = {"python": platform.python_version()}
    for name in SAME_EVERYWHERE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found
