"""Folders of LQ and GT files whose layout is found by itself.

Known: sibling folders by name at any depth (GGT-100K by category, FoundIR, SeeSR, DreamClear: `envs.pairing`),
`test_LR` beside `test_HR` (StableSR's RealSR crops), files of one folder told apart by `_LR4` and `_HR` (RealSR v3), and
LQ files alone. Types and split come from folder names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from envs.images import image_files
from envs.pairing import GT_NAMES, LQ_NAMES, FolderPair, normalised, search_folder_pairs, stems
from envs.sources.rows import BadRow, Row, inside, split_of_folders, types_of_folders

MIN_SHARED = 0.5  # of the names, for two folders to be a pair; the others are listed as bad rows
_SPLIT_WORDS = re.compile(r"^(train|test|val)|(train|test|val)$")
_LOW, _HIGH = re.compile(r"_lr[2348]?$", re.IGNORECASE), re.compile(r"_hr$", re.IGNORECASE)


def read_folder(root: Path) -> Iterator[Row | BadRow]:
    """Rows of a folder. ValueError if nothing is found, or if a choice is the user's to make (both are printed)."""
    for found in (_by_split_name(root), _by_suffix(root)):
        if found:
            yield from found
            return
    names = {normalised(path.name) for path in _folders(root)}
    if not names & GT_NAMES:
        yield from _alone(root)
        return
    real = os.path.realpath(root)
    pairs, misses = search_folder_pairs(root, MIN_SHARED)
    if not pairs:
        seen = "; ".join(misses) or "no sibling folders with such names were found"
        raise ValueError(f"no LQ/GT folder pair below {root} ({seen}): write a manifest (docs/data.md)")
    yield from (BadRow(str(root), "-", miss) for miss in misses)
    for folders in pairs:
        above = folders.lq.parent.relative_to(root).as_posix()
        yield from _paired(root, real, folders, "" if above == "." else f"{above}/")


def _folders(root: Path) -> list[Path]:
    return [
        Path(parent) / name
        for parent, names, _ in os.walk(root)
        for name in names
        if not name.startswith(".") and "/." not in parent
    ]


def _by_split_name(root: Path) -> list[Row | BadRow]:
    """`test_LR` and `test_HR`: a role with the split before or after it."""
    roles: dict[str, dict[str, Path]] = {}
    for path in sorted(item for item in root.iterdir() if item.is_dir()):
        name = normalised(path.name)
        word = _SPLIT_WORDS.search(name)
        bare = _SPLIT_WORDS.sub("", name)
        role = "lq" if bare in LQ_NAMES else "gt" if bare in GT_NAMES else ""
        if word and role:
            roles.setdefault(word[0], {})[role] = path
    real = os.path.realpath(root)
    return [
        row
        for split, both in sorted(roles.items())
        if len(both) == 2
        for row in _paired(
            root, real, FolderPair(both["lq"], both["gt"], stems(both["lq"]), stems(both["gt"])), f"{split}/"
        )
    ]


def _by_suffix(root: Path) -> list[Row | BadRow]:
    """Files of one folder: `0001_LR4.png` and `0001_HR.png`. Only if every image has such a suffix."""
    files = image_files(root)
    low = {path: _LOW.sub("", str(path.with_suffix(""))) for path in files if _LOW.search(path.stem)}
    high = {_HIGH.sub("", str(path.with_suffix(""))): path for path in files if _HIGH.search(path.stem)}
    if (
        not low
        or not high
        or len(low) + len(high) < len(files)
        or {p.parent for p in low}.isdisjoint(p.parent for p in high.values())
    ):
        return []
    real = os.path.realpath(root)
    rows: list[Row | BadRow] = []
    for path, key in low.items():
        name = Path(key).relative_to(root).as_posix()
        gt = high.pop(key, None)
        if gt is None:
            rows.append(BadRow(str(root), name, f"{path.name} has no _HR partner"))
        else:
            rows.append(_row(root, real, name, path, gt))
    return rows + [BadRow(str(root), str(gt.name), "has no _LR partner") for gt in high.values()]


def _alone(root: Path) -> Iterator[Row | BadRow]:
    files = stems(root)
    if not files:
        raise ValueError(f"{root} holds no images, manifest, tar or Parquet file: correct the path")
    real = os.path.realpath(root)
    for name, path in files.items():
        yield _row(root, real, name, path, None)


def _paired(root: Path, real: str, folders: FolderPair, prefix: str) -> Iterator[Row | BadRow]:
    gt_files = dict(folders.gt_files)
    for name, path in folders.lq_files.items():
        gt = gt_files.pop(name, None)
        if gt is None:
            yield BadRow(str(folders.lq), prefix + name, f"no file of this name in {folders.gt}")
        else:
            yield _row(root, real, prefix + name, path, gt)
    for name in gt_files:
        yield BadRow(str(folders.gt), prefix + name, f"no file of this name in {folders.lq}")


def _row(root: Path, real: str, name: str, lq: Path, gt: Path | None) -> Row | BadRow:
    try:
        return Row(
            name,
            _locator(root, real, lq),
            _locator(root, real, gt) if gt is not None else "",
            types_of_folders(name),
            split=split_of_folders(name),
        )
    except ValueError as error:
        return BadRow(str(root), name, str(error))


def _locator(root: Path, real: str, path: Path) -> str:
    """Relative to the root. Only a link needs to be followed: `os.walk` does not leave the root by itself."""
    relative = str(path)[len(str(root).rstrip(os.sep)) + 1 :]
    return inside(real, relative) if path.is_symlink() or not relative.isprintable() else relative
