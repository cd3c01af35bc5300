"""What this machine can run, and what is missing: each check is a function that returns findings, each with its remedy.

A finding is `ok`, `warn` (something will be slower, or cannot be used) or `fail` (a run will not start). Nothing here imports Ray;
`actors/doctor.py` has the checks that need it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

OK, WARN, FAIL = "ok", "warn", "fail"
GB = 1e9
DISK_WARN_GB, DISK_FAIL_GB = 20.0, 1.0  # of the folder that checkpoints are written to
OPEN_FILES = 4096  # Ray keeps a socket a worker and an object
LOW_SHM_GB = 0.3


@dataclass(frozen=True)
class Finding:
    name: str
    status: str  # ok | warn | fail
    found: str
    remedy: str = ""  # of what is not ok


def python_version() -> list[Finding]:
    version = platform.python_version()
    good = version.startswith(("3.11.", "3.12."))
    return [
        Finding("python", OK if good else FAIL, version, "" if good else "install Python 3.11 or 3.12, then `make`")
    ]


def packages(version_of: Callable[[str], str] = importlib.metadata.version) -> list[Finding]:
    """Every requirement of rlrestore itself, and the optional metrics."""
    wrong, found = [], []
    for text in importlib.metadata.requires("rlrestore") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = version_of(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found.append(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    remedy = "pip install -r requirements.lock (or `make`)"
    main = (
        Finding("packages", FAIL, "; ".join(wrong), remedy)
        if wrong
        else Finding("packages", OK, f"{len(found)} as pinned")
    )
    try:
        return [main, Finding("pyiqa", OK, version_of("pyiqa"))]
    except importlib.metadata.PackageNotFoundError:
        return [
            main,
            Finding("pyiqa", WARN, "not installed: its metrics cannot be used", "pip install 'rlrestore[iqa]'"),
        ]


def compiler(which: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    """Only DeepSpeed's own GPU kernels and CPU offload are compiled, on first use; nothing that runs by default is."""
    missing = [name for name, tools in (("c++", ("c++", "g++")), ("ninja", ("ninja",))) if not any(map(which, tools))]
    if not missing:
        return [Finding("compiler", OK, "c++ and ninja")]
    remedy = "only for DeepSpeed's own kernels (offload, fused Adam): apt install g++ ninja-build"
    return [Finding("compiler", WARN, f"{' and '.join(missing)} not found", remedy)]


def gpus() -> list[Finding]:
    """What torch sees, against what the driver has."""
    import torch

    cards = _nvidia_smi()
    if torch.cuda.is_available():
        lines = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            lines.append(f"{card.name} {card.total_memory / GB:.0f} GB")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return [
            Finding(
                "gpus", OK, f"{', '.join(lines)}; CUDA {torch.version.cuda}, NCCL {nccl}, driver {cards or 'unknown'}"
            )
        ]
    if cards:
        remedy = (
            "this torch is built for the CPU: pip install torch from PyPI"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}: update the driver, or unset CUDA_VISIBLE_DEVICES"
        )
        return [Finding("gpus", FAIL, f"the driver has {cards}, torch {torch.__version__} sees none", remedy)]
    return [
        Finding("gpus", WARN, "none: everything runs on the CPU", "enough for the embedded restorer; others need one")
    ]


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(listed.stdout.strip().splitlines()) if listed.returncode == 0 else ""


def disk(folder: Path, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage) -> list[Finding]:
    """Where runs are written; the nearest folder that exists already, since nothing is made here."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    if not os.access(there, os.W_OK):
        return [Finding("disk", FAIL, f"{there} cannot be written to", "choose another place with run.dir=FOLDER")]
    free_gb = usage(there)[2] / GB
    status = FAIL if free_gb < DISK_FAIL_GB else WARN if free_gb < DISK_WARN_GB else OK
    remedy = "" if status == OK else "free some, choose another run.dir, or lower checkpoint.keep"
    return [Finding("disk", status, f"{free_gb:.0f} GB free in {there}", remedy)]


def shared_memory(
    object_store_mb: int,
    folder: Path = Path("/dev/shm"),
    usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage,
) -> list[Finding]:
    """Ray's object store lies here; without room it falls back to the disk, ten times slower."""
    free_gb = usage(folder)[2] / GB if folder.is_dir() else 0.0
    enough = free_gb * 1e3 >= max(object_store_mb * 1.05, LOW_SHM_GB * 1e3)
    remedy = (
        "" if enough else "docker: --shm-size=8g; Kubernetes: emptyDir with medium Memory; or lower ray.object_store_mb"
    )
    found = f"{free_gb:.1f} GB free in {folder}, object store {object_store_mb} MB"
    return [Finding("object store", OK if enough else FAIL, found, remedy)]


def open_files(limit: int | None = None) -> list[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    remedy = "" if limit >= OPEN_FILES else f"ulimit -n {16 * OPEN_FILES}"
    return [Finding("open files", WARN if remedy else OK, f"at most {limit}", remedy)]


def token_file() -> list[Finding]:
    """Ray writes its own token file readable for everybody."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        return [Finding("ray token", OK, "no file: a run on this machine makes a token of its own")]
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return [Finding("ray token", WARN, f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")]
    return [Finding("ray token", OK, str(path))]


def parts(makers: Sequence[tuple[str, Callable[[], object]]]) -> list[Finding]:
    """Build each part of a config (restorer, env, every metric): weights or packages that are missing show here."""
    findings = []
    for name, make in makers:
        try:
            make()
        except Exception as error:  # whatever keeps a part from being built is a finding
            text = " ".join(str(error).split())
            findings.append(
                Finding(
                    name,
                    FAIL,
                    f"{type(error).__name__}: {text}",
                    "docs/families.md, docs/rewards.md",
                )
            )
        else:
            findings.append(Finding(name, OK, "can be built"))
    return findings
