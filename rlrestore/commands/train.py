"""`rlrestore train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from envs.base import Env
from rlrestore.build import build_run, check_parts, load_train_config
from rlrestore.config.sections import TrainConfig
from rlrestore.evaluation.alarm import alarm_lines
from rlrestore.evaluation.evaluate import MetricRow, caveats, constraint_lines, table
from rlrestore.loop import Run, train
from rlrestore.quiet import quiet
from rlrestore.reporting.report import write_report
from rlrestore.rundir import RunDir, now, open_run
from rlrestore.stopping import Stop, StopRequested


def run_train(config_path: Path, overrides: list[str]) -> None:
    quiet()
    config = load_train_config(config_path, overrides)
    stop = Stop(config.run.max_hours)
    env = check_parts(config)
    folder = open_run(config.run, config)
    with stop.listening():
        _train(config, env, folder, stop)


def _train(config: TrainConfig, env: Env, folder: RunDir, stop: Stop) -> None:
    try:
        if how := _finished(folder, config):
            print(f"{folder.path} is complete: {how}")
            _print_saved(folder)
            folder.close()
            return
        print(
            f"starting {config.placement.kind} placement, {config.engine.kind} engine; log: {folder.path}", flush=True
        )
        run = build_run(config, folder, env, stop)
    except BaseException:
        folder.discard_if_empty()
        raise
    try:
        rows = train(run)
    except BaseException as error:
        kind = "stopped" if isinstance(error, StopRequested) else type(error).__name__
        folder.write_facts(exit=f"{kind}: {error}", stopped=now())
        raise
    finally:
        run.crew.close()
        run.log.close()
        folder.close()
    folder.write_facts(stopped=now())
    write_report(folder.path)
    _print_table(run, rows)


def _finished(folder: RunDir, config: TrainConfig) -> str:
    """How the run ended and how to go on, or "" if it did not end."""
    if folder.resume_from is None or not (folder.path / "result.json").is_file():
        return ""
    done = int(folder.resume_from.name.removeprefix("step_"))
    if done >= config.run.steps:
        return f"{config.run.steps} iterations are done. To go on, raise run.steps."
    alarm = json.loads((folder.path / "result.json").read_text()).get("alarm") or {}
    if alarm.get("action") == config.alarm.action and done in (alarm.get("stopped_at"), alarm.get("returned_to")):
        return f"its alarm ended it at step {done} (alarm.action={config.alarm.action}). To go on from there, set alarm.action=warn."
    return ""


def _print_table(run: Run, rows: dict[str, MetricRow]) -> None:
    config = run.config.evaluate
    print(f"\nbase against tuned ({config.weights} weights), {config.tasks} held-out tasks x {config.samples} seeds:\n")
    print(table(rows))
    result = json.loads((run.folder.path / "result.json").read_text())
    for line in (
        *constraint_lines(result["constraints"]),
        *caveats(run.evaluation.tasks),
        *alarm_lines(result["alarm"]),
    ):
        print(line)
    _print_paths(run.folder)


def _print_saved(folder: RunDir) -> None:
    result = json.loads((folder.path / "result.json").read_text())
    print("\n" + table({name: _saved_row(row) for name, row in result["metrics"].items()}))
    for line in (*constraint_lines(result.get("constraints") or {}), *alarm_lines(result.get("alarm"))):
        print(line)
    _print_paths(folder)


def _saved_row(row: dict[str, Any]) -> MetricRow:
    """The inverse of what result.json holds, where null is what could not be measured."""
    values = {key: float("nan") if row[key] is None else row[key] for key in ("base", "tuned", "delta")}
    low, high = (float("nan") if edge is None else edge for edge in row["ci95"])
    return MetricRow(**{**row, **values, "ci95": (low, high)})


def _print_paths(folder: RunDir) -> None:
    newest = max((folder.path / "checkpoints").glob("step_*"), default=None)
    grids = max((folder.path / "samples").glob("step_*/eval_lq_base_tuned_gt.png"), default=None)
    print(f"\nTensorBoard  tensorboard --logdir {folder.path / 'tb'}")
    print(f"sample grid  {grids}\nresult       {folder.path / 'result.json'}\ncheckpoint   {newest}")
    print(f"report       {folder.path / 'report.html'}")
    print(f"try it       rlrestore restore PHOTO OUT.png --checkpoint {folder.path}")
