"""Starting or joining Ray, placement groups for the whole run, and waits that end.

A local Ray listens on loopback with a token of its own. Every wait has a limit; its message says what was awaited and,
for a placement that does not fit, what was asked for and what the cluster has.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without stubs
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlrestore.actors.joining import check_nodes, join
from rlrestore.config.sections import PlacementConfig, RayConfig
from rlrestore.crew import WorkerLostError
from rlrestore.errors import ClusterError
from rlrestore.placement import REWARD_WORKERS, Node, amounts, lacking, pools, total

STARTS = 3


def start_ray(config: RayConfig, cpus_needed: float, start_timeout_s: float = 300.0) -> None:
    """Join `config.address`, or start Ray here with as many logical CPUs as the placement asks for."""
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if config.address is not None:
            address = config.address
            join(address, lambda: ray.init(address=address, **common))
            check_nodes(start_timeout_s)
            return
        _new_token()
        _start_here(config, cpus_needed, common)
    except ClusterError:
        ray.shutdown()
        raise
    except Exception as error:  # Ray raises bare ones, e.g. when its node does not start within 30 s
        raise ClusterError(f"Ray cannot be started on this machine: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own in place, which ends the process


def _start_here(config: RayConfig, cpus_needed: float, common: dict[str, Any]) -> None:
    """Ray's node gives its helpers 15 s to start and dies if they do not, which happens on busy machines: three attempts."""
    for attempt in range(STARTS):
        try:
            ray.init(
                address="local",  # without it Ray would join a cluster that it finds on this machine
                num_cpus=max(os.cpu_count() or 1, int(cpus_needed + 0.999)),
                object_store_memory=config.object_store_mb * 2**20,
                include_dashboard=False,
                **common,
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == STARTS - 1:
                raise


def _new_token() -> None:
    """A token of this run alone. Ray caches the mode when it is imported, which may have been before our package was."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        Config.initialize("")


@dataclass(frozen=True)
class Reservation:
    """A placement group a pool. `trainers` holds bundle indices in rank order: those of one node side by side."""

    groups: dict[str, PlacementGroup]
    trainers: list[int]

    def peers(self, pool: str) -> list[int]:
        """For each process of a pool: how many trainers or samplers work at the same time on its node, itself included."""
        nodes = {
            name: list(bundle_nodes(self.groups[name]).values())
            for name in self.groups
            if not name.startswith(REWARD_WORKERS)
        }
        homes = bundle_nodes(self.groups[pool])
        return [max(each.count(homes[index]) for each in nodes.values()) for index in sorted(homes)]

    def release(self) -> None:
        for group in self.groups.values():
            remove_placement_group(group)


def reserve(placement: PlacementConfig) -> Reservation:
    """Room for every pool, within start_timeout_s together. ClusterError that says what is lacking, with nothing kept."""
    deadline = time.monotonic() + placement.start_timeout_s
    groups: dict[str, PlacementGroup] = {}
    wanted = pools(placement)
    before = free_nodes()
    try:
        for pool in wanted:
            groups[pool.name] = placement_group(pool.bundles, strategy=pool.strategy)
            ray.get(groups[pool.name].ready(), timeout=max(0.0, deadline - time.monotonic()))
    except GetTimeoutError as error:
        Reservation(groups, []).release()
        everything = [Node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
        lack = lacking(wanted, everything)
        because = lack or f"busy with other work: {lacking(wanted, before) or pool.name + ' were not placed'}"
        raise ClusterError(
            f"the cluster did not give {amounts(total(wanted))} within {placement.start_timeout_s:g} s: {because}. It has "
            f"{amounts(ray.cluster_resources())} on {len(everything)} node(s), free now {amounts(ray.available_resources())}. "
            "Lower placement.ranks, rollout_actors or reward_workers, or add nodes"
        ) from error
    return Reservation(groups, node_order(groups["trainer ranks"], range(placement.ranks)))


def free_nodes() -> list[Node]:
    """What each node that is alive has free."""
    free = available_resources_per_node()
    return [Node(node_id, resources) for node_id, resources in free.items()]


def bundle_nodes(group: PlacementGroup) -> dict[int, str]:
    """Node id by bundle index."""
    return dict(ray.util.placement_group_table(group)["bundles_to_node_id"])


def node_order(group: PlacementGroup, indices: Sequence[int]) -> list[int]:
    """Bundle indices with those of one node side by side: Ray may spread them in any order."""
    nodes = bundle_nodes(group)
    return sorted(indices, key=lambda index: (nodes[index], index))


def spawn(worker_class: type, group: PlacementGroup, bundle: int) -> Any:
    """An actor that fills one bundle; never restarted behind our back, because a restarted one has lost its weights."""
    each = group.bundle_specs[bundle]
    return (
        ray.remote(worker_class)
        .options(
            num_cpus=each.get("CPU", 0.0),
            num_gpus=each.get("GPU", 0.0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=False
            ),
        )
        .remote()
    )


def fetch(refs: Any, timeout_s: float, what: str) -> Any:
    """ray.get that ends: the worker's own error, or WorkerLostError naming what was awaited."""
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise WorkerLostError(f"{what} did not finish within {timeout_s:g} s (placement.stage_timeout_s)") from error
    except RayActorError as error:
        raise _lost(error, what) from error
    except RayTaskError as error:
        if death := _death_among(refs):  # a peer's error is only the echo of it, e.g. a connection that was reset
            raise _lost(death, what) from error
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else None
        if cause is None:
            raise
        raise cause from error


def _lost(error: RayActorError, what: str) -> WorkerLostError:
    text = str(error).strip().splitlines()[0]
    return WorkerLostError(f"a worker died during {what}: {text} The same command resumes from the last checkpoint")


def _death_among(refs: Any, patience_s: float = 10.0) -> RayActorError | None:
    """The death of an actor that one of `refs` was awaited from, if any is known soon."""
    refs = refs if isinstance(refs, list) else [refs]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=patience_s)
    for ref in done:
        try:
            ray.get(ref)
        except RayActorError as error:
            return error
        except Exception:
            continue
    return None
