"""From a typed config to the parts of a run. The only module that knows all plug-ins.

What a config may not ask for stands in `config/checks.py`; `check_parts` adds what only the built parts can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from envs.base import Env
from envs.registry import ENVS
from envs.types import Task
from rewards.base import Reward
from rewards.constraints import Multipliers
from rewards.differentiable import DifferentiableMix
from rewards.registry import build_reward, reward_kinds
from rewards.rubric import FailureBudget, Rubric, TermConfig
from rlrestore.algorithms.base import Algorithm
from rlrestore.algorithms.registry import ALGORITHMS
from rlrestore.config.checks import (
    check_config,
    check_needs,
    check_photos,
    check_precision,
    check_recorded,
    check_times,
)
from rlrestore.config.explain import json_schema
from rlrestore.config.files import ConfigError, Plugin, PluginSchemas, plain, read_yaml, typed, user_errors
from rlrestore.config.sections import (
    BlocksConfig,
    FinetuneConfig,
    RegulariseConfig,
    TrainConfig,
    all_terms,
    trained_terms,
)
from rlrestore.crew import Crew, LocalCrew, StageTimes
from rlrestore.engine.base import Engine, EngineOptions
from rlrestore.engine.build import build_engine, free_port
from rlrestore.evaluation.alarm import Alarm
from rlrestore.evaluation.evaluate import Evaluation
from rlrestore.iteration.curriculum import Curriculum
from rlrestore.iteration.history import RewardHistory
from rlrestore.iteration.levels import LevelKeeper, Wanted
from rlrestore.iteration.scoring import Scorer
from rlrestore.iteration.stages import evaluation_chain
from rlrestore.learning.learner import Learner
from rlrestore.loop import Run, resume
from rlrestore.reporting.board import headline, hyperparameters, layout
from rlrestore.reporting.log import RunLog
from rlrestore.reporting.sinks import Sink, open_sinks
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.registry import RESTORERS
from rlrestore.rundir import RunDir, now, versions
from rlrestore.stopping import Stop


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A train config, typed and checked across sections; nothing is built or written."""
    config = typed(TrainConfig, read_yaml(path, overrides), plugin_schemas(), str(path))
    check_config(config, build_algorithm(config.algorithm))
    return config


def load_finetune_config(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    config = typed(FinetuneConfig, read_yaml(path, overrides), plugin_schemas(), str(path))
    if config.optimiser.schedule not in ("wsd", "cosine"):
        raise ConfigError(f"optimiser.schedule '{config.optimiser.schedule}' is unknown: choose wsd or cosine")
    if config.run.max_hours < 0:
        raise ConfigError(f"run.max_hours={config.run.max_hours} must be 0 (no limit) or positive")
    return config


def train_schema() -> dict[str, Any]:
    """The JSON schema of a train config, with all plug-ins that are registered here."""
    return json_schema(TrainConfig, plugin_schemas(), TermConfig, reward_kinds(), "rlrestore train config")


def plugin_schemas() -> PluginSchemas:
    return {
        section: {kind: schema for kind, (schema, _) in registry.items()}
        for section, registry in (("env", ENVS), ("restorer", RESTORERS), ("algorithm", ALGORITHMS))
    }


def build_env(plugin: Plugin) -> Env:
    _, env_class = ENVS[plugin.kind]
    return user_errors(lambda: env_class(plugin.config), "env")  # type: ignore[call-arg]


def first_draw(env: Env, n: int) -> list[Task]:
    """The n tasks of the first step, drawn early: what a config asks of its data and cannot get is said at the start."""
    return user_errors(lambda: env.draw(0, n), "env")


def build_restorer(plugin: Plugin) -> Restorer:
    _, restorer_class = RESTORERS[plugin.kind]
    return user_errors(lambda: restorer_class(plugin.config), "restorer")  # type: ignore[call-arg]


def best_device() -> torch.device:
    """The GPU that this process was given (Ray hides the others), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_algorithm(plugin: Plugin) -> Algorithm:
    _, algorithm_class = ALGORITHMS[plugin.kind]
    return user_errors(lambda: algorithm_class(plugin.config), "algorithm")  # type: ignore[call-arg]


def build_term(term: TermConfig) -> Reward:
    return user_errors(lambda: build_reward(term.kind, term.params), f"rewards.{term.name}")


def build_scorer(terms: Mapping[str, TermConfig]) -> Scorer:
    return Scorer(terms, build_term)


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
    ema_samples: bool
    shuffle: bool  # a control
    blocks: BlocksConfig

    @staticmethod
    def of(config: TrainConfig) -> LearnerRecipe:
        engine = config.engine
        options = EngineOptions(
            engine.lr, engine.betas, engine.weight_decay, engine.grad_clip, engine.zero, engine.precision, engine.micro_batch,
            engine.partition_threshold, engine.optimiser, engine.offload,
        )  # fmt: skip
        return LearnerRecipe(
            config.restorer, config.algorithm, engine.kind, options, engine.warmup, engine.ema,
            config.placement.max_staleness, engine.trainable, config.regularise, tuple(config.rewards.values()),
            config.rollout.weights == "ema", config.credit.shuffle, config.blocks,
        )  # fmt: skip

    def build(self, rank: int = 0, world: int = 1) -> Learner:
        def make_engine(network: nn.Module) -> Engine:
            return build_engine(self.engine, network, self.options, rank, world)

        algorithm, reward = build_algorithm(self.algorithm), None
        if algorithm.needs.reward:
            terms = [build_term(term) for term in self.rewards]
            reward = DifferentiableMix(self.rewards, terms, self.shuffle, vars(self.blocks))
        # ZeRO-3 takes the network from the host's memory parameter by parameter: no GPU ever holds it whole
        sharded = self.engine == "deepspeed" and self.options.zero == 3
        restorer = build_restorer(self.restorer).to(best_device(), denoiser=not sharded)
        return Learner(
            restorer, algorithm, make_engine,
            lr=self.options.lr, warmup=self.warmup, ema_cap=self.ema_cap,
            micro_batch=self.options.micro_batch, max_staleness=self.max_staleness, trainable=self.trainable,
            regularise=self.regularise, reward=reward, ema_samples=self.ema_samples,
        )  # fmt: skip


def build_crew(config: TrainConfig, times: StageTimes) -> Crew:
    recipe, terms = LearnerRecipe.of(config), all_terms(config)
    if config.placement.kind == "local":
        if config.engine.kind == "deepspeed":
            from rlrestore.engine.group import join_group

            join_group(0, 1, "127.0.0.1", free_port(), config.placement.stage_timeout_s)
        return LocalCrew(recipe.build(), build_scorer(terms), tuple(trained_terms(config)), times)
    from rlrestore.actors import before_ray

    before_ray(config.ray.address)
    from rlrestore.actors.crew import RayCrew

    ahead = config.asynchrony.ahead
    corrects = build_algorithm(config.algorithm).needs.trajectory
    return RayCrew(recipe, terms, tuple(trained_terms(config)), config.placement, config.ray, times, ahead, corrects)


def build_evaluation(config: TrainConfig, env: Env) -> Evaluation:
    return Evaluation(
        env.held_out(config.evaluate.tasks), Rubric(list(all_terms(config).values()), vars(config.blocks)),
        evaluation_chain(config.sampling), config.evaluate.samples, config.evaluate.batch, config.log.image_tasks,
    )  # fmt: skip


def build_log(config: TrainConfig, folder: RunDir, listeners: Sequence[Sink] = ()) -> RunLog:
    """The run's log, with what it needs once: the layout of its charts and its row of hyperparameters."""
    first = int(folder.resume_from.name.removeprefix("step_")) if folder.resume_from else 0
    params = hyperparameters(plain(config))
    sinks = open_sinks(config.log.sinks, config.log.project, folder.run_id(), folder.path, params)
    log = RunLog(folder.path, purge_step=first + 1 if first else 0, sinks=[*sinks, *listeners])
    terms = all_terms(config)
    log.custom_layout(layout(list(trained_terms(config))))
    log.hparams(params, headline({name: term.role for name, term in terms.items()}))
    return log


def build_levels(config: TrainConfig, budget: FailureBudget) -> LevelKeeper:
    wanted = Wanted.by(config.gates, config.constraints)
    return LevelKeeper(wanted, config.rollout.base_samples, evaluation_chain(config.sampling), config.run.seed, budget)


def build_run(
    config: TrainConfig, folder: RunDir, env: Env, stop: Stop | None = None, listeners: Sequence[Sink] = ()
) -> Run:
    """Everything of a run, brought to where its checkpoint left it. The caller closes `run.crew`; `listeners` get its scalars."""
    torch.manual_seed(config.run.seed)  # nothing draws from the global generator; this makes a mistake repeatable
    times = StageTimes()
    rubric = Rubric(list(trained_terms(config).values()), vars(config.blocks))
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
        log = build_log(config, folder, listeners)
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
            build_levels(config, budget),
            Multipliers(config.constraints),
            Alarm(config.alarm, evaluation.rubric),
            history,
            stop=stop or Stop(),
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
    check_needs(Rubric(list(trained_terms(config).values())), env, "gates and constraints:")
    check_needs(Rubric(list(all_terms(config).values())), env, "evaluate.gold:")
    if config.regularise.supervised > 0 and not env.has_gt:
        raise ConfigError(
            f"regularise.supervised={config.regularise.supervised} trains on references and env '{env.name}' has none: set it to 0, or "
            "use an env with references"
        )
    first = first_draw(env, config.rollout.groups * config.curriculum.candidates)
    check_recorded(config, build_algorithm(config.algorithm), first)
    lq = first[0].lq
    size = (lq.shape[-2], lq.shape[-1])
    check_photos(config, restorer, size)
    check_times(config, build_algorithm(config.algorithm), restorer, size)
    check_precision(config, restorer)
    return env
