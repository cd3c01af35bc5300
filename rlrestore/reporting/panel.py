"""The held-out photos of a run as files, for reports: `RUN/panel/` with panel.json and PNGs.

panel.json: {"step", "weights", "metrics": {name: {"role", "higher_is_better"}}, "tasks": [task, ...]}; a task is
{"id", "photo", "harm", "values": {name: {"base": [a seed each], "tuned": [...]}}, "pictures": {"lq", "base", "tuned", "gt"}}, worst
harm first, null for a score that failed. The first tasks of the env and the worst have pictures (of the first seed), the others {}.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlrestore.reporting.pictures import to_pil

if TYPE_CHECKING:
    from rlrestore.evaluation.evaluate import Evaluation, Measured

WORST = 6  # tasks that are shown because they got worse


def write_panel(
    run_dir: Path, evaluation: Evaluation, base: Measured, tuned: Measured, step: int, weights: str
) -> Path:
    """Replace RUN/panel as a whole; its path."""
    folder, temporary = run_dir / "panel", run_dir / ".tmp-panel"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    harm = harms(evaluation, base, tuned)
    by_harm = sorted(range(len(harm)), key=lambda index: -harm[index])
    shown = {*range(evaluation.pictures), *by_harm[:WORST]}
    tasks = []
    for index in by_harm:
        task = evaluation.tasks[index]
        pictures = {}
        if index in shown:
            images = {"lq": task.lq, "base": base.picture(index), "tuned": tuned.picture(index), "gt": task.gt}
            for name, image in images.items():
                if image is not None:
                    pictures[name] = f"{index:04d}_{name}.png"
                    to_pil(image).save(temporary / pictures[name])
        values = {
            name: {"base": _numbers(base.values[name][index]), "tuned": _numbers(tuned.values[name][index])}
            for name in base.values
        }
        tasks.append({
            "index": index, "id": task.id, "photo": task.photo, "harm": harm[index], "values": values, "pictures": pictures,
        })  # fmt: skip
    metrics = {"mix": {"role": "reward", "higher_is_better": True}}
    for name, term, spec in zip(evaluation.rubric.names, evaluation.rubric.terms, evaluation.rubric.specs, strict=True):
        metrics[name] = {"role": term.role, "higher_is_better": spec.higher_is_better}
    content = {"step": step, "weights": weights, "metrics": metrics, "tasks": tasks}
    (temporary / "panel.json").write_text(json.dumps(content, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


def harms(evaluation: Evaluation, base: Measured, tuned: Measured) -> list[float]:
    """How much worse each task became: mean over gold metrics (or all, without any) of the loss in stds of the base over tasks."""
    rubric = evaluation.rubric
    signs = dict(zip(rubric.names, rubric.sign_R.tolist(), strict=True))
    gold = [name for name, term in zip(rubric.names, rubric.terms, strict=True) if term.role == "gold"]
    losses = []
    for name in gold or list(rubric.names):
        before, after = (side.values[name].double().nanmean(1) for side in (base, tuned))
        known = before[before.isfinite()]
        scale = float(known.std(correction=0)) if len(known) > 1 else 0.0
        losses.append((signs[name] * (before - after) / (scale or 1.0)).nan_to_num(0.0))
    return [float(value) for value in torch.stack(losses).mean(0)]


def read_panel(run_dir: Path) -> dict[str, Any] | None:
    """panel.json of a run, or None if the run has not been evaluated at its end."""
    path = run_dir / "panel" / "panel.json"
    return json.loads(path.read_text()) if path.is_file() else None


def deltas(panel: dict[str, Any], name: str) -> tuple[np.ndarray, list[str]]:
    """([tasks] tuned - base of one metric, seeds averaged, NaN where unknown; [tasks] ids), sorted by id: runs compare."""
    found = []
    for task in panel["tasks"]:
        pair = task["values"][name]
        moved = [b - a for a, b in zip(pair["base"], pair["tuned"], strict=True) if a is not None and b is not None]
        found.append((task["id"], float(np.mean(moved)) if moved else math.nan))
    found.sort()
    return np.array([delta for _, delta in found]), [name for name, _ in found]


def open_picture(run_dir: Path, file: str) -> np.ndarray:
    """[H, W, 3] uint8."""
    with Image.open(run_dir / "panel" / file) as image:
        return np.array(image.convert("RGB"))


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
