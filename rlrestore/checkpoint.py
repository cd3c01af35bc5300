"""Checkpoints that are either whole or not there.

A checkpoint is a folder `<run>/checkpoints/step_000120` whose MANIFEST.json, written last, lists every file with its
size and sha256. It is written as `.tmp-*` beside its final place and renamed when complete, so a kill at any moment
leaves the earlier checkpoints as they were. Reading verifies hashes, because safetensors and torch both load a flipped
bit silently.

What is inside is the caller's business: this module knows folders, bytes and JSON. Tensors go through safetensors,
never pickle.
Errors: `CheckpointError`, which names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # safetensors.torch imports torch (seconds); reading a manifest must not
    from torch import Tensor

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
TMP_PREFIX = ".tmp-"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint, or a file of one, that cannot be used. `file` is the path at fault."""

    def __init__(self, message: str, file: Path) -> None:
        super().__init__(message)
        self.file = file


@dataclass(frozen=True)
class FileEntry:
    path: str  # relative to the checkpoint, with forward slashes
    bytes: int
    sha256: str  # lower-case hex


@dataclass(frozen=True)
class Manifest:
    schema: int
    step: int
    written_at: float  # seconds since 1970
    meta: dict[str, Any]  # the caller's: config hash, world size, policy version, ...
    files: tuple[FileEntry, ...]  # sorted by path


@dataclass(frozen=True)
class Rejected:
    path: Path
    reason: str


def checkpoints_dir(run_dir: Path | str) -> Path:
    return Path(run_dir) / "checkpoints"


def checkpoint_path(run_dir: Path | str, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step_{step:06d}"


class CheckpointWriter:
    """`with CheckpointWriter(run_dir, step, meta) as tmp_dir:` write below tmp_dir; the exit makes it a checkpoint.

    `meta` (JSON values) is read at the exit, so the block may still fill it. If the block raises, nothing is left.
    An existing checkpoint of the same step is replaced, after the new one is complete, which will be at `final_path`.
    """

    def __init__(self, run_dir: Path | str, step: int, meta: Mapping[str, Any] | None = None) -> None:
        self.step = step
        self.meta = {} if meta is None else meta
        self.final_path = checkpoint_path(run_dir, step)
        self.tmp_dir = self.final_path.with_name(_tmp_name(self.final_path.name))

    def __enter__(self) -> Path:
        self.tmp_dir.mkdir(parents=True)
        return self.tmp_dir

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self.tmp_dir, ignore_errors=True)  # after the rename there is nothing to remove

    def _commit(self) -> None:
        entries, folders = [], [self.tmp_dir]
        for path in sorted(self.tmp_dir.rglob("*")):
            if path.is_symlink():
                raise CheckpointError(f"{path} is a link: a checkpoint holds its own files", path)
            if path.is_dir():
                folders.append(path)
            else:
                _fsync(path)
                entries.append(FileEntry(path.relative_to(self.tmp_dir).as_posix(), path.stat().st_size, _sha256(path)))
        if not entries:
            raise CheckpointError(f"the checkpoint of step {self.step} would be empty", self.final_path)
        assert MANIFEST not in {entry.path for entry in entries}, f"{MANIFEST} is written here, not by the caller"
        manifest = {
            "schema": SCHEMA_VERSION,
            "step": self.step,
            "written_at": time.time(),
            "meta": dict(self.meta),
            "files": [vars(entry) for entry in entries],
        }
        for folder in folders:
            _fsync(folder)
        write_json_atomic(self.tmp_dir / MANIFEST, manifest)
        _rename_over(self.tmp_dir, self.final_path)


def new_checkpoint(run_dir: Path | str, step: int, meta: Mapping[str, Any] | None = None) -> CheckpointWriter:
    """The writer of `checkpoints/step_<step>`; see `CheckpointWriter`."""
    return CheckpointWriter(run_dir, step, meta)


def verify(checkpoint: Path | str) -> Manifest:
    """Reads the manifest and every byte it lists. CheckpointError names the first file missing, short or changed."""
    checkpoint = Path(checkpoint)
    manifest = read_manifest(checkpoint)
    for entry in manifest.files:
        file = checkpoint / entry.path
        if not file.is_file():
            raise CheckpointError(f"{file} is listed in {MANIFEST} but is not there", file)
        size = file.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{file} has {size} bytes, not the {entry.bytes} of {MANIFEST}: truncated?", file)
        if _sha256(file) != entry.sha256:
            raise CheckpointError(f"{file} does not match its sha256 in {MANIFEST}: the content was changed", file)
    return manifest


def read_manifest(checkpoint: Path | str) -> Manifest:
    """The manifest alone, without looking at the files."""
    file = Path(checkpoint) / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: {checkpoint} is not a complete checkpoint", file)
    try:
        raw = json.loads(file.read_text())
        schema = int(raw["schema"])
        entries = tuple(FileEntry(str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in raw["files"])
        manifest = Manifest(schema, int(raw["step"]), float(raw["written_at"]), dict(raw["meta"]), entries)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})", file) from error
    if schema != SCHEMA_VERSION:
        raise CheckpointError(f"{file} has schema {schema}, but this version reads {SCHEMA_VERSION}", file)
    for entry in manifest.files:
        if entry.path.startswith("/") or ".." in Path(entry.path).parts:
            raise CheckpointError(f"{file} lists {entry.path!r}, which lies outside the checkpoint", file)
    return manifest


def find_latest(run_dir: Path | str) -> tuple[Path | None, list[Rejected]]:
    """The verified checkpoint of the highest step, or None; and the higher ones passed over, with reasons to log."""
    rejected: list[Rejected] = []
    for step, path in sorted(_step_folders(run_dir).items(), reverse=True):
        try:
            manifest = verify(path)
            if manifest.step != step:
                raise CheckpointError(f"{path} holds step {manifest.step}: the folder was renamed", path / MANIFEST)
            return path, rejected
        except (CheckpointError, OSError) as error:
            rejected.append(Rejected(path, str(error)))
    return None, rejected


def retain(run_dir: Path | str, keep_last: int, pinned: Collection[int] = ()) -> list[Path]:
    """Deletes all but the `keep_last` highest complete steps and the `pinned` steps; returns what it deleted.

    Call it after a new checkpoint is complete. Folders without a manifest are neither counted nor deleted. What cannot
    be deleted is a warning, not an error: it must not end a run that has just saved.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last} would delete every checkpoint; keep at least 1, better 2")
    complete = {step: path for step, path in _step_folders(run_dir).items() if (path / MANIFEST).is_file()}
    kept = {*sorted(complete)[-keep_last:], *pinned}
    deleted = []
    for step in sorted(set(complete) - kept):
        path = complete[step]
        doomed = path.with_name(_tmp_name(path.name))
        try:
            path.rename(doomed)  # first out of sight, so that a half-deleted folder is never a candidate
            shutil.rmtree(doomed)
            deleted.append(path)
        except OSError as error:
            warnings.warn(f"could not delete old checkpoint {path}: {error}", stacklevel=2)
    return deleted


def set_aside(run_dir: Path | str, after_step: int) -> list[Path]:
    """Renames the checkpoints of steps above `after_step` to `aside_step_*` and returns their new paths.

    For a resume at `after_step`: later checkpoints are damaged or of an abandoned branch, and must neither be resumed
    from nor counted by `retain` while the run passes those steps again.
    """
    moved = []
    for step, path in sorted(_step_folders(run_dir).items()):
        if step > after_step:
            moved.append(path.rename(path.with_name(f"aside_{path.name}-{uuid.uuid4().hex[:8]}")))
    return moved


def remove_stale(run_dir: Path | str) -> list[Path]:
    """Deletes the `.tmp-*` leftovers of a kill. Only at start, by the only writer: a running save looks the same."""
    folder = checkpoints_dir(run_dir)
    stale = sorted(folder.glob(TMP_PREFIX + "*")) if folder.is_dir() else []
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file; values come back bit for bit, on the CPU, and no longer share memory."""
    from safetensors.torch import save_file

    copies, seen = {}, set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        storage = copy.untyped_storage().data_ptr()
        copies[name] = copy.clone() if storage in seen else copy
        seen.add(storage)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(copies, path, dict(metadata) if metadata else None)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. CheckpointError if cut; `verify` sees flipped bits."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}", Path(path)) from error


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Writes JSON (no NaN) so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(_tmp_name(path.name))
    try:
        with tmp.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    _fsync(path.parent)


def read_json(path: Path | str) -> Any:
    """CheckpointError with the path if the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", Path(path)) from error


def _tmp_name(name: str) -> str:
    return f"{TMP_PREFIX}{name}-{uuid.uuid4().hex[:12]}"


def _step_folders(run_dir: Path | str) -> dict[int, Path]:
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return {}
    found = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in found if match}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename_over(tmp: Path, final: Path) -> None:
    """Rename, replacing a folder that is there. A kill between the two renames loses that step only."""
    replaced = final.with_name(_tmp_name(final.name)) if final.exists() else None
    if replaced is not None:
        final.rename(replaced)
    tmp.rename(final)
    _fsync(final.parent)
    if replaced is not None:
        with contextlib.suppress(OSError):
            shutil.rmtree(replaced)
