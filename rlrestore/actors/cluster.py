"""Starting or joining Ray, one placement group for the whole run, and waits that end.

A local Ray listens on loopback with a token of its own. Every wait has a limit; its message says what was awaited and,
for a placement that does not fit, what was asked for and what the cluster has.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import Any

import ray
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without stubs
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlrestore.config import PlacementConfig, RayConfig
from rlrestore.crew import WorkerLostError
from rlrestore.errors import ClusterError


def start_ray(config: RayConfig, cpus_needed: float) -> None:
    """Join `config.address`, or start Ray here with as many logical CPUs as the placement asks for."""
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if config.address is not None:
            common.pop("include_dashboard")
            ray.init(address=config.address, **common)
            return
        _new_token()
        ray.init(
            num_cpus=max(os.cpu_count() or 1, int(cpus_needed + 0.999)),
            object_store_memory=config.object_store_mb * 2**20,
            **common,
        )
    except Exception as error:  # Ray raises bare ones, e.g. when its node does not start within 30 s
        where = config.address or "this machine"
        raise ClusterError(f"Ray cannot be {'joined' if config.address else 'started'} at {where}: {error}") from error


def _new_token() -> None:
    """A token of this run alone. Ray caches the mode when it is imported, which may have been before our package was."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        Config.initialize("")


def reserve(placement: PlacementConfig) -> PlacementGroup:
    """Bundles in the order trainers, rollout actors, reward workers. ClusterError if they do not fit in time."""
    bundles = bundle_list(placement)
    group = placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=placement.start_timeout_s)
    except GetTimeoutError as error:
        remove_placement_group(group)
        wanted = {key: sum(bundle.get(key, 0) for bundle in bundles) for key in ("CPU", "GPU")}
        raise ClusterError(
            f"the cluster did not give {wanted} within {placement.start_timeout_s:g} s; it has {_short(ray.cluster_resources())}, "
            f"free now {_short(ray.available_resources())}. Lower placement.ranks, rollout_actors or reward_workers, or add nodes"
        ) from error
    return group


def bundle_list(placement: PlacementConfig) -> list[dict[str, float]]:
    gpu = {"GPU": 1.0} if placement.gpus else {}
    rollout = placement.rollout_actors if placement.kind == "separate" else 0
    return (
        [{"CPU": placement.rank_cpus, **gpu} for _ in range(placement.ranks)]
        + [{"CPU": placement.rollout_cpus, **gpu} for _ in range(rollout)]
        + [{"CPU": placement.reward_cpus} for _ in range(placement.reward_workers)]
    )


def node_order(group: PlacementGroup, indices: Sequence[int]) -> list[int]:
    """Bundle indices with those of one node side by side: Ray may spread them in any order."""
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return sorted(indices, key=lambda index: (nodes[index], index))


def spawn(worker_class: type, group: PlacementGroup, bundle: int, cpus: float, gpus: float) -> Any:
    """An actor in one bundle; never restarted behind our back, because a restarted one has lost its weights."""
    return (
        ray.remote(worker_class)
        .options(
            num_cpus=cpus,
            num_gpus=gpus,
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


def _short(resources: dict[str, float]) -> dict[str, float]:
    return {key: resources.get(key, 0.0) for key in ("CPU", "GPU")}
