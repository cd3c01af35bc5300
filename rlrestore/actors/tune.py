"""The trials of a sweep on Ray Tune: as many at once as asked for, stopped early by ASHA if asked for.

Tune places and stops; which trials there are and which are finished is `sweeps.sweep`'s, by their folders. A trial is one process and
reports its held-out evaluations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our runs log themselves

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from rlrestore.actors.cluster import start_ray
from rlrestore.config.sections import RayConfig
from rlrestore.sweeps.sweep import SweepConfig, Trial


def run_trials(
    train_config: Path, trials: Sequence[Trial], config: SweepConfig, tag: str, higher_is_better: bool, steps: int,
    finished: Callable[[Trial, str], None],
) -> None:  # fmt: skip
    """Run each to its end. `tag` is the scalar that ASHA goes by; `finished(trial, "" or what went wrong)` after each one."""
    start_ray(RayConfig(address=config.address), config.cpus * config.parallel)
    root = (Path(config.dir) / config.name).resolve()
    scheduler = None
    if config.method == "asha":
        scheduler = AsyncHyperBandScheduler(
            time_attr="step", metric=tag, mode="max" if higher_is_better else "min",
            max_t=steps, grace_period=min(config.grace, steps), reduction_factor=2,
        )  # fmt: skip
    by_name = {trial.name: trial for trial in trials}
    trainable = tune.with_parameters(_trial, here=str(Path.cwd()), config_path=str(train_config))
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": config.cpus, "gpu": config.gpus}),
        param_space={"trial": tune.grid_search([(trial.name, trial.overrides) for trial in trials])},
        tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=config.parallel),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(root), verbose=0, failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[_Finished(by_name, finished)],
        ),
    )  # fmt: skip
    tuner.fit()


class _Finished(tune.Callback):
    def __init__(self, by_name: Mapping[str, Trial], finished: Callable[[Trial, str], None]):
        self.by_name, self.finished = by_name, finished

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.finished(self.by_name[trial.config["trial"][0]], "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        text = (trial.error_file and Path(trial.error_file).read_text()) or "its process died"
        self.finished(self.by_name[trial.config["trial"][0]], text.strip().splitlines()[-1])


class _Reporter:
    """A sink that tells Tune of evaluations."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step and any(tag.startswith("eval/") for tag in values):
            tune.report({"step": step, **values})

    def image(self, step: int, tag: str, path: Path) -> None: ...

    def text(self, step: int, tag: str, markdown: str) -> None: ...

    def close(self) -> None: ...


def _trial(config: Mapping[str, Any], here: str, config_path: str) -> None:
    os.chdir(here)  # Tune changes it; paths in configs are from where the command was given
    import torch

    from rlrestore.sweeps.trial import run_trial

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    run_trial(Path(config_path), config["trial"][1], [_Reporter()])
