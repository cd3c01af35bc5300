"""Env `preferences`: photos with restorations of them that exist already, and how good each is. For off-line training.

`manifest` is a JSON-lines file, paths relative to it; a line is

    {"lq": "a.png", "chosen": "a1.png", "rejected": "a2.png"}                                 with "r_w", "r_l", "gt" if known
    {"lq": "a.png", "restorations": [{"image": "a1.png", "score": 0.7}, ...]}                  two or more, the same number in all

A training task carries its restorations (`Task.recorded`), which the learner takes instead of rollouts. Held-out tasks are restored
anew. Refused, by line: missing files, sizes that differ, scores that are not finite, a winner that is not better, ties of all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.degradations.jpeg import from_uint8_hwc
from envs.images import DecodedCache, checked_size, file_digest
from envs.rng import generator_for
from envs.splits import is_held_out
from envs.types import Recorded, Task

HELD_OUT_SEED = 20_251  # fixed: runs of different seeds are evaluated on the same tasks


@dataclass(frozen=True)
class PreferencesConfig:
    manifest: str  # a .jsonl file
    size: int | None = 128  # side of the crops, px; null: whole photos (then they must all have one size to be batched)
    type: str = ""  # degradation types of all photos, e.g. "haze" or "blur|noise"
    held_out_fraction: float = 0.1  # of the LQ files, chosen by name
    flip: bool = True  # mirror training crops half of the time
    cache_mb: int = 1024  # of decoded images kept in memory
    seed: int = 0  # of the training draws; held-out tasks do not depend on it


@dataclass(frozen=True)
class Line:
    """One line of the manifest."""

    name: str  # of the LQ file, relative to the manifest
    lq: Path
    images: tuple[Path, ...]  # restorations
    scores: tuple[float, ...]  # one each, higher is better
    gt: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.lq, *self.images, *([] if self.gt is None else [self.gt]))


class PreferencesEnv:
    """Crops of a photo and its restorations at the same place. ValueError, naming line or file, for what cannot work."""

    name = "preferences"

    def __init__(self, config: PreferencesConfig) -> None:
        self.config = config
        lines = _read(Path(config.manifest))
        counts = sorted({len(line.images) for line in lines})
        if len(counts) > 1:
            raise ValueError(
                f"{config.manifest} has {counts[0]} to {counts[-1]} restorations a line: give every line as many"
            )
        if len(with_gt := {line.gt is not None for line in lines}) > 1:
            raise ValueError(f'some lines of {config.manifest} have a "gt" and others none: give it in all, or in none')
        self.has_gt = with_gt.pop()
        self.lines = tuple(line for line in lines if not is_held_out(line.name, config.held_out_fraction))
        self.held_out_lines = tuple(line for line in lines if is_held_out(line.name, config.held_out_fraction))
        if not self.lines or not self.held_out_lines:
            side, remedy = ("training", "lower") if not self.lines else ("held-out", "raise")
            raise ValueError(
                f"no {side} photo among {len(lines)} lines at env.held_out_fraction={config.held_out_fraction}: {remedy} it"
            )
        self._pixels = DecodedCache(config.cache_mb * 2**20)
        for line in lines:
            _check_files(line, config.size)

    def draw(self, step: int, n: int) -> list[Task]:
        """Training tasks at positions 0..n-1 of this step, a pure function of (config.seed, step, position)."""
        tasks = []
        for position in range(n):
            rng = generator_for(self.config.seed, step, position)
            line = self.lines[int(rng.integers(len(self.lines)))]
            flip = bool(self.config.flip and rng.random() < 0.5)
            tasks.append(self._task(line, rng, flip, f"{step}.{position}", recorded=True))
        return tasks

    def held_out(self, n: int) -> list[Task]:
        """Task i shows held-out line i modulo their number, unflipped, without its restorations."""
        lines = self.held_out_lines
        return [
            self._task(lines[i % len(lines)], generator_for(HELD_OUT_SEED, i), False, f"h{i}", recorded=False)
            for i in range(n)
        ]

    def fingerprint(self) -> str:
        """Over the config, all lines with their scores, and the beginning of each file."""
        config = self.config
        digest = hashlib.sha256(f"preferences {config.size} {config.type} {config.flip} {config.seed}".encode())
        for side in (self.lines, self.held_out_lines):
            for line in side:
                digest.update(repr((line.name, line.scores)).encode())
                digest.update(b"".join(file_digest(path) for path in line.files))
        return digest.hexdigest()

    def _task(self, line: Line, rng: np.random.Generator, flip: bool, where: str, recorded: bool) -> Task:
        height, width = self._pixels[line.lq].shape[:2]
        size = self.config.size
        top, left = (0, 0) if size is None else (int(rng.integers(side - size + 1)) for side in (height, width))
        rows, columns = slice(top, top + (size or height)), slice(left, left + (size or width))

        def crop(path: Path) -> np.ndarray:
            return np.ascontiguousarray(self._pixels[path][rows, columns][:, :: -1 if flip else 1])

        lq = crop(line.lq)
        digest = hashlib.sha256(lq.tobytes()).hexdigest()[:12]
        images = zip(line.images, line.scores, strict=True) if recorded else ()
        return Task(
            id=f"preferences/{line.name}@{lq.shape[1]}x{lq.shape[0]}+{left}+{top}{'f' if flip else ''}#{digest}.{where}",
            lq=from_uint8_hwc(lq),
            types=tuple(self.config.type.split("|")) if self.config.type else (),
            gt=None if line.gt is None else from_uint8_hwc(crop(line.gt)),
            record={"x_px": float(left), "y_px": float(top), "flip": float(flip)},
            recorded=tuple(Recorded(from_uint8_hwc(crop(path)), score) for path, score in images),
        )


def _read(manifest: Path) -> list[Line]:
    if not manifest.is_file():
        raise ValueError(f"env.manifest: there is no file {manifest}")
    lines = []
    for number, text in enumerate(manifest.read_text().splitlines(), 1):
        if text.strip():
            lines.append(_line(text, manifest.parent, f"{manifest}:{number}"))
    if not lines:
        raise ValueError(f"{manifest} has no line")
    return lines


def _line(text: str, folder: Path, where: str) -> Line:
    try:
        row = json.loads(text)
        lq, (images, scores) = str(row["lq"]), _restorations(row)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{where}: {error!r}; a line has "lq" and either "chosen" and "rejected" or "restorations": [{{"image", "score"}}, ...]'
        ) from error
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"{where}: scores {list(scores)} must be finite: leave out what could not be judged")
    if len(scores) < 2 or len(set(scores)) == 1:
        raise ValueError(
            f"{where}: {len(scores)} restoration(s) with scores {list(scores)} prefer nothing: remove the line"
        )
    if "chosen" in row and scores[0] <= scores[1]:
        raise ValueError(
            f'{where}: "r_w" {scores[0]} must be above "r_l" {scores[1]}: are chosen and rejected swapped?'
        )
    gt = row.get("gt")
    return Line(lq, folder / lq, tuple(folder / name for name in images), scores, None if gt is None else folder / gt)


def _restorations(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(file names, scores)."""
    if "chosen" in row:
        names = (str(row["chosen"]), str(row["rejected"]))
        return names, (float(row.get("r_w", 1.0)), float(row.get("r_l", 0.0)))
    items: Sequence[Mapping[str, Any]] = row["restorations"]
    return tuple(str(item["image"]) for item in items), tuple(float(item["score"]) for item in items)


def _check_files(line: Line, size: int | None) -> None:
    sizes = {path: checked_size(path) for path in line.files}
    for path, found in sizes.items():
        if found != sizes[line.lq]:
            raise ValueError(
                f"{path} is {found[1]}x{found[0]} and {line.lq} is {sizes[line.lq][1]}x{sizes[line.lq][0]}: restorations and "
                "reference must have the size of the LQ"
            )
    if size is not None and min(sizes[line.lq]) < size:
        raise ValueError(f"{line.lq} is smaller than the crop env.size={size}: lower it, or remove the line")
