"""`rlrestore evaluate`: base against tuned of an existing run, at equal seeds and without training.

It reads the run and adds to it: result.json is replaced, a grid is written to samples/. The metrics log, TensorBoard,
the checkpoints, config.resolved.yaml and run.json stay as they are, so the run can be continued afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from envs.base import Env
from rewards.rubric import FailureBudget
from rlrestore.build import build_crew, build_evaluation, check_parts, load_train_config
from rlrestore.checkpoint import read_json, read_manifest, verify
from rlrestore.commands.evaluate_sets import run_sets
from rlrestore.config.files import ConfigError, plain, read_yaml
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import StageTimes
from rlrestore.evaluation.evaluate import (
    ConstraintRow,
    Evaluation,
    Measured,
    MetricRow,
    caveats,
    compare,
    constraint_lines,
    constraint_rows,
    table,
)
from rlrestore.loop import guards_json, images_trained, result_json
from rlrestore.quiet import quiet
from rlrestore.reporting.panel import write_panel
from rlrestore.reporting.pictures import to_pil
from rlrestore.reporting.report import write_report
from rlrestore.rundir import newest_checkpoint, open_existing

# What the checkpoint's files and the meaning of base and tuned depend on; all else may differ from the run.
FIXED_KEYS = (
    "run.seed", "env", "restorer", "algorithm", "rewards", "gates", "constraints", "sampling", "engine", "rollout.groups",
    "rollout.samples",
)  # fmt: skip


def run_evaluate(config_path: Path, overrides: list[str], checkpoint: Path | None) -> None:
    quiet()
    if "sets" in (given := read_yaml(config_path, overrides)):  # a test protocol (configs/eval/)
        run_sets(config_path, given, checkpoint)
        return
    config = load_train_config(config_path, overrides)
    with contextlib.closing(open_existing(config.run)) as folder:
        source = _checkpoint(folder.path, checkpoint)
        _refuse_changes(folder.path / "config.resolved.yaml", config, source)
        env = check_parts(config)
        print(f"evaluating {source} in {config.placement.kind} placement", flush=True)
        evaluation, base, tuned, seconds = _measure(config, env, source)
        rows = compare(base, tuned, evaluation.rubric)
        held = constraint_rows(config.constraints, base, tuned, evaluation.rubric)
        step = read_manifest(source).step
        picture = _write_grid(folder.path, step, evaluation.grid(base, tuned))
        write_panel(folder.path, evaluation, base, tuned, step, config.evaluate.weights)
        result = folder.write_result(_result(folder.path, config, source, rows, held, seconds))
        report = write_report(folder.path)
    print(f"\nbase against step {step} ({config.evaluate.weights} weights), {config.evaluate.tasks} held-out tasks x "
          f"{config.evaluate.samples} seeds:\n\n{table(rows)}")  # fmt: skip
    for line in (*constraint_lines(guards_json(held, {}, None)["constraints"]), *caveats(evaluation.tasks)):
        print(line)
    print(f"\nsample grid  {picture}\nresult       {result}\nreport       {report}\ncheckpoint   {source}")


# -- the run that is there -----------------------------------------------------------------------------------------


def _checkpoint(run: Path, given: Path | None) -> Path:
    """A verified checkpoint: the given one, or the run's newest."""
    if given is not None:
        if not given.is_dir():
            raise ConfigError(f"--checkpoint {given} is not a folder; give one such as {run}/checkpoints/step_000010")
        verify(given)
        return given
    newest, _ = newest_checkpoint(run)
    if newest is None:
        raise ConfigError(f"{run} has no complete checkpoint: train it first, with rlrestore train and the same config")
    return newest


def _refuse_changes(saved: Path, config: TrainConfig, checkpoint: Path) -> None:
    if read_manifest(checkpoint).meta.get("kind") != "train":
        raise ConfigError(f"{checkpoint} is not of `rlrestore train`, so there is no base in it: give one that is")
    if not saved.is_file():
        raise ConfigError(f"{saved} is missing, so nobody knows what was trained here: train the run again")
    old, new = yaml.safe_load(saved.read_text()), json.loads(json.dumps(plain(config)))
    ranks = ("placement.ranks",) if config.engine.kind == "deepspeed" else ()  # its files are one a rank
    for key in (*FIXED_KEYS, *ranks):
        before, after = _at(old, key), _at(new, key)
        if (before or None) != (after or None):  # a run from before a section existed has none of it
            raise ConfigError(
                f"{saved.parent} was trained with {key}={before} and the config now says {after}: evaluate compares "
                "weights of one run, so set it back; only evaluate.*, log.* and placement.* may differ"
            )


def _at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = (data or {}).get(part)
    return data


# -- measuring -----------------------------------------------------------------------------------------------------


def _measure(config: TrainConfig, env: Env, source: Path) -> tuple[Evaluation, Measured, Measured, dict[str, float]]:
    """Both weights on the same tasks and noise, and the seconds of each."""
    torch.manual_seed(config.run.seed)
    evaluation = build_evaluation(config, env)
    crew = build_crew(config, StageTimes())
    try:
        crew.load(source)
        start = time.perf_counter()
        base = evaluation.measure(crew, "base")
        middle = time.perf_counter()
        tuned = evaluation.measure(crew, config.evaluate.weights)
        seconds = {"evaluate_base": middle - start, "evaluate_tuned": time.perf_counter() - middle}
    finally:
        crew.close()
    return evaluation, base, tuned, seconds


def _result(
    run: Path,
    config: TrainConfig,
    source: Path,
    rows: dict[str, MetricRow],
    held: dict[str, ConstraintRow],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The contract of `loop.result_json`. `images`, `wall_s` and `efficiency` say what the tuned weights cost to train.

    Stages, efficiency and alarm of the training are known if the run's own result.json is of the same number of images.
    """
    state, budget = read_json(source / "loop.json"), FailureBudget()
    budget.load_state_dict(state["budget"])
    known = read_json(run / "result.json") if (run / "result.json").is_file() else {}
    trained = known if known.get("images") == images_trained(config, state["iteration"]) else {}
    result = result_json(
        config, rows, state["iteration"], trained.get("wall_s", state["seconds"]),
        {**trained.get("stages_s", {}), **seconds}, trained.get("efficiency", 0.0),
        budget.summary(),
    )  # fmt: skip
    return {**result, **guards_json(held, state.get("multipliers", {}), trained.get("alarm"))}


def _write_grid(run: Path, step: int, picture: torch.Tensor) -> Path:
    path = run / "samples" / f"step_{step:06d}" / "evaluate_lq_base_tuned_gt.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    to_pil(picture).save(temporary, format="PNG")
    os.replace(temporary, path)
    return path
