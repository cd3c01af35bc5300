"""`rlrestore judge ...`."""

from __future__ import annotations

import json
from pathlib import Path

from rewards.ll_score.llbench import read_llbench
from rewards.registry import build_reward
from rlrestore.errors import InputError
from rlrestore.judging.bench import bench, to_html
from rlrestore.judging.train import evaluate_judge, load_judge_config, train_judge
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


def run_judge_bench(data: Path, target: Path, kinds: list[str], judge: Path | None) -> None:
    """Writes bench.json and bench.html into a new folder. InputError for what the user has to mend."""
    quiet()
    if target.exists():
        raise InputError(f"{target} exists already: choose another --output")
    try:
        rewards = {kind: build_reward(kind) for kind in kinds}
        if judge is not None:
            rewards["ll_score"] = build_reward("ll_score", {"checkpoint": str(judge)})
        result = bench(rewards, read_llbench(data))
    except ValueError as error:
        raise InputError(str(error)) from error
    target.mkdir(parents=True)
    (target / "bench.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (target / "bench.html").write_text(to_html(result), "utf-8")
    print_result({name: block["quality"] for name, block in result["metrics"].items()})
    print(f"\npage         {target / 'bench.html'}")


def print_result(result: dict, indent: int = 0) -> None:
    """Nested numbers, one a line."""
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{' ' * indent}{name}")
            print_result(value, indent + 2)
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{' ' * indent}{name:<22} {shown}")
