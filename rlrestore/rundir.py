"""The run directory: who owns it, whether to start or to continue, and its facts in run.json and result.json."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from rlrestore.checkpoint import (
    CheckpointError,
    Rejected,
    find_latest,
    read_json,
    remove_stale,
    set_aside,
    verify,
    write_json_atomic,
)
from rlrestore.config.files import ConfigError, dump, plain
from rlrestore.config.sections import RunConfig

# Keys that may differ between a run and its continuation: they change no arithmetic of the iterations.
FREE_KEYS = (
    "run.name", "run.steps", "run.resume", "run.overwrite", "run.dir", "run.max_hours", "checkpoint", "log", "ray",
    "evaluate.every", "alarm", "placement.start_timeout_s", "placement.stage_timeout_s", "optimiser.decay",
    "optimiser.threads", "optimiser.data_workers",
)  # fmt: skip
PACKAGES = ("torch", "diffusers", "deepspeed", "ray", "numpy", "safetensors", "pyiqa", "scipy")


@dataclass
class RunDir:
    """An opened, locked run directory."""

    path: Path
    resume_from: Path | None  # a verified checkpoint, or None to start at 0
    lock: TextIO
    created: bool

    def write_config(self, config: Any) -> None:
        target = self.path / "config.resolved.yaml"
        temporary = target.with_suffix(".tmp")
        temporary.write_text(dump(config))
        os.replace(temporary, target)

    def write_facts(self, **facts: Any) -> None:
        """Merge into run.json."""
        path = self.path / "run.json"
        known = read_json(path) if path.is_file() else {}
        write_json_atomic(path, {**known, **facts})

    def run_id(self) -> str:
        """Eight hex digits, the same after every resume; a run that starts anew has another."""
        path = self.path / "run.json"
        known = read_json(path).get("id") if path.is_file() else None
        if known is None:
            known = secrets.token_hex(4)
            self.write_facts(id=known)
        return known

    def write_result(self, result: Mapping[str, Any]) -> Path:
        write_json_atomic(self.path / "result.json", dict(result))
        return self.path / "result.json"

    def close(self) -> None:
        self.lock.close()

    def discard_if_empty(self) -> None:
        """After a failed start: leave nothing behind that was not there before."""
        self.close()
        if self.created and not (self.path / "checkpoints").exists() and not (self.path / "metrics.jsonl").exists():
            shutil.rmtree(self.path, ignore_errors=True)


def open_run(run: RunConfig, config: Any) -> RunDir:
    """Lock runs/<name> and decide between a start and a resume. ConfigError when neither is safe."""
    path = Path(run.dir) / run.name
    if not run.name or "/" in run.name or run.name.startswith("."):
        raise ConfigError(f"run.name '{run.name}' must be a plain folder name, such as 'quickstart'")
    if run.resume not in ("auto", "never") and not Path(run.resume).is_dir():
        raise ConfigError(f"run.resume is '{run.resume}': choose auto, never or a checkpoint folder that exists")
    if run.resume not in ("auto", "never"):
        try:
            verify(run.resume)
        except CheckpointError as error:
            raise ConfigError(f"run.resume: {error}") from error
    try:
        created = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    lock = _lock(path)
    opened = RunDir(path, None, lock, created)
    try:
        opened.resume_from = _start_or_resume(run, config, path, created)
    except BaseException:
        opened.discard_if_empty()
        raise
    return opened


def open_existing(run: RunConfig) -> RunDir:
    """Lock a run that is there, to read it and to add to it; ConfigError if it is not there or is being trained."""
    path = Path(run.dir) / run.name
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist: train it first with rlrestore train, or set run.name and run.dir")
    return RunDir(path, None, _lock(path), created=False)


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, list[Rejected]]:
    """`checkpoint.find_latest`, saying of each checkpoint that it passes over why."""
    folder, rejected = find_latest(run_dir)
    for candidate in rejected:
        print(f"checkpoint {candidate.path.name} is not used: {candidate.reason}", file=sys.stderr)
    return folder, rejected


def _lock(path: Path) -> TextIO:
    try:
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(f"{path} is in use by another process; wait for it, or choose another run.name") from error
    return lock


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write to {path}: {error.strerror}; choose another place with run.dir=FOLDER")


def _start_or_resume(run: RunConfig, config: Any, path: Path, created: bool) -> Path | None:
    """Bring the locked folder into the state that the run starts from; the checkpoint to resume, or None."""
    if run.resume == "never" and not created and any(entry.name != ".lock" for entry in path.iterdir()):
        if not run.overwrite:
            raise ConfigError(
                f"{path} exists and run.resume=never; add run.overwrite=true to replace it, or choose another run.name"
            )
        _clear(path)
    remove_stale(path)
    folder = _checkpoint_to_resume(run, path)
    if folder is None and not created and (path / "metrics.jsonl").exists():
        _clear(path)  # a run that died before its first checkpoint: nothing in it can be continued
    if folder is not None:
        _refuse_changes(path / "config.resolved.yaml", config)
        # damaged or abandoned later ones never win over new ones
        set_aside(path, int(folder.name.removeprefix("step_")))
    return folder


def _checkpoint_to_resume(run: RunConfig, path: Path) -> Path | None:
    if run.resume == "never":
        return None
    if run.resume != "auto":
        return Path(run.resume)  # verified before anything was made
    folder, rejected = newest_checkpoint(path)
    if rejected and folder is None:
        raise ConfigError(
            f"no checkpoint of {path} can be used ({rejected[0].reason}); start anew with run.resume=never run.overwrite=true, "
            "or choose another run.name"
        )
    return folder


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name != ".lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _refuse_changes(saved: Path, config: Any) -> None:
    if not saved.is_file():
        return
    old, new = _flat(yaml.safe_load(saved.read_text())), _flat(json.loads(json.dumps(plain(config))))
    for key in sorted(old.keys() | new.keys()):
        if any(key == free or key.startswith(free + ".") for free in FREE_KEYS):
            continue
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{saved.parent} was started with {key}={old.get(key)} and the config now says {new.get(key)}: a resumed run "
                "must be the same run. Choose another run.name, or start anew with run.resume=never run.overwrite=true"
            )


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping):
        return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): data}


def versions() -> dict[str, str]:
    """Of what decides the numbers; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "rlrestore": _version("rlrestore")}
    found |= {name: _version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
