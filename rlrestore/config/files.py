"""Typed configs from sparse YAML: unknown keys die with the nearest name, nothing is repaired silently.

Order: defaults < file < `key=value` from the command line. Environment variables cannot be read from a config
(`oc.env` would copy secrets into the run directory). Errors are `ConfigError`: one line that names file, key and remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rewards.constraints import ConstraintConfig
from rewards.gates import GateConfig
from rewards.registry import reward_spec
from rewards.rubric import TermConfig
from rlrestore.config.errors import ConfigError
from rlrestore.config.mixes import REPLACED, combined_mix
from rlrestore.config.sections import TrainConfig

OmegaConf.clear_resolver("oc.env")


GUARDS: dict[str, type] = {"constraints": ConstraintConfig, "gates": GateConfig}
PLUGINS = ("algorithm", "env", "restorer")  # sections whose keys are those of their kind
GUARD_TERM_KEYS = ("kind", "params", "scale", "timeout_s")  # what of a term a gate or a constraint may set

PluginSchemas = Mapping[str, Mapping[str, type]]  # section -> kind -> dataclass


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """File, over the one that its key `base` names and over its `mixes`, plus `key=value` overrides, as plain data.

    An override of a plug-in's kind (`algorithm.kind=grpo`) leaves the file's other keys of that section behind.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist; the shipped ones are in configs/")
    try:
        loaded = _with_base(path)
        dotlist = OmegaConf.from_dotlist(list(overrides))
        if "mixes" in dotlist:
            loaded = _with_mixes(loaded, dotlist.pop("mixes"), path)
        for name in PLUGINS:
            if _other_kind(loaded.get(name), dotlist.get(name)):
                loaded.pop(name)
        data = OmegaConf.to_container(OmegaConf.merge(loaded, dotlist), resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is not key=value, e.g. run.steps=20")
    return data  # type: ignore[return-value]


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """A file merged onto its base, whose path is relative to the file.

    A section of another `kind` starts anew; `rewards: {NAME: null}` drops a term, and so for gates and constraints.
    """
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'env:' at the top level")
    mixes = loaded.pop("mixes", None)
    if "base" not in loaded:
        return loaded if mixes is None else OmegaConf.merge(_with_mixes(OmegaConf.create(), mixes, path), loaded)  # type: ignore[return-value]
    named = loaded.pop("base")
    if not isinstance(named, str) or not (base := path.parent / named).is_file():
        raise ConfigError(f"{path}: base '{named}' does not exist; it is a path from {path.parent}")
    if base.resolve() in above:
        raise ConfigError(f"{path}: base '{named}' leads back to itself")
    below = _with_base(base, (*above, path.resolve()))
    for section, given in loaded.items():
        if _other_kind(below.get(section), given):
            below.pop(section, None)
    if mixes is not None:
        below = _with_mixes(below, mixes, path)
    for section in ("rewards", *GUARDS):
        for name in [name for name, term in (loaded.get(section) or {}).items() if term is None]:
            (below.get(section) or {}).pop(name, None)
            loaded[section].pop(name)  # also where the base has none: null never means a term with its defaults
    return OmegaConf.merge(below, loaded)  # type: ignore[return-value]


def _other_kind(below: Any, given: Any) -> bool:
    """Whether a section names a kind that is not the one below it, whose keys then mean nothing."""
    return isinstance(given, DictConfig) and given.get("kind") not in (None, (below or {}).get("kind"))


def _with_mixes(below: DictConfig, mixes: Any, path: Path) -> DictConfig:
    """What a config says, with the named mixes (`mixes.py`) in place of what it rewarded."""
    given = OmegaConf.to_container(mixes) if OmegaConf.is_config(mixes) else mixes
    kept = OmegaConf.create({key: value for key, value in below.items() if key not in REPLACED})
    return OmegaConf.merge(kept, combined_mix(given, path))  # type: ignore[return-value]


def layers(path: Path, overrides: Sequence[str] = ()) -> list[tuple[str, set[str]]]:
    """(where, the dotted keys that it sets) of all that `read_yaml` lays on each other, lowest first.

    Keys that a later layer takes away (another `kind`, mixes in place of rewards) are not among the earlier one's.
    """
    found: list[tuple[str, set[str]]] = []
    chain: list[tuple[Path, Any]] = []
    known: dict[str, Any] = {}  # kinds so far
    file = path
    while True:
        data = OmegaConf.to_container(OmegaConf.load(file))
        chain.insert(0, (file, data))
        if "base" not in data:  # type: ignore[operator]
            break
        file = file.parent / data["base"]  # type: ignore[index,call-overload]
    given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    for place, data in [(os.path.normpath(file), data) for file, data in chain] + [("command line", given)]:
        keys = dict(data)
        keys.pop("base", None)
        mixes = keys.pop("mixes", None)
        kinds = {name: part["kind"] for name, part in keys.items() if isinstance(part, Mapping) and part.get("kind")}
        may_reset = PLUGINS if place == "command line" else kinds
        gone = {f"{name}." for name in may_reset if name in kinds and kinds[name] != known.get(name)}
        known |= kinds
        if mixes is not None:
            gone |= {f"{name}." for name in REPLACED}
        for _, earlier in found:
            earlier -= {key for key in earlier if key.startswith(tuple(gone))}
        if mixes is not None:
            found.append((f"mixes {mixes}", set(_flat_keys(combined_mix(mixes, path)))))
        found.append((place, set(_flat_keys(keys))))
    return found


def _flat_keys(data: Any, prefix: str = "") -> list[str]:
    if isinstance(data, Mapping) and data:
        return [leaf for key, value in data.items() for leaf in _flat_keys(value, f"{prefix}{key}.")]
    return [prefix.rstrip(".")]


def typed(schema: type, data: Mapping[str, Any], plugins: PluginSchemas, where: str) -> Any:
    """Plain data -> `schema`, with plug-in sections resolved by their `kind`."""
    types = get_type_hints(schema)
    for key in data:
        if key not in types:
            raise ConfigError(f"{where}: unknown section '{key}'.{_nearest(key, types)}")
    values: dict[str, Any] = {}
    for name in types:
        given = data.get(name)
        if name == "rewards":
            values[name] = _terms(given, f"{where}: rewards", "reward")
        elif name in GUARDS:
            values[name] = _guards(given or {}, GUARDS[name], f"{where}: {name}", name.removesuffix("s"))
        elif name in plugins:
            values[name] = _plugin(given, plugins[name], f"{where}: {name}")
        else:
            values[name] = section(types[name], given or {}, f"{where}: {name}")
    if schema is TrainConfig:
        values["evaluate"].gold = _terms(values["evaluate"].gold, f"{where}: evaluate.gold", "gold")
    return schema(**values)


@dataclass
class Plugin:
    """A plug-in section after typing: which one, and its own config."""

    kind: str
    config: Any


def plain(config: Any) -> Any:
    """Typed config -> plain data that `read_yaml` would have given (the resolved config)."""
    if isinstance(config, Plugin):
        return {"kind": config.kind, **plain(config.config)}
    if isinstance(config, GateConfig | ConstraintConfig):
        own = {key: plain(value) for key, value in vars(config).items() if key != "term"}
        return {**{key: value for key, value in plain(config.term).items() if key in GUARD_TERM_KEYS}, **own}
    if isinstance(config, TermConfig):  # name and role follow from where the term stands
        return {key: plain(value) for key, value in vars(config).items() if key not in ("name", "role")}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: plain(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def dump(config: Any) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False)


def config_hash(config: Any) -> str:
    """sha256 of the resolved config: equal hashes mean equal runs."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


def section(schema: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must hold keys, not {data!r}")
    names = [item.name for item in dataclasses.fields(schema)]
    for key in data:
        if key not in names:
            raise ConfigError(f"{where}.{key}: unknown key.{_nearest(str(key), names)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), DictConfig(dict(data)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{where}.{missing[0]} is missing; set it in the file or with {missing[0]}=...")
        return _tuples(OmegaConf.to_object(merged), schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_one_line(error)}") from error


def _tuples(instance: Any, schema: type) -> Any:
    for item in dataclasses.fields(schema):
        if "tuple" in str(item.type) and isinstance(getattr(instance, item.name), list):
            setattr(instance, item.name, tuple(getattr(instance, item.name)))
    return instance


def _plugin(data: Any, schemas: Mapping[str, type], where: str) -> Plugin:
    data = dict(data or {})
    kind = data.pop("kind", None)
    if kind is None:
        raise ConfigError(f"{where}.kind is missing; choose one of {', '.join(sorted(schemas))}")
    if kind not in schemas:
        raise ConfigError(f"{where}.kind '{kind}' is unknown.{_nearest(str(kind), schemas)}")
    return Plugin(kind, section(schemas[kind], data, where))


def _terms(data: Any, where: str, role: str) -> dict[str, TermConfig]:
    """Reward terms by name; `kind` defaults to the name, `params` are checked by the reward itself."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must map names to terms, e.g. {{ssim: {{kind: ssim_rgb, weight: 1}}}}")
    fields = {item.name: item for item in dataclasses.fields(TermConfig)}
    terms = {}
    for name, given in data.items():
        given = {"kind": name, **(given or {}), "name": str(name), "role": role}
        for key in given:
            if key not in fields:
                raise ConfigError(f"{where}.{name}.{key}: unknown key.{_nearest(str(key), fields)}")
        try:
            for key in ("weight", "scale", "floor", "timeout_s"):
                if given.get(key) is not None:
                    given[key] = float(given[key])
            terms[str(name)] = TermConfig(**given)
            reward_spec(given["kind"], given.get("params"))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}.{name}: {_one_line(error)}") from error
    return terms


def reward_terms(data: Any, where: str) -> dict[str, TermConfig]:
    """The terms of a `rewards:` section that stands alone. ConfigError."""
    return _terms(data, where, "reward")


def _guards(data: Any, schema: type, where: str, role: str) -> dict[str, Any]:
    """Gates or constraints by name: the keys of a term, and the schema's own."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must map names to settings, e.g. {{consistency: {{margin: 0.001}}}}")
    own = [item.name for item in dataclasses.fields(schema) if item.name != "term"]
    guards = {}
    for name, given in data.items():
        given = dict(given or {})
        for key in given:
            if key not in (*own, *GUARD_TERM_KEYS):
                raise ConfigError(f"{where}.{name}.{key}: unknown key.{_nearest(str(key), (*own, *GUARD_TERM_KEYS))}")
        term = _terms({name: {key: given[key] for key in given if key in GUARD_TERM_KEYS}}, where, role)[str(name)]
        settings = vars(
            section(_without_term(schema), {key: given[key] for key in own if key in given}, f"{where}.{name}")
        )
        guards[str(name)] = schema(term=term, **settings)
    return guards


def _without_term(schema: type) -> type:
    """The same fields but the term, as OmegaConf wants them: mutable, each with its default."""
    types = get_type_hints(schema)
    fields = [(item.name, types[item.name], item.default) for item in dataclasses.fields(schema) if item.name != "term"]
    return dataclasses.make_dataclass(schema.__name__, fields)


def _nearest(key: str, names: Any) -> str:
    near = difflib.get_close_matches(key, list(names), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{hint} Known: {', '.join(sorted(names))}."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def user_errors(make: Callable[[], Any], section: str) -> Any:
    """A ValueError raised while a plug-in is built is the user's to mend: it becomes a ConfigError that names the section."""
    try:
        return make()
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(section.split(".")[0] + ".") else f"{section}: {text}") from error
