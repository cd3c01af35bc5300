"""A sweep: many configs of one experiment. From `configs/sweeps/*.yaml` to a list of trials, and what is known of each afterwards.

    sweep: {name: mixes, config: ../quickstart.yaml, method: grid, seeds: [0, 1], quality: niqe, fidelity: psnr_rgb}
    set: {run.steps: 8}                          # keys of every trial
    space: {mixes: [faithful, [faithful, crisp]], blocks.quality: [0.5, 1, 2]}

Any key of a train config may stand in `set` and `space`. A list is a choice; {low: , high: , log: true} a range, for methods that draw.
A trial is a point of the space with one seed; its folder is RUNS/SWEEP/POINT_sSEED, where POINT is a hash of what the point sets. So
what has finished is known from the folders alone: the same command again runs what is missing, also after the file has grown.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from rlrestore.checkpoint import read_json
from rlrestore.config.files import ConfigError, section

METHODS = ("asha", "grid", "random")
STOPPED = "stopped early"  # how run.json's `exit` of a trial begins that ASHA ended


@dataclass
class SweepConfig:
    name: str = MISSING  # folder under `dir`
    config: str = MISSING  # train config that every trial starts from; a path from the sweep's file
    quality: str = MISSING  # metric of the report's one axis: a reward or gold metric of every trial
    fidelity: str = MISSING  # of the other
    dir: str = "runs"
    method: str = (
        "grid"  # grid: every combination | random: `points` draws | asha: draws, stopped early by the held-out mix
    )
    points: int = 12  # of random and asha
    seeds: tuple[int, ...] = (0, 1)  # run.seed: a trial each
    draw_seed: int = 0  # of the points
    parallel: int = 1  # trials at once, each a process of its own; 0: one after the other in this process, without Ray
    cpus: float = 1.0  # of a trial; also its threads
    gpus: float = 0.0
    metric: str = ""  # what ASHA goes by: an eval/ tag; "" is the held-out delta of `fidelity`, which all mixes share
    grace: int = 4  # iterations before ASHA may stop a trial
    address: str | None = None  # of a Ray cluster; null starts Ray here


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    point: str  # hash of what it sets, 8 hex digits
    sets: dict[str, Any]  # key -> value, of the space alone
    seed: int
    folder: Path
    overrides: tuple[str, ...]  # of the train config

    @property
    def name(self) -> str:
        return self.folder.name

    def state(self) -> str:
        """done | stopped early | failed: why | unfinished | new; from the folder alone."""
        facts = self.folder / "run.json"
        if not facts.is_file():
            return "new"
        how = str(read_json(facts).get("exit", ""))
        if how == "done" and (self.folder / "result.json").is_file():
            return "done"
        if how.startswith(STOPPED):
            return STOPPED
        return "unfinished" if how in ("running", "") else f"failed: {how}"


@dataclass(frozen=True)
class Sweep:
    config: SweepConfig
    path: Path  # its file
    train: Path  # the train config
    trials: tuple[Trial, ...]
    set: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.config.dir) / self.config.name

    @property
    def points(self) -> dict[str, list[Trial]]:
        """Point -> its trials, in order."""
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            found.setdefault(trial.point, []).append(trial)
        return found


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and enumerate; ConfigError for what the file says wrong. `overrides` are keys of its section `sweep`."""
    path = Path(path)
    data = _read(path)
    given = dict(data["sweep"] or {})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"'{override}' is not key=value, e.g. parallel=2")
        given[key.removeprefix("sweep.")] = yaml.safe_load(value)
    config = section(SweepConfig, given, f"{path}: sweep")
    _check(config, path)
    train = path.parent / config.config
    if not train.is_file():
        raise ConfigError(f"{path}: sweep.config '{config.config}' does not exist; it is a path from {path.parent}")
    common, space = _flat(data.get("set") or {}), dict(data["space"] or {})
    if not space:
        raise ConfigError(f"{path}: space is empty: name at least one key with its values, e.g. blocks.quality: [1, 2]")
    if both := sorted(set(common) & set(space)):
        raise ConfigError(f"{path}: '{both[0]}' stands in set and in space: keep one")
    drawn = _grid(space, path) if config.method == "grid" else _draws(space, config, path)
    trials = tuple(_trial(config, common, point, seed) for point in drawn for seed in config.seeds)
    if len({trial.folder for trial in trials}) < len(trials):
        raise ConfigError(f"{path}: some points of the space or some seeds are equal: name each once")
    return Sweep(config, path, train, trials, common)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"sweep {path} does not exist; the shipped ones are in configs/sweeps/")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or "sweep" not in data or "space" not in data:
        raise ConfigError(f"{path}: a sweep has the sections sweep and space, and may have set")
    if unknown := sorted(set(data) - {"sweep", "set", "space"}):
        raise ConfigError(f"{path}: unknown section '{unknown[0]}': a sweep has sweep, set and space")
    return data


def _check(config: SweepConfig, path: Path) -> None:
    for key, good, wanted in (
        ("name", "/" not in config.name and not config.name.startswith("."), "a plain folder name"),
        ("method", config.method in METHODS, f"one of {', '.join(METHODS)}"),
        ("points", config.points >= 1, "at least 1"),
        ("seeds", bool(config.seeds) and min(config.seeds, default=0) >= 0, "a list of numbers, 0 or positive"),
        ("parallel", config.parallel >= (config.method == "asha"), "0 or positive, and for asha positive"),
        ("cpus", config.cpus > 0, "positive"),
        ("gpus", config.gpus >= 0, "0 or positive"),
        ("grace", config.grace >= 1, "at least 1"),
    ):
        if not good:
            raise ConfigError(f"{path}: sweep.{key}={getattr(config, key)} must be {wanted}")


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"run": {"steps": 8}} and {"run.steps": 8} -> {"run.steps": 8}; a reward term and a mapping of mixes stay whole."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        whole = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and whole != "mixes":
            flat |= _flat(value, f"{whole}.")
        else:
            flat[whole] = value
    return flat


def _grid(space: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    for key, values in space.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: space.{key} must be a list of values for sweep.method=grid, not {values!r}")
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*space.values())]


def _draws(space: Mapping[str, Any], config: SweepConfig, path: Path) -> list[dict[str, Any]]:
    """`points` draws, one generator for all: more points later keep the first ones."""
    generator = random.Random(config.draw_seed)
    return [{key: _draw(key, values, generator, path) for key, values in space.items()} for _ in range(config.points)]


def _draw(key: str, values: Any, generator: random.Random, path: Path) -> Any:
    if isinstance(values, list) and values:
        return generator.choice(values)
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        raise ConfigError(f"{path}: space.{key} must be a list, or {{low: , high: , log: true}}, not {values!r}")
    low, high, log = float(values["low"]), float(values["high"]), bool(values.get("log", False))
    if not low < high or (log and low <= 0):
        raise ConfigError(f"{path}: space.{key}: low={low:g} must be below high={high:g}, and positive with log")
    drawn = math.exp(generator.uniform(math.log(low), math.log(high))) if log else generator.uniform(low, high)
    return float(f"{drawn:.4g}")


def _trial(config: SweepConfig, common: Mapping[str, Any], point: Mapping[str, Any], seed: int) -> Trial:
    digest = hashlib.sha256(json.dumps([common, point], sort_keys=True).encode()).hexdigest()[:8]
    root, name = Path(config.dir) / config.name, f"{digest}_s{seed}"
    keys = {**common, **point, "run.name": name, "run.dir": str(root), "run.seed": seed}
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())
    return Trial(digest, dict(point), seed, root / name, overrides)


def describe(sets: Mapping[str, Any]) -> str:
    """What a point sets, for people: "mixes=faithful+crisp, blocks.quality=2"."""
    return ", ".join(f"{key}={shown(value)}" for key, value in sets.items())


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    if isinstance(value, Mapping):
        return "+".join(f"{factor:g} {name}" for name, factor in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
