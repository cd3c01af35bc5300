"""A synthetic LL-Bench in the five-CSV layout: every fact of a picture is visible in it, so a judge can learn it.

Pictures are 64 px. A source is a random smooth colour field; an output is the field with noise (the less, the better:
that is its Bradley-Terry score) and, if it hallucinates, a black and white checkered square.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

TASKS = ("Denoise", "Raindrop_Removal", "Dehaze")


def write_bench(folder: Path, sources: int = 50, outputs: int = 4, seed: int = 0) -> Path:
    """sources x outputs rows; scores of a source have mean 0; every pair appears once."""
    rng = np.random.default_rng(seed)
    tables: dict[str, list[dict[str, object]]] = {
        name: [] for name in ("images", "pairs", "scores", "hallucination", "rankings")
    }
    (folder / "pictures").mkdir(parents=True)
    for s in range(sources):
        field = np.kron(rng.uniform(60, 190, (2, 2, 3)), np.ones((32, 32, 1)))
        _save(folder, f"s{s}.png", field + rng.normal(0, 40, field.shape))
        levels = rng.permutation(outputs)
        for k in range(outputs):
            name, worse = f"s{s}_m{k}", int(levels[k])
            hallucinated = bool(rng.random() < 0.4)
            picture = field + rng.normal(0, 1, field.shape) * 16 * worse
            if hallucinated:
                y, x = rng.integers(0, 40, 2)
                picture[y : y + 24, x : x + 24] = 255 * (np.indices((24, 24)).sum(0) // 4 % 2)[..., None]
            _save(folder, f"{name}.png", picture)
            tables["images"].append({
                "image_id": name, "source_id": f"s{s}", "task": TASKS[s % len(TASKS)], "model": f"model{k}",
                "degraded_path": f"pictures/s{s}.png", "restored_path": f"pictures/{name}.png",
            })  # fmt: skip
            tables["scores"].append({"image_id": name, "bt_score": (outputs - 1) / 2 - worse})
            tables["hallucination"].append({"image_id": name, "label": "yes" if hallucinated else "no"})
            tables["rankings"].append({"source_id": f"s{s}", "image_id": name, "rank": worse + 1})
        for i in range(outputs):
            for j in range(i + 1, outputs):
                tables["pairs"].append({
                    "image_a": f"s{s}_m{i}", "image_b": f"s{s}_m{j}", "preference": "a" if levels[i] < levels[j] else "b",
                })  # fmt: skip
    from rewards.ll_score.llbench import FILES

    for name, rows in tables.items():
        file = folder / FILES[name]
        file.parent.mkdir(exist_ok=True)
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def _save(folder: Path, name: str, picture: np.ndarray) -> None:
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "pictures" / name)
