"""Write requirements.lock and requirements-cuda.lock from pyproject.toml: `make lock`, after changing a dependency.

pip resolves the project with EXTRAS afresh without installing anything and reports what it would install. The versions that stand
in the lock are kept: delete a line there to let that package move (pip says which, where pyproject.toml asks for it).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
CUDA_LOCK = ROOT / "requirements-cuda.lock"

EXTRAS = "dev,features,iqa,ocr,serve"  # not face: 100 MB of weights for one reward

LOCK_HEADER = """\
# Every package that `make` installs into .venv, with its exact version, for Python 3.11 and 3.12 on Linux.
# Written by `make lock` from pyproject.toml (all extras but face); edit that file instead of this one.
#
# No hashes: pip checks all or none of them, and which torch is right depends on the machine. PyPI's 2.14.1 brings CUDA
# libraries; the CPU build of the same version (2.14.1+cpu, from PyTorch's own index) has other bytes and brings none.
# The CUDA libraries are constraints, not requirements: pinned if torch asks for them, never forced on a CPU build.
-c requirements-cuda.lock
"""
CUDA_HEADER = """\
# Versions of the CUDA libraries that PyPI's torch asks for. pip reads this file as constraints (-c in
# requirements.lock): a CPU build of torch asks for none of them, and then none is installed. Written by `make lock`.
"""


def pins(lock_text: str) -> list[str]:
    """The `name==version` lines of a lock file, without comments and options."""
    return re.findall(r"^[A-Za-z0-9][^\s#]*==[^\s#]+", lock_text, flags=re.MULTILINE)


def resolve(kept_pins: list[str]) -> dict[str, str]:
    """Name -> version of the full closure of `.[EXTRAS]`, as pip resolves it with `kept_pins` as constraints."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join(kept_pins))
        pip_install = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        options = ["--constraint", str(constraints), "--report", str(report)]
        subprocess.run([*pip_install, *options, f"{ROOT}[{EXTRAS}]"], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    # A local version ("+cpu") names one machine's build: the lock must fit every machine.
    return {m["name"].lower().replace("_", "-"): m["version"].partition("+")[0] for m in found}


def main() -> None:
    present = [p for path in (LOCK, CUDA_LOCK) if path.exists() for p in pins(path.read_text())]
    versions = resolve(present)
    del versions["rlrestore"]
    cuda = {name for name in versions if re.match(r"(nvidia|cuda)-|triton$", name)}
    for path, header, names in ((LOCK, LOCK_HEADER, versions.keys() - cuda), (CUDA_LOCK, CUDA_HEADER, cuda)):
        path.write_text(header + "".join(f"{name}=={versions[name]}\n" for name in sorted(names)))
        print(f"{path.name}: {len(names)} packages")


if __name__ == "__main__":
    main()
