"""The folder of a build: locked by one process, append-only journals, blobs by content.

    builds/NAME/  config.yaml  .lock  blobs/ab/<sha256>  log/{calls,outcomes,decisions}.jsonl  dataset/  report.json

A line counts once its newline is on disk; a torn last line (kill, full disk) is cut off when the journal is opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Records in the order they were made. Safe in several threads; one process at a time (the folder is locked)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.records: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self._file = path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """On disk when this returns."""
        line = json.dumps(dict(record), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.records.append(dict(record))

    def close(self) -> None:
        self._file.close()


class Blobs:
    """Bytes by their sha256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        path = self._path(name)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{name}")
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        return name

    def get(self, name: str) -> bytes:
        """ValueError if it is gone or was changed."""
        path = self._path(name)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != name:
            raise ValueError(f"{path} is missing or damaged: restore it, or remove its records from the log")
        return data

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name


class BuildFolder:
    """An opened, locked build. ValueError if another process has it, or if it was built with another config."""

    def __init__(self, path: Path, config_text: str = "") -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock: TextIO = (path / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"{path} is in use by another process: wait for it, or choose another build.name"
            ) from error
        self.blobs = Blobs(path / "blobs")
        self.calls, self.outcomes, self.decisions = (
            Journal(path / "log" / f"{name}.jsonl") for name in ("calls", "outcomes", "decisions")
        )
        if config_text:
            (path / "config.yaml").write_text(config_text)

    def close(self) -> None:
        for journal in (self.calls, self.outcomes, self.decisions):
            journal.close()
        self._lock.close()


def digest_of(*parts: object) -> str:
    """sha256 (hex) over a JSON form of the parts; bytes count by their own digest."""
    plain = [hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
