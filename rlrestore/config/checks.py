"""What a train config may not ask for: checks across its sections, before anything is built or written.

Each refusal is a `ConfigError` with both numbers and the remedy; a config is never changed to make it pass. The types and
unknown keys of single sections are `config.typed`'s.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from envs.base import Env
from envs.types import Task
from rewards.differentiable import not_differentiable
from rewards.rubric import Rubric
from rlrestore.algorithms.base import Algorithm
from rlrestore.config.files import ConfigError, user_errors
from rlrestore.config.guards import check_guards
from rlrestore.config.sections import TrainConfig, all_terms
from rlrestore.diffusion.kernels import DRIFT_KERNELS, KERNELS
from rlrestore.diffusion.solvers import SOLVERS
from rlrestore.engine.build import ENGINES
from rlrestore.iteration.stages import chain_times
from rlrestore.iteration.windows import WINDOW_SCHEDULES
from rlrestore.placement import check_placement, split_terms
from rlrestore.reporting.sinks import check_sinks
from rlrestore.restorers.base import Restorer

PLACEMENTS = ("colocated", "local", "separate")


def check_config(config: TrainConfig, algorithm: Algorithm) -> None:
    """ConfigError for what cannot work, before anything is built; `algorithm` is the config's own."""
    check_sinks(config.log.sinks)
    _check_choices(config)
    _check_numbers(config)
    _check_sampling(config, algorithm)
    check_placement(config.placement)
    split_terms(list(all_terms(config)), config.placement)
    _check_sizes(config, algorithm)
    _check_address(config)
    _check_asynchrony(config, algorithm)
    if not config.rewards:
        raise ConfigError("rewards is empty: name at least one term, e.g. rewards: {nss: {weight: 1}}")
    check_guards(config, algorithm)
    if algorithm.needs.reward:
        _check_gradients(config)
    if config.rollout.refill and (config.credit.min_spread <= 0 or config.credit.baseline == "history"):
        raise ConfigError(
            f"rollout.refill={config.rollout.refill} replaces groups that credit drops, and with credit.min_spread="
            f"{config.credit.min_spread}, credit.baseline={config.credit.baseline} none is dropped for its spread: set min_spread, "
            "e.g. to 0.1, with baseline mean or leave_one_out"
        )
    if config.rollout.refill and config.asynchrony.ahead:
        raise ConfigError(
            f"rollout.refill={config.rollout.refill} samples other tasks when the first were scored, and asynchrony.ahead="
            f"{config.asynchrony.ahead} keeps the samplers busy with later iterations: set one of them to 0"
        )
    if config.credit.between == "spread" and config.credit.baseline == "history":
        raise ConfigError(
            "credit.between=spread weighs groups by their spread and credit.baseline=history has no groups: set between=equal"
        )
    if config.rollout.weights == "ema" and algorithm.needs.old_policy:
        raise ConfigError(
            f"rollout.weights=ema and algorithm.kind={config.algorithm.kind} samples from an old policy of its own: set "
            "rollout.weights=current (algorithm.old_decay is its memory)"
        )
    if config.engine.precision == "bfloat16" and (config.engine.kind == "torch" or config.engine.zero == 0):
        raise ConfigError(
            f"engine.precision=bfloat16 with engine.kind={config.engine.kind}, engine.zero={config.engine.zero}: float32 master "
            "weights need engine.kind=deepspeed and engine.zero >= 1"
        )
    _check_thrift(config)


def _check_thrift(config: TrainConfig) -> None:
    """What saves memory and needs DeepSpeed, a stage, or a package."""
    engine = config.engine
    for key, value, usual in (("optimiser", engine.optimiser, "adamw"), ("offload", engine.offload, "none")):
        if value != usual and engine.kind != "deepspeed":
            raise ConfigError(
                f"engine.{key}={value} needs engine.kind=deepspeed, got {engine.kind}: set it, or {usual}"
            )
    if engine.offload != "none" and engine.zero == 0:
        raise ConfigError(f"engine.offload={engine.offload} needs engine.zero >= 1, got 0")
    if engine.offload == "weights" and engine.zero != 3:
        raise ConfigError(
            f"engine.offload=weights needs engine.zero=3, got {engine.zero}: set it, or offload=optimiser"
        )
    if engine.optimiser == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("engine.optimiser=adamw8bit needs bitsandbytes: pip install bitsandbytes, or set adamw")


def check_precision(config: TrainConfig, restorer: Restorer) -> None:
    """Trained weights are float32, or have float32 masters."""
    trained = [
        value.dtype
        for name, value in restorer.denoiser.named_parameters()
        if not restorer.trainable or any(re.search(pattern, name) for pattern in restorer.trainable)
    ]
    if torch.bfloat16 in trained and config.engine.precision != "bfloat16":
        raise ConfigError(
            f"restorer.precision=bfloat16 would train bfloat16 weights without float32 masters (engine.precision="
            f"{config.engine.precision}): set restorer.lora_rank, restorer.precision=float32, or engine.precision=bfloat16"
        )


def _check_asynchrony(config: TrainConfig, algorithm: Algorithm) -> None:
    options, placement = config.asynchrony, config.placement
    if options.ahead < 0 or not 1 <= options.truncate <= options.drop:
        raise ConfigError(
            f"asynchrony: ahead={options.ahead} must be 0 (off) or positive, truncate={options.truncate:g} at least 1 and "
            f"drop={options.drop:g} no smaller"
        )
    if options.ahead == 0:
        return
    if placement.kind != "separate":
        raise ConfigError(
            f"asynchrony.ahead={options.ahead} needs samplers beside the trainers and placement.kind={placement.kind} has none: set "
            "placement.kind=separate"
        )
    if options.ahead > placement.max_staleness:
        raise ConfigError(
            f"asynchrony.ahead={options.ahead} makes rollouts lag {options.ahead} version(s) and placement.max_staleness="
            f"{placement.max_staleness} allows fewer: raise it, or lower asynchrony.ahead"
        )
    if options.ahead > 1 and config.curriculum.candidates > 1:
        raise ConfigError(
            f"asynchrony.ahead={options.ahead} draws tasks before the scores that curriculum.candidates={config.curriculum.candidates} "
            "chooses by: set asynchrony.ahead=1 or curriculum.candidates=1"
        )
    if algorithm.needs.reward or (algorithm.needs.trajectory and algorithm.needs.groups):
        raise ConfigError(
            f"algorithm.kind={config.algorithm.kind} has no correction for stale rollouts: set asynchrony.ahead=0, or use a policy "
            "gradient (grpo) or a forward-process method (nft)"
        )


def _check_address(config: TrainConfig) -> None:
    address = config.ray.address
    if address is None or address == "auto" or re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}", address):
        return
    if "://" in address:
        raise ConfigError(
            f"ray.address={address}: the run has to be started on a node of the cluster (ray.address=auto, scripts/launch/ray_job.sh)"
        )
    raise ConfigError(f"ray.address={address} must be null (this machine), auto or host:port, e.g. 10.0.0.1:6379")


def _check_gradients(config: TrainConfig) -> None:
    kind = config.algorithm.kind
    if blind := not_differentiable(Rubric(list(config.rewards.values()))):
        raise ConfigError(
            f"algorithm.kind={kind} needs the gradient of every reward and {', '.join(blind)} has none: move it to evaluate.gold, or "
            "use a method that only needs its value, such as grpo"
        )
    if config.sampling.solver != "euler":
        raise ConfigError(
            f"algorithm.kind={kind} repeats the last steps alone, and sampling.solver={config.sampling.solver} remembers those "
            "before: set sampling.solver=euler"
        )


def _check_choices(config: TrainConfig) -> None:
    for key, value, choices in (
        ("engine.kind", config.engine.kind, ENGINES),
        ("engine.zero", config.engine.zero, (0, 1, 2, 3)),
        ("engine.precision", config.engine.precision, ("float32", "bfloat16")),
        ("engine.optimiser", config.engine.optimiser, ("adamw", "adamw8bit")),
        ("engine.offload", config.engine.offload, ("none", "optimiser", "weights")),
        ("placement.kind", config.placement.kind, PLACEMENTS),
        ("sampling.solver", config.sampling.solver, SOLVERS),
        ("sampling.sampler", config.sampling.sampler, ("ode", *sorted(KERNELS))),
        ("evaluate.weights", config.evaluate.weights, ("current", "ema")),
        ("credit.normalise", config.credit.normalise, ("global", "group", "none", "pooled")),
        ("credit.baseline", config.credit.baseline, ("history", "leave_one_out", "mean")),
        ("credit.fuse", config.credit.fuse, ("normalise_then_sum", "sum_then_normalise")),
        ("credit.between", config.credit.between, ("equal", "spread")),
        ("rollout.weights", config.rollout.weights, ("current", "ema")),
        ("sampling.window_schedule", config.sampling.window_schedule, WINDOW_SCHEDULES),
    ):
        if value not in choices:
            raise ConfigError(f"{key}={value} is unknown: choose one of {', '.join(map(str, choices))}")


def _check_numbers(config: TrainConfig) -> None:
    """Each number by itself, so that none is found out in the middle of a run."""
    engine, budget = config.engine, config.reward_budget
    for key, value, good, wanted in (
        ("run.seed", config.run.seed, config.run.seed >= 0, "0 or positive"),
        ("run.max_hours", config.run.max_hours, config.run.max_hours >= 0, "0 (no limit) or positive"),
        ("sampling.window_every", config.sampling.window_every, config.sampling.window_every >= 0, "0 or positive"),
        ("sampling.shift", config.sampling.shift, config.sampling.shift > 0, "positive; 1 is no shift"),
        ("sampling.tail", config.sampling.tail, 0 < config.sampling.tail <= 1, "above 0 and at most 1 (all steps)"),
        ("rollout.refill", config.rollout.refill, config.rollout.refill >= 0, "0 (off) or positive"),
        *(
            (f"regularise.{key}", weight, weight >= 0, "0 or positive")
            for key, weight in vars(config.regularise).items()
        ),
        *((f"blocks.{key}", mass, mass >= 0, "0 or positive") for key, mass in vars(config.blocks).items()),
        ("curriculum.candidates", config.curriculum.candidates, config.curriculum.candidates >= 1, "at least 1 (off)"),
        ("curriculum.memory", config.curriculum.memory, 0 <= config.curriculum.memory < 1, "in [0, 1)"),
        ("curriculum.floor", config.curriculum.floor, 0 < config.curriculum.floor <= 1, "in (0, 1]"),
        ("credit.history", config.credit.history, config.credit.history >= 2, "at least 2, e.g. 16"),
        ("credit.clamp", config.credit.clamp, config.credit.clamp > 0, "positive, e.g. 5"),
        ("engine.lr", engine.lr, engine.lr > 0, "positive, e.g. 1e-4"),
        (
            "engine.betas",
            engine.betas,
            len(engine.betas) == 2 and all(0 <= b < 1 for b in engine.betas),
            "two numbers in [0, 1)",
        ),
        ("engine.weight_decay", engine.weight_decay, engine.weight_decay >= 0, "0 or positive"),
        ("engine.warmup", engine.warmup, engine.warmup >= 0, "0 or positive"),
        ("engine.grad_clip", engine.grad_clip, engine.grad_clip >= 0, "0 (none) or positive"),
        ("engine.ema", engine.ema, 0 <= engine.ema < 1, "in [0, 1)"),
        ("reward_budget.max_fraction", budget.max_fraction, 0 <= budget.max_fraction <= 1, "in [0, 1]"),
        ("reward_budget.window", budget.window, budget.window >= 1, "at least 1"),
        ("reward_budget.min_scores", budget.min_scores, budget.min_scores >= 1, "at least 1"),
        ("evaluate.batch", config.evaluate.batch, config.evaluate.batch >= 1, "at least 1"),
        ("evaluate.every", config.evaluate.every, config.evaluate.every >= 0, "0 (first and last only) or positive"),
        ("checkpoint.every", config.checkpoint.every, config.checkpoint.every >= 0, "0 (last only) or positive"),
        ("checkpoint.keep", config.checkpoint.keep, config.checkpoint.keep >= 1, "at least 1, better 2"),
        ("log.image_tasks", config.log.image_tasks, config.log.image_tasks >= 1, "at least 1"),
    ):
        if not good:
            raise ConfigError(f"{key}={value} must be {wanted}")
    user_errors(
        lambda: Rubric(list(config.rewards.values()), vars(config.blocks)) if config.rewards else None, "rewards"
    )
    user_errors(lambda: Rubric(list(all_terms(config).values())) if config.rewards else None, "evaluate.gold")


def _check_sampling(config: TrainConfig, algorithm: Algorithm) -> None:
    sampling, kind = config.sampling, config.algorithm.kind
    coldest, hottest = sampling.temperature
    if sampling.times and not (
        len(sampling.times) == sampling.steps + 1
        and all(a > b for a, b in pairwise(sampling.times))
        and (sampling.times[0] <= 1 and sampling.times[-1] == 0)
    ):
        raise ConfigError(
            f"sampling.times={list(sampling.times)} must be sampling.steps + 1 = {sampling.steps + 1} falling numbers, at "
            "most 1 and ending at 0"
        )
    if not 0 < coldest <= hottest:
        raise ConfigError(f"sampling.temperature={[coldest, hottest]} must be two positive numbers, the smaller first")
    if not algorithm.needs.trajectory:
        if sampling.tail < 1:
            raise ConfigError(
                f"sampling.tail={sampling.tail} shortens what follows a window and algorithm.kind={kind} has none: set it to 1, or "
                f"lower sampling.steps={sampling.steps}"
            )
        return
    if sampling.window_schedule != "constant" and not sampling.window_every:
        raise ConfigError(
            f"sampling.window_schedule={sampling.window_schedule} says how long a start of a sliding window lasts and "
            "sampling.window_every=0 draws it: set window_every, e.g. to 25"
        )
    if (coldest, hottest) != (1.0, 1.0):
        raise ConfigError(
            f"sampling.temperature={[coldest, hottest]}: algorithm.kind={kind} credits the recorded steps, which would be blamed for "
            "the initial noise; set it to [1, 1], or use a forward-process method such as nft"
        )
    if sampling.sampler == "ode":
        raise ConfigError(
            f"algorithm.kind={kind} needs stochastic steps and sampling.sampler=ode has none: set sampling.sampler=cps"
        )
    low, high = sampling.window_range
    if not 0 <= low < high <= sampling.steps or sampling.window < 1 or sampling.window > high - low:
        raise ConfigError(
            f"sampling.window={sampling.window} must fit into window_range={[low, high]} of {sampling.steps} steps: "
            f"lower the window, or widen the range up to [0, {sampling.steps - 1}]"
        )
    times = chain_times(sampling)
    if high == sampling.steps:
        raise ConfigError(
            f"sampling.window_range={[low, high]} reaches step {high - 1}, which ends at t={float(times[high]):g} with std 0 and has "
            f"no log-probability: set window_range to [{low}, {high - 1}] at the most"
        )
    if sampling.sampler not in DRIFT_KERNELS and sampling.level > 1:
        raise ConfigError(
            f"sampling.level={sampling.level} must be at most 1 for sampling.sampler={sampling.sampler}: 1 is full re-noising"
        )
    if sampling.level <= 0:
        raise ConfigError(
            f"sampling.level={sampling.level} makes every step deterministic: {kind} needs level > 0, e.g. 0.8"
        )


def _check_sizes(config: TrainConfig, algorithm: Algorithm) -> None:
    rollout, placement, engine = config.rollout, config.placement, config.engine
    total, ranks = rollout.groups * rollout.samples, placement.ranks
    for key, value in (
        ("run.steps", config.run.steps), ("rollout.groups", rollout.groups), ("rollout.batch", rollout.batch),
        ("engine.micro_batch", engine.micro_batch), ("placement.ranks", ranks), ("sampling.steps", config.sampling.steps),
        ("placement.rollout_actors", placement.rollout_actors), ("placement.reward_workers", placement.reward_workers),
        ("evaluate.tasks", config.evaluate.tasks), ("evaluate.samples", config.evaluate.samples),
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{key}={value} must be at least 1")
    if rollout.samples < 2:
        raise ConfigError(
            f"rollout.samples={rollout.samples}: a group needs at least 2 rollouts to be compared; 8 is usual"
        )
    if placement.kind == "local" and ranks > 1:
        raise ConfigError(
            f"placement.kind=local is one process and placement.ranks={ranks}: choose colocated or separate"
        )
    if total % rollout.batch:
        raise ConfigError(
            f"rollout.groups * rollout.samples = {total} does not divide into batches of rollout.batch={rollout.batch}: "
            f"choose a divisor of {total}"
        )
    if (total // rollout.batch) % ranks:
        raise ConfigError(
            f"{total // rollout.batch} batches of an iteration do not divide over placement.ranks={ranks}: "
            f"change rollout.groups ({rollout.groups}) or rollout.batch ({rollout.batch})"
        )
    if rollout.batch % engine.micro_batch:
        raise ConfigError(
            f"engine.micro_batch={engine.micro_batch} does not divide rollout.batch={rollout.batch}: a micro-batch is a slice of "
            "what was sampled together"
        )
    if algorithm.needs.groups and engine.micro_batch % rollout.samples:
        raise ConfigError(
            f"algorithm.kind={config.algorithm.kind} compares the rollouts of a photo and engine.micro_batch="
            f"{engine.micro_batch} cuts groups of rollout.samples={rollout.samples}: make it a multiple of {rollout.samples}"
        )
    micro_batches = total // ranks // engine.micro_batch
    if algorithm.updates > micro_batches:
        raise ConfigError(
            f"algorithm.updates={algorithm.updates} but a rank has only {micro_batches} micro-batches an iteration: lower updates or "
            f"engine.micro_batch ({engine.micro_batch})"
        )


def check_needs(rubric: Rubric, env: Env, where: str) -> None:
    if "gt" in rubric.needs and not env.has_gt:
        names = [name for name, spec in zip(rubric.names, rubric.specs, strict=True) if "gt" in spec.needs]
        raise ConfigError(
            f"{where} {', '.join(names)} compare(s) with a reference and env '{env.name}' has none: remove the metric(s), "
            "or use an env with references"
        )


def check_recorded(config: TrainConfig, algorithm: Algorithm, tasks: Sequence[Task]) -> None:
    """What an env that brings its own restorations allows."""
    counts = {len(task.recorded) for task in tasks}
    if counts == {0}:
        return
    if algorithm.needs.trajectory or algorithm.needs.reward:
        raise ConfigError(
            f"algorithm.kind={config.algorithm.kind} trains on the sampler's own steps and env.kind={config.env.kind} has finished "
            "restorations only: choose dpo, or another forward-process method (docs/algorithms.md)"
        )
    if counts != {config.rollout.samples}:
        raise ConfigError(
            f"env.kind={config.env.kind} has {max(counts)} restorations of a photo and rollout.samples={config.rollout.samples}: set "
            f"rollout.samples={max(counts)}"
        )


def check_photos(config: TrainConfig, restorer: Restorer, size: tuple[int, int]) -> None:
    """(H, W) of the first photo in pixels: crops of a size that the restorer works in, or whole photos, one size a batch."""
    rollout = config.rollout
    if getattr(config.env.config, "size", 0) is None:  # whole photos are padded inside `condition`
        if rollout.samples % rollout.batch:
            raise ConfigError(
                f"env.size is null, so photos may have several sizes, and rollout.batch={rollout.batch} mixes groups of "
                f"rollout.samples={rollout.samples}: choose a batch that divides {rollout.samples}, or an env.size"
            )
    elif any(side % restorer.multiple for side in size):
        raise ConfigError(
            f"env tasks are {size[0]}x{size[1]} px and the restorer works in multiples of {restorer.multiple}: choose another env.size"
        )


def check_times(config: TrainConfig, algorithm: Algorithm, restorer: Restorer, size: tuple[int, int]) -> None:
    """What the restorer's own range of times allows."""
    sampling = config.sampling
    if restorer.one_step:
        if algorithm.needs.trajectory:
            raise ConfigError(
                f"algorithm.kind={config.algorithm.kind} needs the density of steps and restorer.kind={config.restorer.kind} is "
                "deterministic: choose a forward-process method such as nft"
            )
        if sampling.steps != 1:
            raise ConfigError(
                f"sampling.steps={sampling.steps} and restorer.kind={config.restorer.kind} takes one step: set sampling.steps=1"
            )
    if chain_times(sampling)[0] > restorer.t_max + 1e-6:  # a float32 that was printed
        own = ", ".join(f"{t:.7g}" for t in restorer.times(sampling.steps, size))
        raise ConfigError(
            f"sampling starts at t={chain_times(sampling)[0]:g} and this restorer knows no noise above t={restorer.t_max:.6g}: "
            f"set sampling.times, e.g. to its own [{own}]"
        )
