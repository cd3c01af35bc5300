"""What gates, constraints, normalisers and the alarm may not be asked for: `checks.check_config` calls this.

Each refusal is a `ConfigError` that names the key, says both sides of the contradiction and the remedy.
"""

from __future__ import annotations

import math

from rewards.base import RewardSpec
from rewards.constraints import check_constraint
from rewards.gates import check_gate
from rewards.registry import reward_spec
from rewards.rubric import TermConfig
from rlrestore.algorithms.base import Algorithm
from rlrestore.config.files import ConfigError, user_errors
from rlrestore.config.sections import TrainConfig, all_terms, trained_terms
from rlrestore.evaluation.alarm import MIN_TASKS, watched_metrics

ACTIONS = ("off", "rollback", "stop", "warn")


def check_guards(config: TrainConfig, algorithm: Algorithm) -> None:
    """The rewards are known to be sound."""
    specs = {name: _spec(term) for name, term in config.rewards.items()}
    for name, gate in config.gates.items():
        scale = gate.term.scale or _spec(gate.term).scale
        user_errors(lambda name=name, gate=gate, scale=scale: check_gate(gate, scale, specs), f"gates.{name}")  # type: ignore[misc]
    for name, constraint in config.constraints.items():
        user_errors(lambda constraint=constraint: check_constraint(constraint), f"constraints.{name}")  # type: ignore[misc]
    _check_shared_names(config)
    if (config.gates or config.constraints) and algorithm.needs.reward:
        raise ConfigError(
            f"algorithm.kind={config.algorithm.kind} climbs the gradient of the mix and {_some(config)} cannot be part of it: remove "
            "them, or use a method that goes by scores, such as nft"
        )
    if config.rollout.base_samples < 1:
        raise ConfigError(f"rollout.base_samples={config.rollout.base_samples} must be at least 1")
    _check_normalisers(config)
    _check_alarm(config)


def _spec(term: TermConfig) -> RewardSpec:
    return reward_spec(term.kind, term.params)


def _some(config: TrainConfig) -> str:
    return ", ".join(
        [f"gates.{name}" for name in config.gates] + [f"constraints.{name}" for name in config.constraints]
    )


def _check_shared_names(config: TrainConfig) -> None:
    """Equal names share one score, so they must mean the same one."""
    terms = trained_terms(config)
    for section, guards in (("constraints", config.constraints), ("gates", config.gates)):
        for name, guard in guards.items():
            for key in ("kind", "params", "scale"):
                own, shared = getattr(guard.term, key), getattr(terms[name], key)
                own, shared = (dict(value) if key == "params" else value for value in (own, shared))
                if own != shared:
                    raise ConfigError(
                        f"{section}.{name}.{key}={own} and another term of that name has {shared}: they would share one score. "
                        "Make them equal, or rename one and say its kind"
                    )


def _check_normalisers(config: TrainConfig) -> None:
    own = [name for name, term in config.rewards.items() if term.normalise]
    for key, value, works in (
        ("credit.fuse", config.credit.fuse, config.credit.fuse == "normalise_then_sum"),
        ("credit.rank", config.credit.rank, not config.credit.rank),
        ("credit.baseline", config.credit.baseline, config.credit.baseline != "history"),
    ):
        if own and not works:
            raise ConfigError(
                f"rewards.{own[0]}.normalise={config.rewards[own[0]].normalise} normalises one reward alone and {key}={value} does "
                "not let it: remove the normaliser, or set credit.fuse=normalise_then_sum, credit.rank=false and credit.baseline=mean"
            )
    if config.credit.baseline == "history" and (
        vetoes := [n for n, gate in config.gates.items() if gate.form == "veto"]
    ):
        raise ConfigError(
            f"gates.{vetoes[0]}.form=veto gives the worst advantage of the group and credit.baseline=history knows no groups: use "
            "form: hinge, or credit.baseline=mean"
        )


def _check_alarm(config: TrainConfig) -> None:
    alarm, terms = config.alarm, all_terms(config)
    gold = {name: _spec(term) for name, term in terms.items() if term.role == "gold"}
    if alarm.action not in ACTIONS:
        raise ConfigError(f"alarm.action={alarm.action} is unknown: choose one of {', '.join(ACTIONS)}")
    if not 0 < alarm.level < 1:
        raise ConfigError(f"alarm.level={alarm.level} must lie in (0, 1), e.g. 0.95")
    if alarm.patience < 1:
        raise ConfigError(f"alarm.patience={alarm.patience} must be at least 1")
    for name in alarm.metrics:
        if name not in gold:
            raise ConfigError(
                f"alarm.metrics names '{name}', which is not in evaluate.gold: {', '.join(gold) or 'it is empty'}"
            )
    watched = watched_metrics(alarm, gold)
    for name, margin in alarm.margins.items():
        if name not in watched:
            raise ConfigError(
                f"alarm.margins names '{name}', which the alarm does not watch: {', '.join(watched) or 'it watches nothing'}"
            )
        if not (math.isfinite(margin) and margin >= 0):
            raise ConfigError(f"alarm.margins.{name}={margin} must be finite and >= 0: raw units that it may fall")
    if alarm.action in ("rollback", "stop"):
        if config.evaluate.every == 0:
            raise ConfigError(
                f"alarm.action={alarm.action} needs evaluations while training and evaluate.every=0: set it, e.g. to 5, or "
                "alarm.action=warn"
            )
        if config.evaluate.tasks < MIN_TASKS:
            raise ConfigError(
                f"alarm.action={alarm.action} needs {MIN_TASKS} held-out tasks or more and evaluate.tasks={config.evaluate.tasks}: "
                "raise it, or set alarm.action=warn"
            )
        if not watched:
            raise ConfigError(
                f"alarm.action={alarm.action} has nothing to watch: put a fidelity metric into evaluate.gold, e.g. psnr_rgb: {{}}, or "
                "name metrics in alarm.metrics"
            )
