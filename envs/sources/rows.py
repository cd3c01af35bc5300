"""One row of an index, and what a source may say in it.

A row names its images by locators: plain strings, so that an index of 100,000 rows is a table and not 100,000 objects.
    "haze/LQ/0001.png"            a file, relative to the root of the source
    "shard-0.tar\\t512+3402"       `length` bytes from `offset` of a file (a member of an uncompressed tar)
    "part-0.parquet\\t17:lq"       a cell of a Parquet file (row, column)
    "train\\t17:lq"                a cell of a Hugging Face dataset on disk; the file is its folder
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from envs.names import HELD_OUT_NAMES, TYPE_ALIASES
from envs.pairing import normalised

# Which type stands for a row that has several, in sampling and in tables (HarnessIR's order, then ours).
PRIMARY_ORDER = ("haze", "rain", "snow", "lowlight", "mix", "oldphoto")
UNKNOWN_TYPE = "mix"
SPLITS = {"training": "train", **dict.fromkeys(HELD_OUT_NAMES, "test"), "val": "val", "valid": "val"}
SPLITS |= {"train": "train", "validation": "val"}


@dataclass(frozen=True)
class Row:
    """A pair, or an LQ alone. Text fields are "" where nothing is known."""

    id: str  # unique, relative, "/" between folders
    lq: str  # locator
    gt: str = ""  # locator
    types: str = UNKNOWN_TYPE  # "haze" or "haze|rain"
    task: str = ""
    prompt: str = ""
    split: str = ""  # train | val | test
    licence: str = ""
    source: str = ""  # where the photo comes from
    group: str = ""  # leakage unit: rows of a group are on one side of a split
    gt_kind: str = ""  # captured | clean | generated
    sha256_lq: str = ""
    sha256_gt: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    row: str  # number (from 1) or name within the file
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


FIELDS = tuple(field.name for field in fields(Row))


def parse_types(given: object) -> str:
    """Any of the spellings ("haze", "haze|rain", ["haze", "rain"], None) -> "haze|rain"; ValueError for unknown names."""
    if given is None or given == "" or given == []:
        return UNKNOWN_TYPE
    parts = given if isinstance(given, list | tuple) else str(given).split("|")
    found: list[str] = []
    for part in parts:
        known = TYPE_ALIASES.get(normalised(str(part)))
        if known is None:
            raise ValueError(
                f"type {str(part)!r} is unknown: use one of {', '.join(sorted(set(TYPE_ALIASES.values())))}"
            )
        found += [name for name in known.split("|") if name not in found]
    return "|".join(found)


def types_of_folders(name: str) -> str:
    """Types that the first telling folder of "Train/13Rain_Haze/0001" stands for, here "rain|haze"; "mix" if none."""
    for part in name.split("/")[:-1]:
        whole = TYPE_ALIASES.get(normalised(part))
        if whole is not None:
            return whole
        tokens = [normalised(token) for token in part.strip("0123456789").split("_")]
        if tokens and all(token in TYPE_ALIASES for token in tokens):
            return parse_types(tokens)
    return UNKNOWN_TYPE


def split_of_folders(name: str) -> str:
    """train, val or test if a folder of the name says so, else ""."""
    return next((SPLITS[n] for part in name.split("/")[:-1] if (n := normalised(part)) in SPLITS), "")


def primary_type(types: str) -> str:
    names = types.split("|")
    return next((name for name in PRIMARY_ORDER if name in names), names[0])


def inside(root: str, path: str) -> str:
    """`path` relative to `root`, both with links followed; ValueError if it is elsewhere, or has control characters.

    root: a real path (`os.path.realpath`). An absolute path inside the root is accepted.
    """
    if any(ord(letter) < 32 for letter in path):
        raise ValueError(f"{path!r} has control characters in its name")
    real = os.path.realpath(f"{root}{os.sep}{path}" if not os.path.isabs(path) else path)  # noqa: PTH117
    if not real.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"{path} leads out of {root} (.. or a link): refused")
    return real[len(root.rstrip(os.sep)) + 1 :]


def check_id(name: str) -> str:
    """The id, if it may be one: relative, no "..", no control characters; else ValueError."""
    if not name or name.startswith("/") or ".." in name.split("/") or any(ord(letter) < 32 for letter in name):
        raise ValueError(f"id {name!r} must be a relative name without '..'")
    return name


def without_twins(rows: Iterable[Row | BadRow], file: Path) -> tuple[list[Row], list[BadRow]]:
    """Rows sorted by id, and the bad ones; of two rows with one id the first stays."""
    good: dict[str, Row] = {}
    bad: list[BadRow] = []
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
        elif row.id in good:
            bad.append(BadRow(str(file), row.id, f"id {row.id!r} stands twice; the first one is kept"))
        else:
            good[row.id] = row
    return [good[name] for name in sorted(good)], bad
