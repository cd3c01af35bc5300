"""From a typed config to the parts of a run. The only module that knows all plug-ins.

Refuses at start, with both numbers and the remedy, what could not work; it never changes a config to make it pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from envs.base import Env
from envs.registry import ENVS
from envs.types import Task
from rewards.base import Reward
from rewards.differentiable import DifferentiableMix, not_differentiable
from rewards.registry import build_reward
from rewards.rubric import FailureBudget, Rubric, TermConfig
from rlrestore.algorithms.base import Algorithm
from rlrestore.algorithms.registry import ALGORITHMS
from rlrestore.config import (
    ConfigError,
    FinetuneConfig,
    Plugin,
    PluginSchemas,
    RegulariseConfig,
    TrainConfig,
    read_yaml,
    typed,
)
from rlrestore.crew import Crew, LocalCrew, StageTimes
from rlrestore.curriculum import Curriculum
from rlrestore.diffusion.kernels import DRIFT_KERNELS, KERNELS
from rlrestore.diffusion.solvers import SOLVERS
from rlrestore.engine.base import Engine, EngineOptions
from rlrestore.engine.build import ENGINES, build_engine, free_port
from rlrestore.evaluate import Evaluation
from rlrestore.history import RewardHistory
from rlrestore.learner import Learner
from rlrestore.log import RunLog
from rlrestore.loop import Run, resume
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.registry import RESTORERS
from rlrestore.rundir import RunDir, now, versions
from rlrestore.scoring import Scorer
from rlrestore.stages import chain_times, evaluation_chain

PLACEMENTS = ("colocated", "local", "separate")


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A train config, typed and checked across sections; nothing is built or written."""
    config = typed(TrainConfig, read_yaml(path, overrides), _schemas(), str(path))
    check_config(config)
    return config


def load_finetune_config(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    config = typed(FinetuneConfig, read_yaml(path, overrides), _schemas(), str(path))
    if config.optimiser.schedule not in ("wsd", "cosine"):
        raise ConfigError(f"optimiser.schedule '{config.optimiser.schedule}' is unknown: choose wsd or cosine")
    return config


def _schemas() -> PluginSchemas:
    return {
        section: {kind: schema for kind, (schema, _) in registry.items()}
        for section, registry in (("env", ENVS), ("restorer", RESTORERS), ("algorithm", ALGORITHMS))
    }


# -- checks across sections ----------------------------------------------------------------------------------------


def check_config(config: TrainConfig) -> None:
    """ConfigError with both numbers and the remedy for what cannot work, before anything is built."""
    algorithm = build_algorithm(config.algorithm)
    _check_choices(config)
    _check_numbers(config)
    _check_sampling(config, algorithm)
    _check_sizes(config, algorithm)
    if not config.rewards:
        raise ConfigError("rewards is empty: name at least one term, e.g. rewards: {nss: {weight: 1}}")
    if algorithm.needs.reward:
        _check_gradients(config)
    if config.engine.precision == "bfloat16" and (config.engine.kind == "torch" or config.engine.zero == 0):
        raise ConfigError(
            f"engine.precision=bfloat16 with engine.kind={config.engine.kind}, engine.zero={config.engine.zero}: float32 master "
            "weights need engine.kind=deepspeed and engine.zero >= 1"
        )


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
        ("placement.kind", config.placement.kind, PLACEMENTS),
        ("sampling.solver", config.sampling.solver, SOLVERS),
        ("sampling.sampler", config.sampling.sampler, ("ode", *sorted(KERNELS))),
        ("evaluate.weights", config.evaluate.weights, ("current", "ema")),
        ("credit.normalise", config.credit.normalise, ("global", "group", "none", "pooled")),
        ("credit.baseline", config.credit.baseline, ("history", "leave_one_out", "mean")),
        ("credit.fuse", config.credit.fuse, ("normalise_then_sum", "sum_then_normalise")),
    ):
        if value not in choices:
            raise ConfigError(f"{key}={value} is unknown: choose one of {', '.join(map(str, choices))}")


def _check_numbers(config: TrainConfig) -> None:
    """Each number by itself, so that none is found out in the middle of a run."""
    engine, budget = config.engine, config.reward_budget
    for key, value, good, wanted in (
        ("run.seed", config.run.seed, config.run.seed >= 0, "0 or positive"),
        ("sampling.window_every", config.sampling.window_every, config.sampling.window_every >= 0, "0 or positive"),
        ("sampling.shift", config.sampling.shift, config.sampling.shift > 0, "positive; 1 is no shift"),
        *(
            (f"regularise.{key}", weight, weight >= 0, "0 or positive")
            for key, weight in vars(config.regularise).items()
        ),
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
    _user_errors(lambda: Rubric(list(config.rewards.values())) if config.rewards else None, "rewards")
    _user_errors(lambda: Rubric(list(all_terms(config).values())) if config.rewards else None, "evaluate.gold")


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
        return
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


# -- parts ---------------------------------------------------------------------------------------------------------


def build_env(plugin: Plugin) -> Env:
    _, env_class = ENVS[plugin.kind]
    return _user_errors(lambda: env_class(plugin.config), "env")  # type: ignore[call-arg]


def first_draw(env: Env, n: int) -> list[Task]:
    """The n tasks of the first step, drawn early: what a config asks of its data and cannot get is said at the start."""
    return _user_errors(lambda: env.draw(0, n), "env")


def build_restorer(plugin: Plugin) -> Restorer:
    _, restorer_class = RESTORERS[plugin.kind]
    return _user_errors(lambda: restorer_class(plugin.config), "restorer")  # type: ignore[call-arg]


def best_device() -> torch.device:
    """The GPU that this process was given (Ray hides the others), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_algorithm(plugin: Plugin) -> Algorithm:
    _, algorithm_class = ALGORITHMS[plugin.kind]
    return _user_errors(lambda: algorithm_class(plugin.config), "algorithm")  # type: ignore[call-arg]


def build_term(term: TermConfig) -> Reward:
    return _user_errors(lambda: build_reward(term.kind, term.params), f"rewards.{term.name}")


def build_scorer(terms: Mapping[str, TermConfig]) -> Scorer:
    return Scorer(terms, build_term)


def all_terms(config: TrainConfig) -> dict[str, TermConfig]:
    """Rewards and gold metrics; a metric that is rewarded under the same name is not gold."""
    return {
        **config.rewards,
        **{name: term for name, term in config.evaluate.gold.items() if name not in config.rewards},
    }


@dataclass(frozen=True)
class LearnerRecipe:
    """All that a process needs to build its learner: plain data, sent to every rank."""

    restorer: Plugin
    algorithm: Plugin
    engine: str
    options: EngineOptions
    warmup: int
    ema_cap: float
    max_staleness: int
    trainable: tuple[str, ...]
    regularise: RegulariseConfig
    rewards: tuple[TermConfig, ...]  # if the algorithm climbs their gradient

    @staticmethod
    def of(config: TrainConfig) -> LearnerRecipe:
        engine = config.engine
        options = EngineOptions(
            engine.lr, engine.betas, engine.weight_decay, engine.grad_clip, engine.zero, engine.precision, engine.micro_batch,
            engine.partition_threshold,
        )  # fmt: skip
        return LearnerRecipe(
            config.restorer, config.algorithm, engine.kind, options, engine.warmup, engine.ema,
            config.placement.max_staleness, engine.trainable, config.regularise, tuple(config.rewards.values()),
        )  # fmt: skip

    def build(self, rank: int = 0, world: int = 1) -> Learner:
        def make_engine(network: nn.Module) -> Engine:
            return build_engine(self.engine, network, self.options, rank, world)

        algorithm, reward = build_algorithm(self.algorithm), None
        if algorithm.needs.reward:
            reward = DifferentiableMix(self.rewards, [build_term(term) for term in self.rewards])
        return Learner(
            build_restorer(self.restorer).to(best_device()), algorithm, make_engine,
            lr=self.options.lr, warmup=self.warmup, ema_cap=self.ema_cap,
            micro_batch=self.options.micro_batch, max_staleness=self.max_staleness, trainable=self.trainable,
            regularise=self.regularise, reward=reward,
        )  # fmt: skip


def build_crew(config: TrainConfig, times: StageTimes) -> Crew:
    recipe, terms = LearnerRecipe.of(config), all_terms(config)
    if config.placement.kind == "local":
        if config.engine.kind == "deepspeed":
            from rlrestore.engine.group import join_group

            join_group(0, 1, "127.0.0.1", free_port(), config.placement.stage_timeout_s)
        return LocalCrew(recipe.build(), build_scorer(terms), tuple(config.rewards), times)
    from rlrestore.actors.crew import RayCrew

    return RayCrew(recipe, terms, tuple(config.rewards), config.placement, config.ray, times)


def build_evaluation(config: TrainConfig, env: Env) -> Evaluation:
    return Evaluation(
        env.held_out(config.evaluate.tasks), Rubric(list(all_terms(config).values())),
        evaluation_chain(config.sampling), config.evaluate.samples, config.evaluate.batch, config.log.image_tasks,
    )  # fmt: skip


def build_run(config: TrainConfig, folder: RunDir, env: Env) -> Run:
    """Everything of a run, brought to where its checkpoint left it. The caller closes `run.crew`."""
    torch.manual_seed(config.run.seed)  # nothing draws from the global generator; this makes a mistake repeatable
    times = StageTimes()
    rubric = Rubric(list(config.rewards.values()))
    evaluation = build_evaluation(config, env)
    budget = FailureBudget(
        config.reward_budget.max_fraction, config.reward_budget.window, config.reward_budget.min_scores
    )
    curriculum = Curriculum(config.curriculum, config.run.seed)
    history = RewardHistory(config.credit.history) if config.credit.baseline == "history" else None
    crew = build_crew(config, times)
    try:
        folder.write_config(config)
        folder.write_facts(kind="train", started=now(), versions=versions(), data=env.fingerprint(), exit="running")
        first = int(folder.resume_from.name.removeprefix("step_")) if folder.resume_from else 0
        log = RunLog(folder.path, purge_step=first + 1 if first else 0)
        run = Run(
            config,
            env,
            rubric,
            crew,
            evaluation,
            folder,
            log,
            budget,
            times,
            build_algorithm(config.algorithm),
            curriculum,
            history,
        )
        resume(run)
    except BaseException:
        crew.close()
        raise
    return run


def check_parts(config: TrainConfig) -> Env:
    """Build what fails on user errors, in this process, before any folder or worker exists; returns the env."""
    env = build_env(config.env)
    restorer = build_restorer(config.restorer)
    for term in all_terms(config).values():
        build_term(term)
    check_needs(Rubric(list(config.rewards.values())), env, "rewards:")
    check_needs(Rubric(list(all_terms(config).values())), env, "evaluate.gold:")
    if config.regularise.supervised > 0 and not env.has_gt:
        raise ConfigError(
            f"regularise.supervised={config.regularise.supervised} trains on references and env '{env.name}' has none: set it to 0, or "
            "use an env with references"
        )
    size = first_draw(env, config.rollout.groups * config.curriculum.candidates)[0].lq.shape[-2:]
    if any(side % restorer.multiple for side in size):
        raise ConfigError(
            f"env tasks are {size[0]}x{size[1]} px and the restorer works in multiples of {restorer.multiple}: choose another env.size"
        )
    check_times(config, restorer, (size[0], size[1]))
    return env


def check_times(config: TrainConfig, restorer: Restorer, size: tuple[int, int]) -> None:
    """What the restorer's own range of times allows."""
    sampling = config.sampling
    if restorer.one_step:
        if build_algorithm(config.algorithm).needs.trajectory:
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


def _user_errors(make: Callable[[], Any], section: str) -> Any:
    """A ValueError raised while a plug-in is built is the user's to mend: it becomes a ConfigError that names the section."""
    try:
        return make()
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(section.split(".")[0] + ".") else f"{section}: {text}") from error
