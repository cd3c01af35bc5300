"""Loop efficiency of the three placements and both engines, in one table.

Efficiency = the time that the same restorer's forwards and backwards take in a bare loop (the encoding of each LQ among
them; the fastest of four measurements in the same processes at the start of each run), over the wall time of an iteration
(draw, sample, score with SSIM, credit, update, publish, log).
Every row is a real run of the quickstart's networks; the first iteration is left out. Run it on an idle machine:

    python scripts/bench_loop.py [--iterations 4] [--size 96] [--only colocated]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml

from rlrestore.build import build_run, check_parts, load_train_config
from rlrestore.loop import train
from rlrestore.quiet import quiet
from rlrestore.reporting.log import read_metrics
from rlrestore.rundir import open_run

PLACEMENTS = {
    "local": {"kind": "local", "ranks": 1},
    "colocated": {"kind": "colocated", "ranks": 2},
    "separate": {"kind": "separate", "ranks": 1, "rollout_actors": 1},
}
STAGES = ("sample", "score", "update", "publish")


def measure(placement: str, engine: str, algorithm: str, size: int, iterations: int, folder: Path) -> dict[str, float]:
    """Medians over the iterations of one run, seconds; "rest" is what no stage accounts for."""
    config_path = folder / "bench.yaml"
    config_path.write_text(
        yaml.safe_dump(
            {
                "run": {"name": f"{placement}-{engine}", "dir": str(folder), "steps": iterations + 1},
                "env": {"kind": "photos", "size": size},
                "restorer": {"kind": "embedded"},
                "algorithm": {"kind": algorithm},
                "rewards": {"ssim_rgb": {}},
                "rollout": {"groups": 8, "samples": 8, "batch": 16},
                "engine": {"kind": engine, "zero": 2, "micro_batch": 16},
                "placement": PLACEMENTS[placement],
                "evaluate": {"tasks": 2, "samples": 1},
                "checkpoint": {"every": 0},
            }
        )
    )
    config = load_train_config(config_path)
    env = check_parts(config)
    run_folder = open_run(config.run, config)
    run = build_run(config, run_folder, env)
    try:
        train(run)
    finally:
        run.crew.close()
        run_folder.close()
    rows = [row for row in read_metrics(run_folder.path / "metrics.jsonl") if "time/iteration_s" in row][1:]

    def median(tag: str) -> float:
        return statistics.median(row.get(tag, 0.0) for row in rows)

    stages = {stage: median(f"time/{stage}_s") for stage in STAGES}
    wall = median("time/iteration_s")
    return {
        "efficiency": median("throughput/loop_efficiency"), "images/s": median("throughput/images_per_s"),
        "iteration": wall, **stages, "rest": wall - sum(stages.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4, help="measured iterations a row (default 4)")
    parser.add_argument("--size", type=int, default=96, help="side of the photos in pixels (default 96)")
    parser.add_argument("--algorithm", default="nft", help="nft or grpo (default nft)")
    parser.add_argument("--only", choices=sorted(PLACEMENTS), help="one placement")
    options = parser.parse_args()
    quiet()
    header: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for placement in [options.only] if options.only else PLACEMENTS:
            for engine in ("torch", "deepspeed"):
                row = measure(placement, engine, options.algorithm, options.size, options.iterations, Path(folder))
                if not header:
                    header = list(row)
                    print("\n" + "  ".join([f"{'placement':10} {'engine':10}", *(f"{name:>10}" for name in header)]))
                print(
                    "  ".join([f"{placement:10} {engine:10}", *(f"{row[name]:10.3f}" for name in header)]), flush=True
                )


if __name__ == "__main__":
    main()
