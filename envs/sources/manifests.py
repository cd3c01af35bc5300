"""Manifests: JSON (a list), JSONL, CSV and Parquet files that name the images of each row.

Only `lq` is required (docs/data.md lists the columns). JSON or JSONL is decided by the first letter, not by the suffix.
A bad row is named and left out; the others are kept.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from envs.pairing import GT_NAMES, LQ_NAMES, normalised
from envs.sources.rows import FIELDS, SPLITS, BadRow, Row, check_id, inside, parse_types, split_of_folders

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
# Columns that are taken as they are, besides id, lq, gt, types and split.
_PLAIN = tuple(name for name in FIELDS if name not in ("id", "lq", "gt", "types", "split"))
_LQ_COLUMNS = LQ_NAMES | {"image"}
_AT = re.compile(r"\d+\+\d+|\d+:[^\t\n]+")
_MAX_LINE = 2**20  # characters of one JSONL line


def read_manifest(file: Path, root: Path) -> Iterator[Row | BadRow]:
    """Rows of a manifest; paths in it are relative to `root` and must stay inside. ValueError if it is no manifest."""
    real = os.path.realpath(root)
    names: dict[str, str] | None = None
    for number, given in _records(file):
        if isinstance(given, str):
            yield BadRow(str(file), number, given)
            continue
        if names is None or not names.keys() & given.keys():
            try:
                names = columns(list(given), file)
            except ValueError as error:
                if names is None and file.suffix in (".csv", ".parquet"):
                    raise
                yield BadRow(str(file), number, str(error))
                continue
        try:
            yield to_row({names.get(key, key): value for key, value in given.items()}, real)
        except (ValueError, TypeError) as error:
            yield BadRow(str(file), number, str(error))


def columns(header: list[str], file: Path) -> dict[str, str]:
    """Column -> "lq" or "gt"; ValueError with the header if there is no column for the LQ, or there are two."""
    found: dict[str, str] = {}
    for role, aliases in (("lq", _LQ_COLUMNS), ("gt", GT_NAMES)):
        exact = [name for name in header if name == role]
        matching = exact or [name for name in header if normalised(name) in aliases]
        if len(matching) > 1 or (role == "lq" and not matching):
            few = f"{len(matching)} columns for the {role.upper()}"
            raise ValueError(f"{file.name} has {few} among {', '.join(header)}: name one of them {role!r}")
        found |= dict.fromkeys(matching, role)
    return found


def to_row(given: Mapping[str, Any], real_root: str) -> Row:
    """A record with keys as in the documentation -> Row; ValueError with the reason."""
    lq = _locator(given, "lq", real_root)
    gt = _locator(given, "gt", real_root) if given.get("gt") else ""
    name = str(given.get("id") or PurePosixPath(lq.partition("\t")[0]).with_suffix(""))
    split = str(given.get("split") or split_of_folders(lq))
    if split and normalised(split) not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use train, val or test")
    return Row(
        id=check_id(name),
        lq=lq,
        gt=gt,
        types=parse_types(given.get("types", given.get("type"))),
        split=SPLITS[normalised(split)] if split else "",
        **{key: str(given[key]) for key in _PLAIN if given.get(key) not in (None, "")},
    )


def to_record(row: Row) -> dict[str, str]:
    """The record that `to_row` reads as this row; fields without a value are left out."""
    record = {key: value for key, value in vars(row).items() if value}
    for key in ("lq", "gt"):
        path, _, at = record.get(key, "").partition("\t")
        if at:
            record |= {key: path, f"{key}_at": at}
    return record


def _locator(given: Mapping[str, Any], key: str, real_root: str) -> str:
    """A path, with a place in that file or folder if `lq_at` or `gt_at` gives one."""
    value, at = given.get(key), given.get(f"{key}_at")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a path, got {value!r}")
    relative = inside(real_root, value) if value != "." else value
    path = f"{real_root}/{relative}"
    if not (os.path.exists(path) if at else os.path.isfile(path)):  # noqa: PTH110, PTH113  (100,000 rows)
        raise ValueError(f"{key} {value} does not exist below {real_root}")
    if at and not _AT.fullmatch(str(at)):
        raise ValueError(f"{key}_at must be OFFSET+LENGTH or ROW:COLUMN, got {at!r}")
    return f"{relative}\t{at}" if at else relative


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(row number from 1, record or what is wrong with it)."""
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines), start=1):
                wrong = None in row or None in row.values()
                yield str(number), "has more or fewer cells than the header" if wrong else dict(row)
    elif file.suffix == ".parquet":
        yield from _parquet_records(file)
    else:
        yield from _json_records(file)


def _parquet_records(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield str(number), row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable Parquet file ({error}): replace it") from error


def _json_records(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with file.open(encoding="utf-8") as lines:
        first = lines.read(1)
        while first and first.isspace():
            first = lines.read(1)
        lines.seek(0)
        if first == "[":
            try:
                rows = json.load(lines)
            except ValueError as error:
                raise ValueError(f"{file} is not JSON ({error}): correct it, or write one object a line") from error
            yield from ((str(n), row if isinstance(row, dict) else "is no object") for n, row in enumerate(rows, 1))
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield str(number), _object(line)


def _object(line: str) -> dict[str, Any] | str:
    if len(line) > _MAX_LINE:
        return f"has {len(line):,} characters, the limit is {_MAX_LINE:,}"
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"is not JSON ({error})"
    return row if isinstance(row, dict) else "is no object"
