"""LL-Bench for the trainer: an endless sequence of sources with some of their outputs, and the collator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from rewards.judges.trainer import collate_targets
from rewards.ll_score.llbench import BenchSource
from rewards.ll_score.model import LLScore

MAX_PIXELS = 64_000_000  # more is refused before it is decoded


def open_rgb(path: Path) -> Image.Image:
    """Upright RGB picture, alpha on white. ValueError naming the file if it is broken or too large."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{path} has {opened.width}x{opened.height} px, more than {MAX_PIXELS} in all")
            upright = ImageOps.exif_transpose(opened)
            if "A" in upright.getbands() or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
            return upright.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


class BenchSequence(Dataset):
    """Item i, a pure function of (seed, i): a random task, a random source of it, `items` of its outputs."""

    def __init__(self, sources: Sequence[BenchSource], items: int, length: int, seed: int):
        self.items, self.length, self.seed = items, length, seed
        by_task: dict[str, list[BenchSource]] = defaultdict(list)
        for source in sources:
            if source.outputs:
                by_task[source.task].append(source)
        if not by_task:
            raise ValueError("LL-Bench has no source to train on: lower held_out, or name fewer held_out_models")
        self.by_task = [by_task[task] for task in sorted(by_task)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        group = self.by_task[int(rng.integers(len(self.by_task)))]
        source = group[int(rng.integers(len(group)))]
        chosen = rng.permutation(len(source.outputs))[: self.items].tolist()
        degraded = open_rgb(source.degraded)
        return {
            "rows": [(degraded, open_rgb(source.outputs[i].path), source.task) for i in chosen],
            "score": torch.tensor([source.outputs[i].score for i in chosen]),
            "hallucination": torch.tensor([source.outputs[i].hallucinated for i in chosen]),
            "preference": preference_matrix(source, chosen),
        }


def preference_matrix(source: BenchSource, chosen: Sequence[int]) -> Tensor:
    """[m, m] P(row over column) of the outputs `chosen`, NaN where nobody compared them."""
    matrix = torch.full((len(chosen), len(chosen)), torch.nan)
    for x, i in enumerate(chosen):
        for y, j in enumerate(chosen):
            if (i, j) in source.preference:
                matrix[x, y] = source.preference[i, j]
                matrix[y, x] = 1 - source.preference[i, j]
    return matrix


class BenchCollator:
    """Rows of several sources into one batch of the judge, with their targets."""

    def __init__(self, judge: LLScore, unit: float):
        self.judge, self.unit = judge, unit

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [row for item in items for row in item["rows"]]
        return {**self.judge.encode(rows), **collate_targets(items, self.unit)}
