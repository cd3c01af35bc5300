"""A finished run's folder without any training: what `rlrestore report` reads, with numbers that a test can choose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROLES = {"nss": ("reward", False), "psnr_rgb": ("gold", True)}


def write_run(folder: Path, gains: Mapping[str, Sequence[float]] | None = None, name: str = "", side: int = 24) -> Path:
    """`gains`: metric -> tuned - base of each task, for the metrics of ROLES and "mix"."""
    gains = gains or {"mix": [0.5, 0.1], "nss": [-0.2, -0.4], "psnr_rgb": [1.0, -2.0]}
    folder.mkdir(parents=True)
    count = len(next(iter(gains.values())))
    metrics = {
        metric: {
            "role": ROLES.get(metric, ("reward", True))[0], "higher_is_better": ROLES.get(metric, ("reward", True))[1],
            "base": 1.0, "tuned": 1.0 + float(np.mean(moved)), "delta": float(np.mean(moved)),
            "ci95": [float(min(moved)), float(max(moved))], "n": count,
        }
        for metric, moved in gains.items()
    }  # fmt: skip
    result = {"metrics": metrics, "images": 64, "wall_s": 75.0, "stages_s": {"sample": 30.0, "update": 40.0, "score": 5.0},
              "efficiency": 0.8, "versions": {"torch": "2"}, "seed": 0}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "run.json").write_text(json.dumps({"kind": "train", "exit": "done", "started": "2026-01-01T00:00:00Z"}))
    (folder / "config.resolved.yaml").write_text(
        f"run: {{name: '{name or folder.name}', seed: 0, steps: 4}}\nalgorithm: {{kind: nft}}\nrestorer: {{kind: embedded}}\n"
        "env: {kind: photos}\nrewards: {nss: {weight: 1.0}}\nevaluate: {gold: {psnr_rgb: {}}}\n"
        "rollout: {groups: 4, samples: 4}\nengine: {kind: torch, lr: 1.0e-4, precision: float32}\nplacement: {kind: local, ranks: 1}\n"
    )
    lines = [{"step": step, "time": 0.0, "reward/mix/mean": step / 4, "reward/mix/p10": 0.0, "reward/mix/p90": step / 2,
              "train/loss": 1.0, "time/sample_s": 2.0, "throughput/images_per_s": 3.0} for step in range(1, 5)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write_panel(folder / "panel", gains, count, side)
    return folder


def _write_panel(folder: Path, gains: Mapping[str, Sequence[float]], count: int, side: int) -> None:
    folder.mkdir()
    shades = {"lq": 60, "base": 120, "tuned": 180, "gt": 240}
    tasks = []
    for index in range(count):
        pictures = {}
        for name, shade in shades.items():
            pictures[name] = f"{index:04d}_{name}.png"
            pixels = np.full((side, side, 3), shade, np.uint8)
            pixels[:, : side // 2] //= 2
            Image.fromarray(pixels).save(folder / pictures[name])
        tasks.append({
            "index": index, "id": f"photos/cat{index}@0+0", "photo": f"photos/cat{index}", "harm": -float(gains["psnr_rgb"][index]),
            "values": {metric: {"base": [1.0, None], "tuned": [1.0 + moved[index], 2.0]} for metric, moved in gains.items()},
            "pictures": pictures,
        })  # fmt: skip
    tasks.sort(key=lambda task: -task["harm"])
    metrics = {
        name: dict(zip(("role", "higher_is_better"), ROLES.get(name, ("reward", True)), strict=True)) for name in gains
    }
    (folder / "panel.json").write_text(json.dumps({"step": 4, "weights": "ema", "metrics": metrics, "tasks": tasks}))
