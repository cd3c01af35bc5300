"""`rlrestore judge ...`."""

from __future__ import annotations

import json
from pathlib import Path

from rlrestore.errors import InputError
from rlrestore.judging import evaluate_judge, load_judge_config, train_judge
from rlrestore.quiet import quiet


def run_judge_train(config_path: Path, overrides: list[str]) -> None:
    quiet()
    folder = train_judge(load_judge_config(config_path, overrides))
    print_result(json.loads((folder / "result.json").read_text("utf-8")))
    print(f"\njudge        {folder / 'judge'}\nnumbers      {folder / 'result.json'}")


def run_judge_eval(judge: Path, data: Path, output: Path | None) -> None:
    """On a test arena, or on LL-Bench. InputError for folders that are not what they should be."""
    quiet()
    if output is not None and output.exists():
        raise InputError(f"{output} exists already: choose another --output")
    try:
        result = evaluate_judge(judge, data)
    except ValueError as error:
        raise InputError(str(error)) from error
    print_result(result)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def print_result(result: dict, indent: int = 0) -> None:
    """Nested numbers, one a line."""
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{' ' * indent}{name}")
            print_result(value, indent + 2)
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{' ' * indent}{name:<22} {shown}")
