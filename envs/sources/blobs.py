"""The bytes of an image by its locator (`envs.sources.rows`): from a file, a tar shard or a table, in any order."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

from envs.images import MAX_PIXELS
from envs.sources.rows import inside

MAX_BYTES = 4 * MAX_PIXELS  # of one encoded image
_OPEN_FILES = 64
_ROW_GROUPS = 4


class Blobs:
    """Reads below one root. Safe in several threads; a pickled or forked copy opens its own files."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._tables: OrderedDict[tuple[str, str, int], Any] = OrderedDict()

    def __reduce__(self) -> tuple[type[Blobs], tuple[Path]]:
        return Blobs, (Path(self.root),)

    def read(self, locator: str) -> bytes:
        """ValueError, naming the file, if it is gone, leads out of the root, or is too large."""
        if self._pid != os.getpid():
            self._forget()
        name, _, at = locator.partition("\t")
        try:
            path = f"{self.root}/{inside(self.root, name)}" if name != "." else self.root
            if not at:
                return self._whole(path)
            if "+" in at:
                offset, length = map(int, at.split("+"))
                return self._slice(path, offset, length)
            row, _, column = at.partition(":")
            return self._cell(path, int(row), column)
        except OSError as error:
            raise ValueError(f"{shown(locator)} cannot be read ({error.strerror}): restore or remove it") from error

    def _whole(self, path: str) -> bytes:
        with open(path, "rb") as file:  # noqa: PTH123  (100,000 of them)
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes")
        return data

    def _slice(self, path: str, offset: int, length: int) -> bytes:
        if length > MAX_BYTES:
            raise ValueError(f"{path} has a member of {length:,} bytes, the limit is {MAX_BYTES:,}")
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = open(path, "rb")  # noqa: PTH123, SIM115
            if len(self._files) > _OPEN_FILES:  # closed when the last thread that reads from it lets go
                self._files.popitem(last=False)
        data = os.pread(file.fileno(), length, offset)
        if len(data) < length:
            raise ValueError(f"{path} ends before byte {offset + length}: it was cut or replaced")
        return data

    def _cell(self, path: str, row: int, column: str) -> bytes:
        value = (
            self._parquet_cell(path, row, column) if path.endswith(".parquet") else self._hub_cell(path, row, column)
        )
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"{path}, row {row + 1}: column {column} holds no image bytes")
        return data

    def _parquet_cell(self, path: str, row: int, column: str) -> Any:
        import pyarrow.parquet as pq

        meta = self._keep((path, "", -1), lambda: pq.read_metadata(path))
        group = 0
        while row >= meta.row_group(group).num_rows:
            row -= meta.row_group(group).num_rows
            group += 1
        table = self._keep((path, column, group), lambda: pq.ParquetFile(path).read_row_group(group, columns=[column]))
        return table.column(column)[row].as_py()

    def _hub_cell(self, path: str, row: int, column: str) -> Any:
        from datasets import load_from_disk

        data = self._keep((path, "", -1), lambda: load_from_disk(path).with_format("arrow"))
        return data[row].column(column)[0].as_py()

    def _keep(self, key: tuple[str, str, int], make: Any) -> Any:
        """From the last few tables and row groups."""
        value = self._tables.get(key)
        if value is None:
            value = self._tables[key] = make()
            while len(self._tables) > 2 * _ROW_GROUPS:
                self._tables.popitem(last=False)
        return value


def differs(data: bytes, sha256: str) -> bool:
    """Whether these are not the bytes of which a row tells the sha256; a row that tells none is believed."""
    return bool(sha256) and hashlib.sha256(data).hexdigest() != sha256


def shown(locator: str) -> str:
    """A locator for people: "shard.tar at 512+3402"."""
    return locator.replace("\t", " at ")
