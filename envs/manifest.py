"""Env `manifest`: pairs from a manifest, tar shards, Parquet, a Hugging Face folder, or folders whose layout is found.

Made for large data (GGT-100K has 103,707 pairs): the source is indexed once (`envs.index`), images are decoded when they
are drawn, and ahead of that in threads. The same images in another container give the same ids and the same bytes.
An image that cannot be used is quarantined: listed with its reason and replaced by another draw.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from envs.ahead import Ahead
from envs.balance import Classes, Draws, Epochs
from envs.degradations.jpeg import from_uint8_hwc
from envs.images import decode_rgb
from envs.index import Index, cache_folder, open_index
from envs.inspection import problem_of
from envs.rng import generator_for
from envs.sources.blobs import differs, shown
from envs.sources.rows import Row, primary_type
from envs.splits import is_held_out
from envs.types import Task

HELD_OUT_SEED = 20_251  # fixed: runs of different seeds are evaluated on the same tasks
TRAIN_CANDIDATES, HELD_OUT_CANDIDATES = 2, 6
CHECKED_PAIRS = 64  # are decoded and compared at the start, spread over the data
MAX_BAD = 0.01  # of the rows
ATTEMPTS = 16  # rows tried for one place
FINGERPRINT_ROWS = 256

log = logging.getLogger(__name__)


class QuarantineError(RuntimeError):
    """Too many images cannot be used; the message names the last one and the list."""


@dataclass(frozen=True)
class ManifestConfig:
    """`source` is a file or folder that `envs.index` knows."""

    source: str
    root: str | None = None  # paths of a manifest are relative to it; null: the manifest's folder
    size: int | None = 128  # side of the crops, px; null: whole photos (then they must all have one size to be batched)
    balance: dict[str, float] = field(default_factory=dict)  # type -> weight; {}: every row is equally likely
    types: tuple[str, ...] = ()  # only rows of these (primary) types; (): all
    held_out_fraction: float = 0.02  # chosen by the group's name, where no row has a split
    held_out_split: str = "test"  # test | val: which of them `held_out` shows if both are there
    per_step: int = 0  # tasks of a step: rows are then visited in epochs; 0: independent draws
    flip: bool = True  # mirror training crops half of the time
    ahead: int = 2  # threads that decode the next step; 0: none
    cache_mb: int = 1024  # of decoded photos kept in memory
    cache: str | None = None  # folder of the index and of quarantine.jsonl; null: $XDG_CACHE_HOME/rlrestore
    verify: bool = (
        False  # compare each file with the sha256 of its row, where it has one: notices files that were replaced
    )
    max_quarantined: int = 100  # more unusable images than this end the run
    seed: int = 0  # of the training draws; held-out tasks do not depend on it


Views = tuple[np.ndarray, np.ndarray | None]  # LQ and GT as [H, W, 3] uint8; their sizes may differ by an integer ratio


class ManifestEnv:
    """Crops of indexed pairs at the same place. ValueError, naming row or file, for what cannot work."""

    name = "manifest"

    def __init__(self, config: ManifestConfig) -> None:
        if not 0.0 <= config.held_out_fraction < 1.0:
            raise ValueError(f"env.held_out_fraction must be in [0, 1), got {config.held_out_fraction}")
        self.config = config
        folder = Path(config.cache) if config.cache else cache_folder()
        self.index = open_index(config.source, config.root, folder)
        self.quarantine_file = folder / "quarantine.jsonl"
        self.quarantined: dict[int, str] = {}  # row number -> reason
        _refuse_bad(self.index, config.source)
        labels = [primary_type(types) for types in self.index.column("types")]
        train, self.held_out_rows = _split(self.index, labels, config)
        self.has_gt = bool(self.index[train[0]].gt)
        classes = Classes(labels, train, config.balance)
        self.order = Epochs(classes, config.seed, config.per_step) if config.per_step else Draws(classes, config.seed)
        self._held_out = Draws(Classes([""] * len(self.index), self.held_out_rows, {}), HELD_OUT_SEED)
        self._views: Ahead[Views] = Ahead(self._load, _bytes_of, config.cache_mb * 2**20, config.ahead)
        self._last_step: int | None = None
        self._refuse_strange(train)

    def draw(self, step: int, n: int) -> list[Task]:
        """Training tasks at positions 0..n-1 of this step, a pure function of (config.seed, step, position)."""
        tasks = [self._drawn(step, position) for position in range(n)]
        stride = step - self._last_step if self._last_step is not None else 0
        if stride > 0:  # the caller walks on: what it will ask for next is known
            self._views.hint(self.order.row(step + stride, position) for position in range(n))
        self._last_step = step
        return tasks

    def held_out(self, n: int) -> list[Task]:
        """Task i shows held-out row i modulo their number (types take turns), unflipped, at a place with detail."""
        tasks = []
        for i in range(n):
            rows = [self.held_out_rows[i % len(self.held_out_rows)]]
            rows += [self._held_out.row(i, 0, attempt) for attempt in range(1, ATTEMPTS)]
            row, views = self._first_usable(rows)
            tasks.append(self._task(row, views, generator_for(HELD_OUT_SEED, i), HELD_OUT_CANDIDATES, False, f"h{i}"))
        return tasks

    def fingerprint(self) -> str:
        """Over the config, all rows, and the images' bytes of up to 256 rows spread over the data."""
        config = {key: value for key, value in vars(self.config).items() if key not in ("ahead", "cache_mb", "cache")}
        digest = hashlib.sha256(f"manifest {sorted(config.items())!r} {self.index.digest()}".encode())
        for number in _spread(len(self.index), FINGERPRINT_ROWS):
            row = self.index[number]
            for locator in filter(None, (row.lq, row.gt)):
                digest.update(hashlib.sha256(self.index.blobs.read(locator)).digest())
        return digest.hexdigest()

    # -- one task --------------------------------------------------------------------------------------------------

    def _drawn(self, step: int, position: int) -> Task:
        row, views = self._first_usable(self.order.row(step, position, attempt) for attempt in range(ATTEMPTS))
        rng = generator_for(self.config.seed, step, position)
        flip = bool(self.config.flip and rng.random() < 0.5)
        return self._task(row, views, rng, TRAIN_CANDIDATES, flip, f"{step}.{position}")

    def _first_usable(self, numbers: Iterable[int]) -> tuple[Row, Views]:
        """The first row whose images can be used, in an order that depends on the place alone."""
        number = -1
        for number in numbers:
            try:
                return self.index[number], self._views.get(number)
            except ValueError as error:
                self._quarantine(number, str(error))
        raise QuarantineError(
            f"{ATTEMPTS} rows in a row cannot be used, the last: {self.quarantined[number]}; all of them are listed in "
            f"{self.quarantine_file}: run `rlrestore data check {self.config.source}`"
        )

    def _load(self, number: int) -> Views:
        row = self.index[number]
        lq = decode_rgb(self._read(row.lq, row.sha256_lq), shown(row.lq))
        gt = decode_rgb(self._read(row.gt, row.sha256_gt), shown(row.gt)) if row.gt else None
        if gt is not None and gt.shape != lq.shape and _ratio(lq, gt) is None:
            raise ValueError(
                f"{shown(row.lq)} is {lq.shape[1]}x{lq.shape[0]} and {shown(row.gt)} is {gt.shape[1]}x{gt.shape[0]}: LQ "
                "and GT must have one size, or an integer ratio"
            )
        if self.config.size is not None and min((lq if gt is None else gt).shape[:2]) < self.config.size:
            wide = "x".join(map(str, (lq if gt is None else gt).shape[1::-1]))
            raise ValueError(f"{shown(row.lq)} ({wide}) is smaller than the crop env.size={self.config.size}")
        return lq, gt

    def _read(self, locator: str, sha256: str) -> bytes:
        data = self.index.blobs.read(locator)
        if self.config.verify and differs(data, sha256):
            raise ValueError(f"{shown(locator)} is not the file of its row (another sha256): restore it")
        return data

    def _task(self, row: Row, views: Views, rng: np.random.Generator, candidates: int, flip: bool, where: str) -> Task:
        """`where` keeps two draws of the same pixels apart in the id."""
        lq, gt = views
        scale = 1 if gt is None or gt.shape == lq.shape else _ratio(lq, gt)
        assert scale is not None
        y, x, height, width = _place(lq if gt is None else gt, self.config.size, scale, rng, candidates)
        low = lq[y // scale : -(-(y + height) // scale), x // scale : -(-(x + width) // scale)]
        if scale > 1:  # the restoration layout: LQ at the size of the result
            enlarged = Image.fromarray(low).resize(
                (low.shape[1] * scale, low.shape[0] * scale), Image.Resampling.BICUBIC
            )
            low = np.asarray(enlarged)[:height, :width]
        crops = [low, gt[y : y + height, x : x + width]] if gt is not None else [low]
        crops = [np.ascontiguousarray(crop[:, :: -1 if flip else 1]) for crop in crops]
        digest = hashlib.sha256(b"".join(crop.tobytes() for crop in crops)).hexdigest()[:12]
        return Task(
            id=f"manifest/{row.id}@{width}x{height}+{x}+{y}{'f' if flip else ''}#{digest}.{where}",
            lq=from_uint8_hwc(crops[0]),
            types=tuple(row.types.split("|")),
            prompt=row.prompt,
            gt=from_uint8_hwc(crops[1]) if gt is not None else None,
            record={"x_px": float(x), "y_px": float(y), "flip": float(flip), "scale": float(scale)},
        )

    # -- what cannot be used ---------------------------------------------------------------------------------------

    def _quarantine(self, number: int, reason: str) -> None:
        """List it (once) and go on. QuarantineError when there are too many."""
        if number in self.quarantined:
            return
        self.quarantined[number] = reason
        entry = {"source": str(self.config.source), "id": self.index[number].id, "reason": reason}
        log.warning("row %s is left out: %s", entry["id"], reason)
        try:
            self.quarantine_file.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self.quarantine_file, error.strerror)
        if len(self.quarantined) > self.config.max_quarantined:
            raise QuarantineError(
                f"more than env.max_quarantined={self.config.max_quarantined} images of {self.config.source} cannot be "
                f"used, the last: {reason}; all are listed in {self.quarantine_file}: run `rlrestore data check`"
            )

    def _refuse_strange(self, train: list[int]) -> None:
        """ValueError if most of a few pairs show different things, or cannot be read at all."""
        checked = [train[i] for i in _spread(len(train), CHECKED_PAIRS)]
        found = {}
        for number in checked:
            row = self.index[number]
            if row.gt and (reason := problem_of(self.index.blobs, row)):
                found[row.id] = reason
        if 2 * len(found) > len(checked):
            name, reason = next(iter(found.items()))
            raise ValueError(
                f"{len(found)} of {len(checked)} pairs looked at in {self.config.source} cannot be used, e.g. {name}: "
                f"{reason}; run `rlrestore data check {self.config.source}`"
            )


def _refuse_bad(index: Index, source: str) -> None:
    total = len(index) + index.bad_count
    if index.bad_count > MAX_BAD * total:
        few = "; ".join(map(str, index.bad[:3]))
        raise ValueError(
            f"{index.bad_count} of {total} rows of {source} cannot be used (the limit is {MAX_BAD:.0%}): {few}. "
            f"`rlrestore data check {source}` lists them and writes a clean manifest"
        )


def _split(index: Index, labels: list[str], config: ManifestConfig) -> tuple[list[int], list[int]]:
    """(train, held out): by the rows' split if any row has one, else by the hash of the group's name.

    Groups are hashed by the last part of the id where none is given, so that one scene in several category folders
    stays on one side. Held-out rows take turns by type.
    """
    splits, ids, groups = (index.column(name) for name in ("split", "id", "group"))
    wanted = [n for n, label in enumerate(labels) if not config.types or label in config.types]
    if not wanted:
        raise ValueError(f"env.types={list(config.types)} matches no row: the types are {sorted(set(labels))}")
    if {"test", "val"} & set(splits):
        kept = config.held_out_split if config.held_out_split in splits else "val" if "val" in splits else "test"
        train = [n for n in wanted if splits[n] in ("", "train")]
        held_out = [n for n in wanted if splits[n] == kept]
    else:
        aside = {n for n in wanted if is_held_out(groups[n] or ids[n].rsplit("/", 1)[-1], config.held_out_fraction)}
        train, held_out = [n for n in wanted if n not in aside], sorted(aside)
    if not train or not held_out:
        side, remedy = ("training", "lower") if not train else ("held-out", "raise")
        raise ValueError(
            f"no {side} row among {len(wanted)} of {config.source} at env.held_out_fraction={config.held_out_fraction}: "
            f"{remedy} it, or give rows a split"
        )
    turns: dict[str, int] = {}
    keyed = []
    for number in held_out:
        turns[labels[number]] = turns.get(labels[number], 0) + 1
        keyed.append((turns[labels[number]], labels[number], number))
    return train, [number for *_, number in sorted(keyed)]


def _place(
    pixels: np.ndarray, size: int | None, scale: int, rng: np.random.Generator, candidates: int
) -> tuple[int, int, int, int]:
    """(y, x, height, width) of the crop with the largest variance among `candidates`, on the grid of the LQ's pixels."""
    height, width = pixels.shape[:2]
    if size is None:
        return 0, 0, height, width
    spots = [
        tuple(int(rng.integers((side - size) // scale + 1)) * scale for side in (height, width))
        for _ in range(candidates)
    ]
    y, x = max(spots, key=lambda spot: float(pixels[spot[0] : spot[0] + size, spot[1] : spot[1] + size].std()))
    return y, x, size, size


def _ratio(lq: np.ndarray, gt: np.ndarray) -> int | None:
    """By how much GT is larger than LQ, if that is one whole number."""
    scale = gt.shape[0] // lq.shape[0]
    return scale if scale >= 1 and gt.shape[:2] == (lq.shape[0] * scale, lq.shape[1] * scale) else None


def _bytes_of(views: Views) -> int:
    return views[0].nbytes + (views[1].nbytes if views[1] is not None else 0)


def _spread(total: int, n: int) -> list[int]:
    """At most n numbers below total, evenly spread."""
    return [i * total // n for i in range(n)] if total > n else list(range(total))
