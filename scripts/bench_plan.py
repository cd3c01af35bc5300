"""`rlrestore plan` beside measurement: seconds of an iteration and memory of a rank, for one and two ranks on this machine.

    python scripts/bench_plan.py [--steps 5] [--size 64] [--engine deepspeed]

For each number of ranks: a probe (`plan --probe --json`), then a real run through Ray with the same config, whose log gives
seconds (median without the first iteration) and whose trainer processes give memory (their peak resident size). A third
prediction takes the log of the other number of ranks. Run it on an idle machine: a probe and a run that do not get
the same share of its cores cannot agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from rlrestore.planning.past_run import stage_seconds

RANKS = (1, 2)


def write_config(folder: Path, size: int, steps: int, engine: str) -> Path:
    config = {
        "run": {"name": "bench", "dir": str(folder), "steps": steps},
        "env": {"kind": "photos", "size": size, "recipe": "mild"},
        "restorer": {"kind": "embedded"},
        "algorithm": {"kind": "grpo"},
        "rewards": {"nss": {}, "low_frequency": {}},
        "rollout": {"groups": 4, "samples": 8, "batch": 8},
        "engine": {"kind": engine, "zero": 2, "micro_batch": 8},
        "placement": {"kind": "colocated", "ranks": 1, "reward_workers": 1},
        "evaluate": {"tasks": 2, "samples": 2, "batch": 4},
        "checkpoint": {"every": 0},
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rlrestore", *map(str, arguments)]


def plan(config: Path, ranks: int, *options: object) -> dict:
    """The plan as `--json` prints it."""
    call = command("plan", config, f"placement.ranks={ranks}", *options, "--json")
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def run(config: Path, ranks: int, folder: Path) -> tuple[Path, int]:
    """(run folder, peak resident bytes of the largest trainer process)."""
    name = f"ranks{ranks}"
    process = subprocess.Popen(
        command("train", config, f"run.name={name}", f"placement.ranks={ranks}"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        peak = max(peak, trainers_peak(process.pid))
        time.sleep(0.5)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"the run with {ranks} ranks failed: {process.stderr.read().strip()}")
    return folder / name, peak


def trainers_peak(root: int) -> int:
    """Bytes: the largest VmHWM of the trainer actors that descend from `root`."""
    parents, peaks = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended
            parents[int(entry.name)] = int(fields["PPid"])
            if title.startswith(b"ray::TrainerWorker"):
                peaks[int(entry.name)] = int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
    return max((peak for pid, peak in peaks.items() if _descends(pid, root, parents)), default=0)


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid > 1:
        if pid == root:
            return True
        pid = parents.get(pid, 0)
    return False


def row(what: str, ranks: int, source: str, predicted: float, measured: float, unit: str) -> str:
    return (
        f"| {what} | {ranks} | {source} | {predicted:.2f} | {measured:.2f} | {predicted / measured - 1:+.0%} | {unit} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="iterations of a run (default 5)")
    parser.add_argument("--size", type=int, default=64, help="side of the photos in pixels (default 64)")
    parser.add_argument("--engine", default="deepspeed", choices=("deepspeed", "torch"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print("| what | ranks | from | predicted | measured | error | |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="bp-") as temporary:
        folder = Path(temporary)
        config = write_config(folder, options.size, options.steps, options.engine)
        measured_s, runs = {}, {}
        for ranks in RANKS:
            before = plan(config, ranks, "--probe")
            runs[ranks], peak = run(config, ranks, folder)
            seconds = stage_seconds(runs[ranks])
            measured_s[ranks] = seconds["iteration"]
            after = plan(config, ranks, "--probe")  # the two around the run, as the machine's speed drifts
            probed_s = (before["simulated"]["iteration_s"] + after["simulated"]["iteration_s"]) / 2
            print(row("iteration", ranks, "probe", probed_s, measured_s[ranks], "s"), flush=True)
            reckoned = (before["chosen"]["peak"] + after["chosen"]["peak"]) / 2
            print(row("memory of a rank", ranks, "probe", reckoned / 2**30, peak / 2**30, "GiB"), flush=True)
            print(
                f"<!-- {json.dumps({'log': seconds, 'probe': before['stages'], 'busy': before['simulated']})} -->",
                flush=True,
            )
        for ranks, other in (RANKS, RANKS[::-1]):
            predicted_s = plan(config, ranks, "--from-run", runs[other])["simulated"]["iteration_s"]
            print(row("iteration", ranks, f"log of {other}", predicted_s, measured_s[ranks], "s"), flush=True)


if __name__ == "__main__":
    main()
