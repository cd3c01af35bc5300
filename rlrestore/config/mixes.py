"""Reward mixes by name: `mixes: faithful`, `mixes: [faithful, crisp]`, or `mixes: {faithful: 1, crisp: 0.5}`.

A mix is a YAML file with the sections of `SECTIONS` only. Several are laid on each other in order: weights of a term that two of them
have are added, each times its mix's factor; of anything else the later one wins. A mix replaces what the config below it
rewards; `rewards:` beside `mixes:`, and on the command line, is laid over the mix.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlrestore.config.errors import ConfigError

SECTIONS = ("blocks", "constraints", "gates", "regularise", "rewards")
REPLACED = ("blocks", "constraints", "gates", "rewards")  # of the config below; regularise is laid over it
FOLDER = "mixes"


def mix_folders(config: Path) -> list[Path]:
    """Where a mix may lie: `mixes/` beside the config or above it, then `configs/mixes/` of the working directory."""
    places = [folder / FOLDER for folder in config.resolve().parents] + [Path("configs") / FOLDER]
    return [place for place in places if place.is_dir()]


def combined_mix(given: Any, config: Path) -> dict[str, Any]:
    """The sections that `mixes: given` of this config stands for. ConfigError names the mix that is wrong."""
    result: dict[str, Any] = {}
    for name, factor in _factors(given, config).items():
        for section, keys in _read(name, config).items():
            below = result.setdefault(section, {})
            for key, value in keys.items():
                below[key] = _laid_over(below.get(key), value, factor if section == "rewards" else None)
    return result


def _factors(given: Any, config: Path) -> dict[str, float]:
    if isinstance(given, str):
        return {given: 1.0}
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        if len(set(given)) < len(given):
            raise ConfigError(f"{config}: mixes {given} names one twice; give it a factor instead, {{{given[0]}: 2}}")
        return dict.fromkeys(given, 1.0)
    if isinstance(given, Mapping) and given:
        for name, factor in given.items():
            if not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
                raise ConfigError(f"{config}: mixes.{name}={factor} must be a positive factor of its weights")
        return {str(name): float(factor) for name, factor in given.items()}
    raise ConfigError(f"{config}: mixes={given!r} must be a name, a list of names or {{name: factor}}")


def _read(name: str, config: Path) -> dict[str, dict[str, Any]]:
    path = _find(name, config)
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not all(isinstance(keys, dict) for keys in data.values()):
        raise ConfigError(f"{path}: a mix holds sections of {', '.join(SECTIONS)}")
    if wrong := sorted(set(data) - set(SECTIONS)):
        raise ConfigError(f"{path}: a mix may not set '{wrong[0]}', only {', '.join(SECTIONS)}: set it in the config")
    return data


def _find(name: str, config: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = config.parent / name
        if path.is_file():
            return path
        raise ConfigError(f"{config}: mix '{name}' does not exist; it is a path from {config.parent}")
    folders = mix_folders(config)
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"{config}: mix '{name}' is unknown.{hint} Known: {', '.join(known) or 'none'}.")


def _laid_over(below: Any, above: Any, factor: float | None) -> Any:
    """`factor` is of a reward term's weight; None for other sections."""
    if factor is None:
        return above
    term = {**(copy.deepcopy(below) or {}), **(above or {})}
    weight = (above or {}).get("weight", 1.0) * factor
    term["weight"] = weight + (0.0 if below is None else below["weight"])
    return term
