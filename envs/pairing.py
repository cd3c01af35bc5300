"""Finding LQ/GT folders under a root and pairing their files, refusing whatever is ambiguous.

A folder's role is known by its name (LQ_NAMES, GT_NAMES; compared in lower case, letters and digits only). Files are
paired by relative path without extension and without one recognised suffix a side (`_lq`, `_gt`, `_hr`, `x4`, `_LR4`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from envs.images import image_files

# fmt: off
LQ_NAMES = frozenset({
    "blur", "degradation", "degraded", "hazy", "input", "low", "lowquality", "lowres", "lq", "lr", "noisy", "rainy",
    "snow", "source", "src", "srbicubic",
})
GT_NAMES = frozenset({
    "clean", "ggt", "groundtruth", "gt", "high", "highquality", "hq", "hr", "label", "ref", "reference", "sharp",
    "target",
})
# fmt: on

MIN_SHARED = 0.99  # of the file names, for two folders found by name to be a pair
MAX_UNMATCHED = 0.001  # of the files, in folders that are a pair
_SUFFIX = re.compile(r"(_lq|_gt|_hq|_hr|_lr[2348]?|x[2348])$", re.IGNORECASE)
_LISTED = 10


@dataclass(frozen=True)
class Pair:
    """Two views of one photo on disk."""

    name: str  # relative path without extension, unique
    lq: Path
    gt: Path | None


@dataclass(frozen=True)
class FolderPair:
    lq: Path
    gt: Path
    lq_files: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)  # as `stems` gives them
    gt_files: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)


def normalised(name: str) -> str:
    """Lower case, letters and digits only: "Low-Quality" -> "lowquality"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_folder_pairs(root: Path) -> list[FolderPair]:
    """All LQ/GT folder pairs below `root`, e.g. one a category; ValueError if there is none, or a choice to make."""
    if not root.is_dir():
        raise ValueError(f"env.root {root} is not a folder: correct the path")
    pairs, misses = search_folder_pairs(root, MIN_SHARED)
    if not pairs:
        seen = "; ".join(misses) or "no sibling folders with such names were found"
        raise ValueError(
            f"no LQ/GT folder pair below {root} ({seen}). Set env.lq_dir and env.gt_dir, or name two sibling folders "
            "e.g. 'LQ' and 'GT' with the same file names inside"
        )
    return pairs


def search_folder_pairs(root: Path, min_shared: float) -> tuple[list[FolderPair], list[str]]:
    """(pairs, what was named as a pair but shares fewer names than `min_shared` of them)."""
    pairs: list[FolderPair] = []
    misses: list[str] = []
    _search(root, pairs, misses, 0, min_shared)
    return pairs, misses


def _search(folder: Path, pairs: list[FolderPair], misses: list[str], depth: int, min_shared: float) -> None:
    children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    lq_dirs = [path for path in children if normalised(path.name) in LQ_NAMES]
    gt_dirs = [path for path in children if normalised(path.name) in GT_NAMES]
    used: set[Path] = set()
    found = []
    for lq_dir, gt_dir in product(lq_dirs, gt_dirs):
        lq_names, gt_names = stems(lq_dir), stems(gt_dir)
        shared, most = len(lq_names.keys() & gt_names.keys()), max(len(lq_names), len(gt_names))
        if most and shared >= min_shared * most:
            found.append(FolderPair(lq_dir, gt_dir, lq_names, gt_names))
        elif most:
            odd = sorted(lq_names.keys() ^ gt_names.keys())
            misses.append(f"{lq_dir} and {gt_dir} share {shared} of {most} names, not {_listed(odd)}")
    if len(found) > 1:
        choices = "\n".join(f"  env.lq_dir={pair.lq} env.gt_dir={pair.gt}" for pair in found)
        raise ValueError(f"{len(found)} pairings are possible in {folder}; choose one:\n{choices}")
    for pair in found:
        pairs.append(pair)
        used |= {pair.lq, pair.gt}
    if depth < 6:
        for child in children:
            if child not in used:
                _search(child, pairs, misses, depth + 1, min_shared)


def stems(folder: Path) -> dict[str, Path]:
    """Pairing key -> file, for all images below `folder`; ValueError if two files have the same key."""
    found: dict[str, Path] = {}
    start = len(folder.parts)
    for path in image_files(folder):
        key = _SUFFIX.sub("", "/".join((*path.parts[start:-1], path.stem)))
        if key in found:
            raise ValueError(f"{found[key]} and {path} have the same name for pairing ({key!r}): rename or remove one")
        found[key] = path
    return found


def pair_files(lq_dir: Path, gt_dir: Path | None, prefix: str = "") -> list[Pair]:
    """Pairs sorted by name, names prefixed; without `gt_dir` the pairs have no gt. ValueError for empty or unmatched
    folders.
    """
    for role, folder in (("lq_dir", lq_dir), ("gt_dir", gt_dir)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"env.{role} {folder} is not a folder: correct the path")
    lq_files = stems(lq_dir)
    if not lq_files:
        raise ValueError(f"env.lq_dir {lq_dir} holds no images: expected .jpg, .png, .webp, .tif or .bmp files")
    if gt_dir is None:
        return [Pair(prefix + key, path, None) for key, path in lq_files.items()]
    gt_files = stems(gt_dir)
    lonely_lq, lonely_gt = sorted(lq_files.keys() - gt_files.keys()), sorted(gt_files.keys() - lq_files.keys())
    unmatched, most = len(lonely_lq) + len(lonely_gt), max(len(lq_files), len(gt_files))
    if unmatched > MAX_UNMATCHED * most:
        raise ValueError(
            f"{unmatched} files have no partner ({len(lq_files)} in {lq_dir}, {len(gt_files)} in {gt_dir}). "
            f"Only LQ: {_listed(lonely_lq)}. Only GT: {_listed(lonely_gt)}. "
            "Files are paired by relative path without extension"
        )
    return [Pair(prefix + key, path, gt_files[key]) for key, path in lq_files.items() if key in gt_files]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "none") + more
