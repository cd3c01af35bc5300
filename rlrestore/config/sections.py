"""The sections of a config as dataclasses, whose defaults are the published method.

Plug-in sections (`env`, `restorer`, `algorithm`) hold a `Plugin`: its `kind` chose the dataclass from the plug-in's literal dict.
`rewards` and `evaluate.gold` are terms (kind, weight, params), `gates` and `constraints`
terms with more keys. `files.py` reads them from YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from rewards.constraints import ConstraintConfig
from rewards.gates import GateConfig
from rewards.rubric import TermConfig


@dataclass
class RunConfig:
    name: str = MISSING  # folder under `dir`
    dir: str = "runs"
    seed: int = 0
    steps: int = 100  # optimiser-visible iterations: draw, roll out, score, credit, update
    max_hours: float = 0.0  # save and end with exit code 85 before this much wall time, start included; 0 for no limit
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
    window_schedule: str = (
        "constant"  # how long a start lasts: constant | decay | exp_decay, shorter for later ones (`windows.py`)
    )
    tail: float = (
        1.0  # share of the steps after the window that a rollout takes: MixGRPO-Flash has 0.4 with solver dpmpp_2m
    )


@dataclass
class RolloutConfig:
    groups: int = 8  # G tasks an iteration, over all ranks
    samples: int = 8  # K rollouts of each task
    batch: int = 16  # rollouts sampled in one forward; a multiple of samples, or a divisor
    base_samples: int = 2  # of the frozen base, once a task, if a gate or a constraint compares with it
    # current | ema: who makes them. An EMA moves less from one iteration to the next; a method with an old policy has its own
    weights: str = "current"
    refill: int = 0  # times that groups below `credit.min_spread` are replaced by other tasks' before training goes on


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
    between: str = "equal"  # loss weight of a group: equal | spread, more where its members differ more (DP2O-SR, arXiv 2510.18851)
    # control experiment: permute rewards inside each group before credit; direct methods climb or descend by chance
    shuffle: bool = False


@dataclass
class BlocksConfig:
    """Shares of the mix: however many terms a block has, together they weigh this, over the sum of the blocks that are present."""

    quality: float = 1.0
    fidelity: float = 1.0


@dataclass
class CurriculumConfig:
    """Which of the drawn tasks are trained on (`iteration/curriculum.py`)."""

    candidates: int = 1  # tasks drawn for each that is kept; 1 keeps all
    memory: float = 0.8  # of the running mean of a photo's in-group spread
    floor: float = 0.2  # least weight of a photo, the average one's being 1


@dataclass
class RegulariseConfig:
    """Weights of what keeps the policy near its start (`learning/regularisers.py`); 0 switches a penalty off."""

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
    optimiser: str = "adamw"  # adamw | adamw8bit (of bitsandbytes, with DeepSpeed)
    offload: str = "none"  # DeepSpeed: what lies in the host's memory: none | optimiser | weights (ZeRO-3: shards, too)
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
class RewardPoolConfig:
    """Workers of their own for some terms, e.g. a judge on half a GPU; the others stay with `placement.reward_workers`."""

    terms: list[str] = MISSING  # names under `rewards` or `evaluate.gold`
    workers: int = 1
    cpus: float = 1.0  # of each worker
    gpus: float = 0.0


@dataclass
class PlacementConfig:
    kind: str = "local"  # local | colocated | separate
    ranks: int = 1  # trainer ranks
    rollout_actors: int = 1  # of `separate`
    reward_workers: int = 1  # processes that score; each holds the whole mix, but for what has a pool of its own
    reward_pools: dict[str, RewardPoolConfig] = field(default_factory=dict)  # by a name of your choice
    threads: int = 0  # of each trainer and rollout process; 0: this machine's cores / processes that work at once
    rank_cpus: float = 1.0  # what Ray reserves for each
    rollout_cpus: float = 1.0
    reward_cpus: float = 1.0
    gpus: bool = False  # a GPU, or the share below, for every trainer rank and rollout actor
    rank_gpus: float = 1.0  # with `gpus`; shares below 1 let processes live on one GPU
    rollout_gpus: float = 1.0
    reward_gpus: float = 0.0  # of each reward worker, whatever `gpus` says
    max_staleness: int = 0  # versions that a rollout may lag behind the trainer
    start_timeout_s: float = 300.0  # placement, process start, engine start
    stage_timeout_s: float = 600.0  # any wait inside an iteration


@dataclass
class AsynchronyConfig:
    """Rollouts sampled while earlier ones are trained on (`asynchrony.py`); `placement.max_staleness` bounds it."""

    ahead: int = 0  # iterations that sampling is ahead of training, and so versions that rollouts lag; 0 is on policy
    truncate: float = 2.0  # largest importance weight of a rollout (trajectory methods)
    drop: float = 5.0  # rollouts whose importance is outside [1 / drop, drop] are dropped


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
class AlarmConfig:
    """What happens when the mix rises on held-out photos while gold metrics fall (`alarm.py`)."""

    action: str = "warn"  # warn | stop: end the run there | rollback: end it with the best checkpoint | off
    metrics: tuple[str, ...] = ()  # gold metrics that are watched; () is every one of the fidelity block
    level: float = 0.95  # of the intervals, shared by all watched metrics (Bonferroni)
    patience: int = 1  # evaluations in a row that must show it
    margins: dict[str, float] = field(default_factory=dict)  # watched metric -> raw units that it may fall


@dataclass
class CheckpointConfig:
    every: int = 10  # iterations; the last one is always saved
    keep: int = 2


@dataclass
class LogConfig:
    image_tasks: int = 4  # held-out photos in the sample grid
    sinks: tuple[str, ...] = ()  # beside TensorBoard and metrics.jsonl: trackio, wandb
    project: str = "rlrestore"  # of the sinks


@dataclass
class TrainConfig:
    run: RunConfig
    env: Any
    restorer: Any
    algorithm: Any
    rewards: dict[str, TermConfig]
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    gates: dict[str, GateConfig] = field(default_factory=dict)
    constraints: dict[str, ConstraintConfig] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    regularise: RegulariseConfig = field(default_factory=RegulariseConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    asynchrony: AsynchronyConfig = field(default_factory=AsynchronyConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    reward_budget: RewardBudgetConfig = field(default_factory=RewardBudgetConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
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


def trained_terms(config: TrainConfig) -> dict[str, TermConfig]:
    """What is scored while training: rewards, and the terms of gates and constraints, which share a reward's by its name."""
    guards: list[tuple[str, ConstraintConfig | GateConfig]] = [*config.constraints.items(), *config.gates.items()]
    return {**config.rewards, **{name: guard.term for name, guard in guards if name not in config.rewards}}


def all_terms(config: TrainConfig) -> dict[str, TermConfig]:
    """The same and gold metrics; a metric that is trained on under the same name is not gold."""
    trained = trained_terms(config)
    return {**trained, **{name: term for name, term in config.evaluate.gold.items() if name not in trained}}
