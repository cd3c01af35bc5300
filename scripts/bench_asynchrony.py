"""What sampling ahead of training gains in time and costs in reward: the same run with `asynchrony.ahead` 0, 1, ...

The quickstart's task with one trainer rank and one rollout actor of one thread each, so that two cores can do both at once. Each row
is one training run; seconds are medians over iterations without the first two, gains are those of the result table (tuned minus base on
held-out photos, the EMA's weights).

    python scripts/bench_asynchrony.py [--steps 20] [--seeds 0 1] [--ahead 0 1] [--algorithm grpo]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlrestore.reporting.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("mix", "judge", "low_frequency", "psnr_rgb")


def run(folder: Path, ahead: int, seed: int, steps: int, algorithm: str) -> dict[str, float]:
    name = f"{algorithm}_ahead{ahead}_seed{seed}"
    overrides = [
        f"run.dir={folder}", f"run.name={name}", f"run.seed={seed}", f"run.steps={steps}", "env.size=64",
        "engine.kind=torch",
        "evaluate.every=0", "evaluate.tasks=12", "evaluate.samples=2",
        "placement.kind=separate", "placement.ranks=1", "placement.rollout_actors=1", "placement.threads=1",
        f"asynchrony.ahead={ahead}", f"placement.max_staleness={ahead}",
    ]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "rlrestore",
        "train",
        str(ROOT / f"configs/algorithms/{algorithm}.yaml"),
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [record for record in read_metrics(folder / name / "metrics.jsonl") if "time/iteration_s" in record][2:]
    metrics = json.loads((folder / name / "result.json").read_text())["metrics"]

    def median(tag: str) -> float:
        return statistics.median([record[tag] for record in records if tag in record] or [float("nan")])

    return {
        **{stage: median(f"time/{stage}_s") for stage in ("iteration", "sample", "update", "reanchor")},
        **{f"d {name}": metrics[name]["delta"] for name in METRICS},
        "importance": median("group/importance_mean"),
        "truncated": median("group/importance_truncated_frac"),
        "dropped": median("group/importance_dropped_frac"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--algorithm", default="grpo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for row, (seed, ahead) in enumerate((seed, ahead) for seed in options.seeds for ahead in options.ahead):
            found = run(Path(folder), ahead, seed, options.steps, options.algorithm)
            if row == 0:
                print("seed ahead " + " ".join(f"{key:>16}" for key in found), flush=True)
            print(f"{seed:4} {ahead:5} " + " ".join(f"{value:16.4g}" for value in found.values()), flush=True)


if __name__ == "__main__":
    main()
