"""`rlrestore report`: the report of a run or of a sweep, written anew from what lies in its folder."""

from __future__ import annotations

from pathlib import Path

from rlrestore.checkpoint import read_json
from rlrestore.errors import InputError
from rlrestore.reporting.report import write_report
from rlrestore.sweeps.sweep import load_sweep


def run_report(source: Path, overrides: list[str]) -> None:
    """`source` is a run, a sweep's folder, or a sweep's file; `overrides` are keys of a sweep."""
    if source.suffix in (".yaml", ".yml"):
        _sweep_report(source, overrides)
    elif (source / "sweep.json").is_file():
        file = Path(read_json(source / "sweep.json")["file"])
        if not file.is_file():
            raise InputError(f"{source} was made from {file}, which is gone: give the sweep's file instead")
        _sweep_report(file, overrides)
    elif (source / "run.json").is_file():
        if overrides:
            raise InputError(
                f"{source} is a run, which takes no {overrides[0]}: only the report of a sweep has options"
            )
        print(f"report       {write_report(source)}")
    else:
        raise InputError(
            f"{source} is neither a run (it has no run.json) nor a sweep: give runs/NAME, or a sweep's file"
        )


def _sweep_report(file: Path, overrides: list[str]) -> None:
    from rlrestore.sweeps.report import write_sweep_report

    sweep = load_sweep(file, overrides)
    if not sweep.folder.is_dir():
        raise InputError(f"{sweep.folder} does not exist: run rlrestore sweep {file} first")
    page, config = write_sweep_report(sweep)
    print(f"report       {page}" + (f"\nchosen       {config}" if config else ""))
