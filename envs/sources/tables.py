"""Tables that hold the images themselves: Parquet files, and Hugging Face datasets saved to disk.

A cell is bytes, or Hugging Face's {"bytes", "path"}; only its bytes are used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from envs.sources.manifests import columns
from envs.sources.rows import FIELDS, BadRow, Row, check_id, inside, parse_types, split_of_folders, types_of_folders

_TEXT = tuple(name for name in FIELDS if name not in ("id", "lq", "gt", "types"))


def holds_images(file: Path) -> bool:
    """Whether the Parquet file's LQ column holds images rather than paths."""
    schema = _schema(file)
    lq = next(name for name, role in columns(schema.names, file).items() if role == "lq")
    kind = schema.field(lq).type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read_parquet(files: Sequence[Path], root: Path) -> Iterator[Row | BadRow]:
    """Rows of Parquet files with images; ids from an `id` column, else file name and row number."""
    for file in files:
        relative = file.relative_to(root).as_posix()
        schema = _schema(file)
        roles = columns(schema.names, file)
        text = [name for name in schema.names if name in (*_TEXT, "id", "types", "type")]
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=4096, columns=text or None):
            for told in batch.to_pylist():
                yield _row(told, roles, relative, f"{relative.removesuffix('.parquet')}/{number:08d}", number)
                number += 1


def read_hub_folder(root: Path) -> Iterator[Row | BadRow]:
    """Rows of a folder that `datasets` saved (`save_to_disk`), with its splits if it has some."""
    from datasets import load_from_disk

    splits = [path.parent.name for path in sorted(root.glob("*/state.json"))] or [""]
    for split in splits:
        _refuse_outside(root / split)
        data = load_from_disk(str(root / split))
        roles = columns(data.column_names, root)
        text = [name for name in data.column_names if name in (*_TEXT, "id", "types", "type")]
        told = data.select_columns(text).to_list() if text else [{}] * len(data)
        for number, row in enumerate(told):
            yield _row({"split": split, **row}, roles, split or ".", f"{split or root.name}/{number:08d}", number)


def _refuse_outside(folder: Path) -> None:
    """ValueError if the folder's state.json names files elsewhere, or links lead there: `datasets` would open them."""
    file, real = folder / "state.json", os.path.realpath(folder)
    try:
        names = [str(item["filename"]) for item in json.loads(file.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not say which files the data set has: save it again with `save_to_disk`"
        ) from error
    for name in names:
        try:
            inside(real, name)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def _row(told: dict[str, Any], roles: dict[str, str], place: str, name: str, number: int) -> Row | BadRow:
    cells = {role: f"{place}\t{number}:{column}" for column, role in roles.items()}
    name = str(told.get("id") or name)
    types = told.get("types", told.get("type"))
    more = {key: str(told[key]) for key in _TEXT if told.get(key)}
    try:
        return Row(
            id=check_id(name),
            lq=cells["lq"],
            gt=cells.get("gt", ""),
            types=parse_types(types) if types else types_of_folders(name),
            **{"split": split_of_folders(name), **more},
        )
    except ValueError as error:
        return BadRow(place, str(number + 1), str(error))


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable Parquet file ({error}): replace it") from error
