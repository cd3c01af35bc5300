"""`rlrestore train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlrestore.build import build_run, check_parts, load_train_config
from rlrestore.evaluate import MetricRow, caveats, table
from rlrestore.loop import Run, train
from rlrestore.quiet import quiet
from rlrestore.rundir import RunDir, now, open_run


def run_train(config_path: Path, overrides: list[str]) -> None:
    quiet()
    config = load_train_config(config_path, overrides)
    env = check_parts(config)
    folder = open_run(config.run, config)
    try:
        if _finished(folder, config.run.steps):
            print(f"{folder.path} is complete: {config.run.steps} iterations are done. To go on, raise run.steps.")
            _print_saved(folder)
            folder.close()
            return
        print(
            f"starting {config.placement.kind} placement, {config.engine.kind} engine; log: {folder.path}", flush=True
        )
        run = build_run(config, folder, env)
    except BaseException:
        folder.discard_if_empty()
        raise
    try:
        rows = train(run)
    except BaseException as error:
        folder.write_facts(exit=f"{type(error).__name__}: {error}", stopped=now())
        raise
    finally:
        run.crew.close()
        folder.close()
    folder.write_facts(stopped=now())
    _print_table(run, rows)


def _finished(folder: RunDir, steps: int) -> bool:
    done = folder.resume_from and int(folder.resume_from.name.removeprefix("step_"))
    return bool(done and done >= steps and (folder.path / "result.json").is_file())


def _print_table(run: Run, rows: dict[str, MetricRow]) -> None:
    config = run.config.evaluate
    print(f"\nbase against tuned ({config.weights} weights), {config.tasks} held-out tasks x {config.samples} seeds:\n")
    print(table(rows))
    for line in caveats(run.evaluation.tasks):
        print(line)
    _print_paths(run.folder)


def _print_saved(folder: RunDir) -> None:
    metrics = json.loads((folder.path / "result.json").read_text())["metrics"]
    print("\n" + table({name: _saved_row(row) for name, row in metrics.items()}))
    _print_paths(folder)


def _saved_row(row: dict[str, Any]) -> MetricRow:
    """The inverse of what result.json holds, where null is what could not be measured."""
    values = {key: float("nan") if row[key] is None else row[key] for key in ("base", "tuned", "delta")}
    low, high = (float("nan") if edge is None else edge for edge in row["ci95"])
    return MetricRow(**{**row, **values, "ci95": (low, high)})


def _print_paths(folder: RunDir) -> None:
    newest = max((folder.path / "checkpoints").glob("step_*"), default=None)
    grids = max((folder.path / "samples").glob("step_*/*.png"), default=None)
    print(f"\nTensorBoard  tensorboard --logdir {folder.path / 'tb'}")
    print(f"sample grid  {grids}\nresult       {folder.path / 'result.json'}\ncheckpoint   {newest}")
    print(f"try it       rlrestore restore PHOTO OUT.png --checkpoint {folder.path}")
