"""Typed configs from sparse YAML: unknown keys die with the nearest name, nothing is repaired silently.

A config is sections; each is a dataclass whose defaults are the published method. Plug-in sections (`env`, `restorer`,
`algorithm`) carry `kind:`, which selects the dataclass from the plug-in's literal dict (`rewards` are terms: kind, weight, params).
Order: defaults < file < `key=value` from the command line. Environment variables cannot be read from a config
(`oc.env` would copy secrets into the run directory). Errors are `ConfigError`: one line that names file, key and remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rewards.registry import reward_spec
from rewards.rubric import TermConfig

OmegaConf.clear_resolver("oc.env")


class ConfigError(ValueError):
    """The user's config is wrong; the message says where and what to do. Exit code 64."""


@dataclass
class RunConfig:
    name: str = MISSING  # folder under `dir`
    dir: str = "runs"
    seed: int = 0
    steps: int = 100  # optimiser-visible iterations: draw, roll out, score, credit, update
    resume: str = "auto"  # auto: newest complete checkpoint of this run, if any | never | a checkpoint folder
    overwrite: bool = False  # with resume=never: delete the run directory that is there


@dataclass
class SamplingConfig:
    """Time schedule and noise of a rollout (algorithms.md names: a = level)."""

    steps: int = 8  # of a rollout and of evaluation
    solver: str = "euler"  # of the deterministic steps: euler | dpmpp_2m
    shift: float = 1.0  # t = k u / (1 + (k - 1) u)
    times: tuple[float, ...] = ()  # the steps + 1 times themselves, from the restorer's t_max down to 0; () is `shift`
    sampler: str = "cps"  # stochastic kernel inside the window: cps | dance_sde | ddim | flow_sde; ode for none
    level: float = 0.8  # a of the kernel; CPS arXiv 2509.05952
    window: int = 3  # stochastic (trained) steps of a rollout; the rest is ODE
    # Scale of the initial noise, spread evenly over the members of a group. Below 1 they differ in how much they dare, which
    # is exploration for forward-process methods; trajectory methods need (1, 1), evaluation always uses 1.
    temperature: tuple[float, float] = (1.0, 1.0)
    window_range: tuple[int, int] = (0, 4)  # the window lies inside these step indices
    # 0: the window's start is drawn an iteration (Flow-GRPO-Fast); n: it slides on by one every n iterations, and from the end
    # back to the start (MixGRPO, arXiv 2507.21802)
    window_every: int = 0


@dataclass
class RolloutConfig:
    groups: int = 8  # G tasks an iteration, over all ranks
    samples: int = 8  # K rollouts of each task
    batch: int = 16  # rollouts sampled in one forward; a multiple of samples, or a divisor


@dataclass
class CreditConfig:
    """How scores become advantages (algorithms.md 7)."""

    normalise: str = "pooled"  # std that divides: pooled | group | global | none
    baseline: str = "mean"  # what is subtracted: mean | leave_one_out (of the group) | history (of the photo)
    history: int = 16  # scores of a photo that `baseline: history` remembers
    rank: bool = False  # rewards become ranks inside their group first
    fuse: str = "normalise_then_sum"  # normalise_then_sum | sum_then_normalise
    clamp: float = 5.0
    min_valid: int = 0  # fewer valid rollouts drop the group; 0 means max(2, K / 2)
    min_spread: float = 0.0  # groups whose fused spread is below this (in reward scales) are dropped
    shuffle: bool = False  # control experiment: permute rewards inside each group before credit


@dataclass
class CurriculumConfig:
    """Which of the drawn tasks are trained on (`curriculum.py`)."""

    candidates: int = 1  # tasks drawn for each that is kept; 1 keeps all
    memory: float = 0.8  # of the running mean of a photo's in-group spread
    floor: float = 0.2  # least weight of a photo, the average one's being 1


@dataclass
class RegulariseConfig:
    """Weights of what keeps the policy near its start (`regularisers.py`); 0 switches a penalty off."""

    velocity: float = 0.0  # of mean_d (v - v_ref)^2; DiffusionNFT (arXiv 2509.16117) uses 1e-4
    low_frequency: float = 0.0  # of the shift of brightness and colour on large scales, pixels in [0, 1]
    supervised: float = 0.0  # of flow matching on the tasks' references: an anchor of data, not of the start

    @property
    def asks_reference(self) -> bool:
        """Whether the frozen start is needed."""
        return self.velocity > 0 or self.low_frequency > 0


@dataclass
class EngineConfig:
    kind: str = "torch"  # torch | deepspeed
    zero: int = 2  # DeepSpeed ZeRO stage 0-3
    precision: str = "float32"  # weights of the denoiser: float32 | bfloat16 (with float32 master weights, ZeRO >= 1)
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0  # optimiser steps of linear warm-up
    grad_clip: float = 1.0  # global norm; 0 for none
    micro_batch: int = 16  # samples of one forward and backward
    ema: float = 0.9  # cap of the evaluation EMA, decay min((1+n)/(10+n), cap)
    trainable: tuple[str, ...] = ()  # regular expressions: only parameters whose name one of them matches; () is all
    partition_threshold: int = 100_000  # ZeRO-3 leaves parameters with fewer elements whole


@dataclass
class PlacementConfig:
    kind: str = "local"  # local | colocated | separate
    ranks: int = 1  # trainer ranks
    rollout_actors: int = 1  # of `separate`
    reward_workers: int = 1  # processes that score; each holds the whole mix
    threads: int = 0  # of each trainer and rollout process; 0: this machine's cores / processes that work at once
    rank_cpus: float = 1.0  # what Ray reserves for each
    rollout_cpus: float = 1.0
    reward_cpus: float = 1.0
    gpus: bool = False  # one GPU a trainer rank and rollout actor
    max_staleness: int = 0  # versions that a rollout may lag behind the trainer
    start_timeout_s: float = 300.0  # placement, process start, engine start
    stage_timeout_s: float = 600.0  # any wait inside an iteration


@dataclass
class RayConfig:
    address: str | None = None  # null starts Ray on this machine; "auto" or host:port joins a cluster
    object_store_mb: int = 256  # of a local Ray


@dataclass
class RewardBudgetConfig:
    """A reward that fails more than this stops the run (rewards.rubric.FailureBudget)."""

    max_fraction: float = 0.05  # of a reward's scores within the window
    window: int = 50  # chunks
    min_scores: int = 100  # smallest denominator: the first few failures are forgiven


@dataclass
class EvaluateConfig:
    """Base and tuned at equal seeds on held-out tasks."""

    every: int = 0  # iterations between evaluations while training; 0 for first and last only
    tasks: int = 32
    samples: int = 4  # noise seeds a task
    batch: int = 32
    weights: str = "ema"  # ema | current
    gold: dict[str, Any] = field(default_factory=dict)  # metrics that are watched, never rewarded


@dataclass
class CheckpointConfig:
    every: int = 10  # iterations; the last one is always saved
    keep: int = 2


@dataclass
class LogConfig:
    image_tasks: int = 4


@dataclass
class TrainConfig:
    run: RunConfig
    env: Any
    restorer: Any
    algorithm: Any
    rewards: dict[str, TermConfig]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    regularise: RegulariseConfig = field(default_factory=RegulariseConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    reward_budget: RewardBudgetConfig = field(default_factory=RewardBudgetConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class OptimiserConfig:
    """Supervised training."""

    modules: tuple[str, ...] = ()  # networks to train, the others stay frozen; empty: all that the restorer has
    batch: int = 16
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 200
    schedule: str = "wsd"  # wsd: constant, then linear to 0 over the last `decay` steps | cosine
    decay: int = 1000
    grad_clip: float = 1.0
    ema: float = 0.999
    threads: int = 0  # 0 leaves torch's default
    data_workers: int = 1


@dataclass
class FinetuneEvaluateConfig:
    every: int = 500
    tasks: int = 16
    samples: int = 16
    steps: int = 8


@dataclass
class FinetuneConfig:
    run: RunConfig
    env: Any
    restorer: Any
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    evaluate: FinetuneEvaluateConfig = field(default_factory=FinetuneEvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=500))


PluginSchemas = Mapping[str, Mapping[str, type]]  # section -> kind -> dataclass


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """File, over the one that its key `base` names, plus `key=value` overrides, as plain data."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist; the shipped ones are in configs/")
    try:
        loaded = _with_base(path)
        dotlist = OmegaConf.from_dotlist(list(overrides))
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

    A section of another `kind` starts anew; `rewards: {NAME: null}` drops a term.
    """
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'env:' at the top level")
    if "base" not in loaded:
        return loaded
    named = loaded.pop("base")
    if not isinstance(named, str) or not (base := path.parent / named).is_file():
        raise ConfigError(f"{path}: base '{named}' does not exist; it is a path from {path.parent}")
    if base.resolve() in above:
        raise ConfigError(f"{path}: base '{named}' leads back to itself")
    below = _with_base(base, (*above, path.resolve()))
    for section, given in loaded.items():
        if isinstance(given, DictConfig) and given.get("kind", None) not in (
            None,
            (below.get(section) or {}).get("kind"),
        ):
            below.pop(section, None)
    for name in [name for name, term in (loaded.get("rewards") or {}).items() if term is None]:
        if name in (below.get("rewards") or {}):  # a term that the base has and this one has not
            below.rewards.pop(name)
            loaded.rewards.pop(name)
    return OmegaConf.merge(below, loaded)  # type: ignore[return-value]


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
        elif name in plugins:
            values[name] = _plugin(given, plugins[name], f"{where}: {name}")
        else:
            values[name] = _section(types[name], given or {}, f"{where}: {name}")
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


def _section(schema: type, data: Any, where: str) -> Any:
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
    return Plugin(kind, _section(schemas[kind], data, where))


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


def _nearest(key: str, names: Any) -> str:
    near = difflib.get_close_matches(key, list(names), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{hint} Known: {', '.join(sorted(names))}."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
