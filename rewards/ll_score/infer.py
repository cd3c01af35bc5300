"""The authors' inference contract (MediaX-SJTU/LL-Bench, revision 7881159), so that their package can replace ours.

    python -m rewards.ll_score.infer --config C.yaml --input-jsonl IN --output-jsonl OUT

C.yaml: model_name_or_path, checkpoint_dir, checkpoint_step (-1: the last), device, batch_size (1). A row of IN is
{"id", "task", "degraded_image", "restored_image"}; OUT has the same fields and "quality_score" (float, comparable within
one degraded image only) and "hallucination_prob" (in [0, 1]). Paths are relative to IN. Refuses, naming the line:
a missing field, an unknown task, a picture that cannot be read. OUT is written at the end, whole; it must not exist.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rewards.ll_score.data import open_rgb
from rewards.ll_score.model import JUDGE, LLScore, load_ll_score
from rewards.ll_score.prompt import known_task

FIELDS = ("id", "task", "degraded_image", "restored_image")
CONFIG = ("model_name_or_path", "checkpoint_dir", "checkpoint_step", "device", "batch_size")


def checkpoint_folder(folder: Path, step: int) -> Path:
    """`folder` itself if it holds a judge, else its `step_N`: the given one, or the last for -1."""
    if (folder / JUDGE).is_file():
        return folder
    found = {int(p.name[5:]): p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / JUDGE).is_file()}
    if not found or (step >= 0 and step not in found):
        raise ValueError(
            f"{folder} holds no judge{f' of step {step}' if step >= 0 else ''}; steps there: {sorted(found)}"
        )
    return found[max(found) if step < 0 else step]


def read_config(file: Path) -> dict[str, Any]:
    """With defaults. ValueError for unknown or missing keys."""
    values = yaml.safe_load(file.read_text("utf-8")) or {}
    if unknown := set(values) - set(CONFIG):
        raise ValueError(f"{file}: unknown keys {sorted(unknown)}; known: {', '.join(CONFIG)}")
    if "checkpoint_dir" not in values:
        raise ValueError(f"{file}: checkpoint_dir is missing")
    return {"model_name_or_path": None, "checkpoint_step": -1, "device": "cpu", "batch_size": 1, **values}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of IN. ValueError naming the line."""
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, Mapping) or (missing := [name for name in FIELDS if name not in row]):
                raise ValueError(
                    f"wants an object with {', '.join(FIELDS)}"
                    if not isinstance(row, Mapping)
                    else f"lacks {missing[0]}"
                )
            known_task(str(row["task"]))
        except ValueError as error:
            raise ValueError(f"{file} line {number}: {error}") from error
        rows.append(dict(row))
    return rows


def score_rows(judge: LLScore, rows: list[dict[str, Any]], folder: Path, batch_size: int) -> list[dict[str, Any]]:
    """The rows with their two scores. Pictures are opened batch by batch."""
    out = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        pictures = [
            (open_rgb(folder / r["degraded_image"]), open_rgb(folder / r["restored_image"]), r["task"]) for r in batch
        ]
        quality, probability = judge.score(pictures, batch_size)
        for row, q, p in zip(batch, quality.tolist(), probability.tolist(), strict=True):
            out.append({**row, "quality_score": q, "hallucination_prob": p})
    return out


def infer(config: Path, source: Path, target: Path) -> int:
    """Number of rows written. ValueError for what the module docstring refuses."""
    if target.exists():
        raise ValueError(f"{target} exists already: choose another --output-jsonl")
    settings = read_config(config)
    rows = read_rows(source)
    folder = checkpoint_folder(Path(settings["checkpoint_dir"]), int(settings["checkpoint_step"]))
    judge = load_ll_score(folder, settings["model_name_or_path"])
    judge.to(settings["device"])
    scored = score_rows(judge, rows, source.parent, int(settings["batch_size"]))
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in scored), "utf-8")
    temporary.replace(target)
    return len(scored)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rewards.ll_score.infer", description="Score restorations with LL-Score.")
    for name in ("--config", "--input-jsonl", "--output-jsonl"):
        parser.add_argument(name, type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        infer(options.config, options.input_jsonl, options.output_jsonl)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 64
    return 0


if __name__ == "__main__":
    sys.exit(main())
