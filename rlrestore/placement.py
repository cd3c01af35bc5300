"""Which processes a run starts, what each is given, and on which nodes they can be: plain data, without Ray.

Pools are placed one after the other, trainers first. Trainer ranks are packed (neighbours in rank share a node, so that most of
their traffic stays in it), rollout actors and reward workers are spread (their load is independent). Ray does the same with a
placement group a pool; `assign` foretells it for nodes that are described, and says what is lacking when a pool does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlrestore.config.files import ConfigError
from rlrestore.config.sections import PlacementConfig

RESOURCES = ("CPU", "GPU")
REWARD_WORKERS = "reward workers"


@dataclass(frozen=True)
class Pool:
    """Equal processes."""

    name: str
    count: int
    each: Mapping[str, float]  # resource -> amount of one process; nothing that is 0
    strategy: str  # PACK | SPREAD, Ray's names

    @property
    def bundles(self) -> list[dict[str, float]]:
        return [dict(self.each)] * self.count

    @property
    def total(self) -> dict[str, float]:
        return {key: self.count * amount for key, amount in self.each.items()}


@dataclass(frozen=True)
class Node:
    name: str
    resources: Mapping[str, float]


class PlacementError(ValueError):
    """The nodes lack something; the message says what."""


def pools(config: PlacementConfig) -> list[Pool]:
    """Trainers, rollout actors, reward workers: the ones that this placement has, in the order in which they are placed."""
    rollouts = config.rollout_actors if config.kind == "separate" else 0
    wanted = [
        Pool("trainer ranks", config.ranks, _each(config.rank_cpus, config.gpus * config.rank_gpus), "PACK"),
        Pool("rollout actors", rollouts, _each(config.rollout_cpus, config.gpus * config.rollout_gpus), "SPREAD"),
        Pool(REWARD_WORKERS, config.reward_workers, _each(config.reward_cpus, config.reward_gpus), "SPREAD"),
        *(
            Pool(reward_pool_name(name), pool.workers, _each(pool.cpus, pool.gpus), "SPREAD")
            for name, pool in config.reward_pools.items()
        ),
    ]
    return [pool for pool in wanted if pool.count]


def reward_pool_name(name: str) -> str:
    return f"{REWARD_WORKERS} ({name})"


def total(wanted: Sequence[Pool]) -> dict[str, float]:
    return {key: sum(pool.total.get(key, 0.0) for pool in wanted) for key in RESOURCES}


def assign(wanted: Sequence[Pool], nodes: Sequence[Node]) -> dict[str, list[str]]:
    """Pool name -> node of each of its processes, in the order of their numbers. PlacementError if one does not fit.

    Packed: the node that takes most of what is left comes first. Spread: always the node that has fewest of the pool.
    """
    free = {node.name: dict(node.resources) for node in nodes}
    placed: dict[str, list[str]] = {}
    for pool in wanted:
        homes: list[str] = []
        while len(homes) < pool.count:
            room = {name: _room(resources, pool.each) for name, resources in free.items()}
            able = [name for name in free if room[name]]
            if not able:
                raise PlacementError(_lacking(pool, len(homes), nodes, free))
            if pool.strategy == "PACK":
                home = max(able, key=room.__getitem__)
                take = min(room[home], pool.count - len(homes))
            else:
                home, take = min(able, key=lambda name: (homes.count(name), -room[name])), 1
            homes += [home] * take
            for key, amount in pool.each.items():
                free[home][key] -= take * amount
        placed[pool.name] = homes
    return placed


def lacking(wanted: Sequence[Pool], nodes: Sequence[Node]) -> str | None:
    """What keeps `wanted` from fitting on these nodes, in words; None if they fit."""
    try:
        assign(wanted, nodes)
    except PlacementError as error:
        return str(error)
    return None


def parse_nodes(text: str) -> list[Node]:
    """ "2x64c8g,1x32c": two nodes with 64 CPUs and 8 GPUs, one with 32 CPUs."""
    nodes: list[Node] = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)c(?:(\d+)g)?", part.strip())
        if not match:
            raise ConfigError(f"--nodes '{part}': write COUNTxCPUSc[GPUSg], e.g. 2x64c8g,1x32c")
        count, cpus, gpus = (int(group or default) for group, default in zip(match.groups(), (1, 0, 0), strict=True))
        nodes += [Node(f"node{len(nodes) + i}", {"CPU": cpus, "GPU": gpus}) for i in range(count)]
    return nodes


def amounts(resources: Mapping[str, float]) -> str:
    """{"CPU": 8.0, "GPU": 1.0} -> "8 CPU, 1 GPU"."""
    return ", ".join(f"{resources[key]:g} {key}" for key in RESOURCES if resources.get(key)) or "nothing"


def check_placement(config: PlacementConfig) -> None:
    """ConfigError for shares that Ray or NCCL would refuse, later and in other words."""
    for key in ("rank_cpus", "rollout_cpus", "reward_cpus", "rank_gpus", "rollout_gpus", "reward_gpus"):
        value = getattr(config, key)
        if value < 0 or (value == 0 and key != "reward_gpus"):
            raise ConfigError(f"placement.{key}={value:g} must be {'0 or ' * (key == 'reward_gpus')}positive")
        if value > 1 and value % 1:
            raise ConfigError(f"placement.{key}={value:g}: above 1 it must be a whole number")
    for name, pool in config.reward_pools.items():
        for key, value, least in (("workers", pool.workers, 1), ("cpus", pool.cpus, 1e-3), ("gpus", pool.gpus, 0)):
            if value < least or (value > 1 and value % 1):
                raise ConfigError(
                    f"placement.reward_pools.{name}.{key}={value:g} must be a share of 1 or a whole number"
                )
    if config.gpus and config.ranks > 1 and config.rank_gpus <= 0.5:
        raise ConfigError(
            f"placement.rank_gpus={config.rank_gpus:g} with placement.ranks={config.ranks} may put two ranks on one GPU, which NCCL "
            "refuses: choose more than 0.5"
        )


def _each(cpus: float, gpus: float) -> dict[str, float]:
    return {key: value for key, value in (("CPU", float(cpus)), ("GPU", float(gpus))) if value}


def _room(free: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many such processes fit."""
    return int(min(free.get(key, 0.0) / amount + 1e-9 for key, amount in each.items()))


def _lacking(pool: Pool, placed: int, nodes: Sequence[Node], free: Mapping[str, Mapping[str, float]]) -> str:
    left = pool.count - placed
    short = {key: left * amount - sum(f.get(key, 0.0) for f in free.values()) for key, amount in pool.each.items()}
    missing = {key: amount for key, amount in short.items() if amount > 1e-9}
    if missing:
        return f"{amounts(missing)} too few for {left} of {pool.count} {pool.name}"
    return f"{left} of {pool.count} {pool.name} fit on no node: each needs {amounts(pool.each)} in one place"


def split_terms(names: Sequence[str], config: PlacementConfig) -> dict[str, list[str]]:
    """Pool of reward workers -> the terms that it scores, each of `names` once. ConfigError for what is in none or in two."""
    split = {reward_pool_name(name): list(pool.terms) for name, pool in config.reward_pools.items()}
    placed = [term for terms in split.values() for term in terms]
    for term in placed:
        if term not in names:
            raise ConfigError(f"placement.reward_pools names the term {term!r}; this run has {', '.join(names)}")
        if placed.count(term) > 1:
            raise ConfigError(f"placement.reward_pools has the term {term!r} in two places")
    rest = [name for name in names if name not in placed]
    return {pool: terms for pool, terms in {REWARD_WORKERS: rest, **split}.items() if terms}
