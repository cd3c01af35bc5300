"""`rlrestore sweep`: run what is missing of a sweep, then its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rewards.registry import reward_spec
from rlrestore.build import check_parts, load_train_config
from rlrestore.checkpoint import read_json, write_json_atomic
from rlrestore.config.files import ConfigError
from rlrestore.config.sections import TrainConfig, all_terms
from rlrestore.quiet import quiet
from rlrestore.reporting.log import read_metrics
from rlrestore.rundir import now
from rlrestore.sweeps.report import write_sweep_report
from rlrestore.sweeps.sweep import STOPPED, Sweep, Trial, describe, load_sweep
from rlrestore.sweeps.trial import run_trial


def run_sweep(path: Path, overrides: list[str], dry_run: bool) -> None:
    quiet()
    sweep = load_sweep(path, overrides)
    first = _check_trials(sweep)
    todo = [trial for trial in sweep.trials if trial.state() not in ("done", STOPPED)]
    print(f"{len(sweep.points)} points x {len(sweep.config.seeds)} seeds = {len(sweep.trials)} trials of "
          f"{first.run.steps} iterations, {len(sweep.trials) - len(todo)} of them finished; {sweep.folder}", flush=True)  # fmt: skip
    if dry_run:
        for trial in sweep.trials:
            print(f"  {trial.name}  {trial.state():<14} seed {trial.seed}, {describe(trial.sets)}")
        return
    failed: list[str] = []
    if todo:
        check_parts(first)
        _remember(sweep)
        _run(sweep, todo, first, failed)
    _report(sweep)
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(todo)} trials failed (reasons above): the same command tries them again"
        )


def _check_trials(sweep: Sweep) -> TrainConfig:
    """Type every point before anything runs; the config of the first trial."""
    configs = []
    for trials in sweep.points.values():
        try:
            config = load_train_config(sweep.train, trials[0].overrides)
        except ConfigError as error:
            raise ConfigError(f"{sweep.path}: point {describe(trials[0].sets)}: {error}") from error
        if config.placement.kind != "local":
            raise ConfigError(
                f"{sweep.path}: placement.kind={config.placement.kind}: a trial is one process; set placement.kind: local"
            )
        for axis in ("quality", "fidelity"):
            metric = getattr(sweep.config, axis)
            if metric not in all_terms(config):
                raise ConfigError(f"{sweep.path}: sweep.{axis}={metric} is not measured at point {describe(trials[0].sets)}, which has "
                                  f"{', '.join(sorted(all_terms(config)))}: add it to evaluate.gold")  # fmt: skip
        if sweep.config.method == "asha" and not config.evaluate.every:
            raise ConfigError(
                f"{sweep.path}: ASHA goes by evaluations and evaluate.every=0: set it, e.g. to {sweep.config.grace}"
            )
        configs.append(config)
    return configs[0]


def _remember(sweep: Sweep) -> None:
    """What the folder is of, for `rlrestore report`."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        sweep.folder / "sweep.json", {"file": str(sweep.path.resolve()), "trials": len(sweep.trials), "started": now()}
    )
    (sweep.folder / "sweep.yaml").write_text(sweep.path.read_text())


def _run(sweep: Sweep, todo: list[Trial], first: TrainConfig, failed: list[str]) -> None:
    done = len(sweep.trials) - len(todo)

    def finished(trial: Trial, error: str) -> None:
        nonlocal done
        done += 1
        if not error and trial.state() == "unfinished":  # Tune ended it
            _mark_stopped(trial)
        if error:
            failed.append(trial.name)
        what = f"failed: {error}" if error else trial.state()
        print(
            f"[{done}/{len(sweep.trials)}] {trial.name} {what}  seed {trial.seed}, {describe(trial.sets)}", flush=True
        )

    config = sweep.config
    if config.parallel == 0:
        _run_here(sweep, todo, finished)
        return
    from rlrestore.actors.tune import run_trials

    fidelity = all_terms(first)[config.fidelity]
    tag = config.metric or f"eval/{fidelity.role}/{config.fidelity}/delta"
    up = True if config.metric else reward_spec(fidelity.kind, fidelity.params).higher_is_better
    run_trials(sweep.train, todo, config, tag, up, first.run.steps, finished)


def _run_here(sweep: Sweep, todo: list[Trial], finished: Callable[[Trial, str], None]) -> None:
    """A trial that fails does not keep the others from running, as under Tune."""
    for trial in todo:
        error = ""
        try:
            run_trial(sweep.train, trial.overrides, [])
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        finished(trial, error)


def _mark_stopped(trial: Trial) -> None:
    step = max((int(record["step"]) for record in read_metrics(trial.folder / "metrics.jsonl")), default=0)
    path = trial.folder / "run.json"
    write_json_atomic(path, {**read_json(path), "exit": f"{STOPPED} after {step} iterations", "stopped": now()})


def _report(sweep: Sweep) -> None:
    page, config = write_sweep_report(sweep)
    print(f"\nruns         {sweep.folder}\nTensorBoard  tensorboard --logdir {sweep.folder}\nreport       {page}")
    if config:
        print(f"chosen       rlrestore train {config}")
