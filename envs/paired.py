"""Env `paired`: your own photos, as folders of LQ and GT files, or of LQ files alone.

Give `lq_dir` (and `gt_dir`), or a `root` in which the folders are recognised by their names (`envs.pairing`); category
folders such as `haze/` name the degradation type, folders such as `test/` the split. Otherwise the split is by the hash
of the file name. Refused: unmatched files, sizes that differ, photos smaller than the crop, lists that are shifted
against each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.degradations.jpeg import from_uint8_hwc
from envs.images import DecodedCache, checked_size, file_digest, load_rgb
from envs.inspection import MIN_CORRELATION, correlation_of
from envs.names import HELD_OUT_NAMES, TYPE_NAMES
from envs.pairing import Pair, find_folder_pairs, normalised, pair_files
from envs.rng import generator_for
from envs.splits import is_held_out
from envs.types import Task

HELD_OUT_SEED = 20_251  # fixed: runs of different seeds are evaluated on the same tasks
TRAIN_CANDIDATES, HELD_OUT_CANDIDATES = 2, 6
CHECKED_PAIRS = 1000  # sizes are compared at the start for at most so many pairs, later when a pair is drawn
CORRELATED_PAIRS = 8


@dataclass(frozen=True)
class PairedConfig:
    """Either `root`, or `lq_dir` with or without `gt_dir`."""

    root: str | None = None  # searched for folders named e.g. LQ and GT
    lq_dir: str | None = None
    gt_dir: str | None = None  # null with lq_dir: no references
    size: int | None = 128  # side of the crops, px; null: whole photos (then they must all have one size to be batched)
    type: str = ""  # degradation types of all photos, e.g. "haze" or "blur|noise"; "" takes them from folder names
    held_out_fraction: float = 0.1  # chosen by file name, where no folder is called test or val
    flip: bool = True  # mirror training crops half of the time
    cache_mb: int = 2048  # of decoded photos kept in memory
    seed: int = 0  # of the training draws; held-out tasks do not depend on it


class PairedEnv:
    """Crops of paired photos at the same place. ValueError, naming folder or file, for what cannot work."""

    name = "paired"

    def __init__(self, config: PairedConfig) -> None:
        if (config.root is None) == (config.lq_dir is None):
            given = "both" if config.root else "neither"
            raise ValueError(f"env paired needs env.root or env.lq_dir (with env.gt_dir), and has {given}")
        if config.root is not None and config.gt_dir is not None:
            raise ValueError("env.gt_dir goes with env.lq_dir, not with env.root")
        if not 0.0 <= config.held_out_fraction <= 1.0:
            raise ValueError(f"env.held_out_fraction must be in [0, 1], got {config.held_out_fraction}")
        self.config = config
        pairs = _pairs(config)
        self.has_gt = pairs[0].gt is not None
        for pair in _spread(pairs, CHECKED_PAIRS):
            _check_sizes(pair, config.size)
        if self.has_gt:
            _check_correlation(_spread(pairs, CORRELATED_PAIRS))
        self.train_pairs, self.held_out_pairs = split_pairs(pairs, config.held_out_fraction)
        self._pixels = DecodedCache(config.cache_mb * 2**20)

    def draw(self, step: int, n: int) -> list[Task]:
        """Training tasks at positions 0..n-1 of this step, a pure function of (config.seed, step, position)."""
        tasks = []
        for position in range(n):
            rng = generator_for(self.config.seed, step, position)
            pair = self.train_pairs[int(rng.integers(len(self.train_pairs)))]
            flip = bool(self.config.flip and rng.random() < 0.5)
            tasks.append(self._task(pair, rng, TRAIN_CANDIDATES, flip, f"{step}.{position}"))
        return tasks

    def held_out(self, n: int) -> list[Task]:
        """Task i shows pair i modulo the number of held-out pairs, unflipped, at a place with detail."""
        pairs = self.held_out_pairs
        return [
            self._task(pairs[i % len(pairs)], generator_for(HELD_OUT_SEED, i), HELD_OUT_CANDIDATES, False, f"h{i}")
            for i in range(n)
        ]

    def fingerprint(self) -> str:
        """Over the config, all names, and the contents (length, first 64 KiB) of up to 1000 pairs spread over the
        data.
        """
        config = self.config
        digest = hashlib.sha256(f"paired {config.size} {config.type} {config.flip} {config.seed}".encode())
        for side in (self.train_pairs, self.held_out_pairs):
            digest.update("\0".join(["", *(pair.name for pair in side)]).encode())
            for pair in _spread(side, CHECKED_PAIRS):
                digest.update(file_digest(pair.lq) + (file_digest(pair.gt) if pair.gt else b""))
        return digest.hexdigest()

    def _task(self, pair: Pair, rng: np.random.Generator, candidates: int, flip: bool, where: str) -> Task:
        """`where` keeps two draws of the same pixels apart in the id (whole photos are drawn again and again)."""
        lq = self._pixels[pair.lq]
        gt = self._pixels[pair.gt] if pair.gt is not None else None
        if gt is not None and gt.shape != lq.shape:
            raise ValueError(_sizes_differ(pair, lq.shape[:2], gt.shape[:2]))
        y, x, height, width = self._place(pair, lq if gt is None else gt, rng, candidates)
        views = [
            np.ascontiguousarray(view[y : y + height, x : x + width][:, :: -1 if flip else 1])
            for view in (lq, gt)
            if view is not None
        ]
        digest = hashlib.sha256(b"".join(view.tobytes() for view in views)).hexdigest()[:12]
        return Task(
            id=f"paired/{pair.name}@{width}x{height}+{x}+{y}{'f' if flip else ''}#{digest}.{where}",
            lq=from_uint8_hwc(views[0]),
            types=tuple(self.config.type.split("|")) if self.config.type else types_of(pair.name),
            gt=from_uint8_hwc(views[1]) if gt is not None else None,
            record={"x_px": float(x), "y_px": float(y), "flip": float(flip)},
        )

    def _place(
        self, pair: Pair, pixels: np.ndarray, rng: np.random.Generator, candidates: int
    ) -> tuple[int, int, int, int]:
        """(y, x, height, width) of the crop with the largest variance among `candidates` random ones."""
        height, width = pixels.shape[:2]
        size = self.config.size
        if size is None:
            return 0, 0, height, width
        if min(height, width) < size:
            raise ValueError(_too_small(pair, (height, width), size))
        spots = [(int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))) for _ in range(candidates)]
        y, x = max(spots, key=lambda spot: float(pixels[spot[0] : spot[0] + size, spot[1] : spot[1] + size].std()))
        return y, x, size, size


def types_of(name: str) -> tuple[str, ...]:
    """The type that the first telling folder in a pair's name stands for; () if none does."""
    for part in name.split("/")[:-1]:
        if normalised(part) in TYPE_NAMES:
            return (TYPE_NAMES[normalised(part)],)
    return ()


def split_pairs(pairs: Sequence[Pair], held_out_fraction: float) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(train, held_out): by folders called test or val if there are any, else by the hash of the file name.

    Only the last part of the name is hashed, so that one scene in several category folders stays on one side.
    """
    by_folder = [bool(HELD_OUT_NAMES & {normalised(part) for part in pair.name.split("/")[:-1]}) for pair in pairs]
    if any(by_folder) and not all(by_folder):
        aside = by_folder
    else:
        aside = [is_held_out(pair.name.rsplit("/", 1)[-1], held_out_fraction) for pair in pairs]
    train = tuple(pair for pair, out in zip(pairs, aside, strict=True) if not out)
    held_out = tuple(pair for pair, out in zip(pairs, aside, strict=True) if out)
    if not train or not held_out:
        side, remedy = ("training", "lower") if not train else ("held-out", "raise")
        raise ValueError(
            f"no {side} pair among {len(pairs)} at env.held_out_fraction={held_out_fraction}: {remedy} it, or add pairs"
        )
    return train, held_out


def _pairs(config: PairedConfig) -> list[Pair]:
    if config.lq_dir is not None:
        return pair_files(Path(config.lq_dir), Path(config.gt_dir) if config.gt_dir is not None else None)
    assert config.root is not None
    root = Path(config.root)
    found = []
    for folders in find_folder_pairs(root):
        above = folders.lq.parent.relative_to(root).as_posix()
        found += pair_files(folders.lq, folders.gt, "" if above == "." else f"{above}/")
    names = [pair.name for pair in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})[:5]
        raise ValueError(f"two pairs below {root} share a name, e.g. {twice}: set env.lq_dir and env.gt_dir")
    return found


def _spread(pairs: Sequence[Pair], n: int) -> list[Pair]:
    """At most n of them, evenly spread."""
    return [pairs[i * len(pairs) // n] for i in range(n)] if len(pairs) > n else list(pairs)


def _check_sizes(pair: Pair, size: int | None) -> None:
    lq_size = checked_size(pair.lq)
    if pair.gt is not None and (gt_size := checked_size(pair.gt)) != lq_size:
        raise ValueError(_sizes_differ(pair, lq_size, gt_size))
    if size is not None and min(lq_size) < size:
        raise ValueError(_too_small(pair, lq_size, size))


def _sizes_differ(pair: Pair, lq_size: tuple[int, ...], gt_size: tuple[int, ...]) -> str:
    return (
        f"{pair.lq} is {lq_size[1]}x{lq_size[0]} and {pair.gt} is {gt_size[1]}x{gt_size[0]}: LQ and GT must have the "
        "same size. Resize the smaller one beforehand (bicubic), or remove the pair"
    )


def _too_small(pair: Pair, lq_size: tuple[int, ...], size: int) -> str:
    return (
        f"{pair.lq} is {lq_size[1]}x{lq_size[0]}, smaller than the crop env.size={size}: "
        f"choose env.size <= {min(lq_size)}, or remove the photo"
    )


def _check_correlation(pairs: Sequence[Pair]) -> None:
    """Refuse when most of these pairs show different things, as when one list is shifted by a file."""
    values = [_correlation(pair) for pair in pairs]
    low = [pair for pair, value in zip(pairs, values, strict=True) if value < MIN_CORRELATION]
    if 2 * len(low) > len(pairs):
        raise ValueError(
            f"LQ and GT show different things in {len(low)} of {len(pairs)} pairs looked at (luminance correlation "
            f"below {MIN_CORRELATION}), e.g. {low[0].lq} and {low[0].gt}: is one list shifted or in another order?"
        )


def _correlation(pair: Pair) -> float:
    """Pearson correlation of the luminance of both views at 32 px; 1 where one of them is flat (nothing to compare)."""
    assert pair.gt is not None
    return correlation_of(*(load_rgb(path, long_edge_px=256) for path in (pair.lq, pair.gt)))
