"""All algorithms on the same work: held-out mix and gold metrics against images generated and against time.

    python scripts/bench_algorithms.py [NAME ...] [--seeds 3] [--iterations 12] [--size 96] [--controls] [--set KEY=VALUE ...]

Each config of configs/algorithms/ and the quickstart's (as `grpo`), with the quickstart's restorer, photos, mix, tasks and number
of images, in one process and thread (`placement.kind=local`, torch). With --controls each also runs with its rewards shuffled inside
every group. What is done already is not run again. Writes runs/, table.md, images.png and seconds.png into --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import t as student

from rlrestore.log import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
MIX = "eval/reward/mix/delta"
COLUMNS = ("mix", "psnr_rgb", "ssim_rgb", "gmsd", "consistency", "niqe")
DIRECT = ("draft", "refl")  # their mix lacks what has no gradient, and there is no credit to shuffle
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Job:
    name: str
    seed: int
    control: bool

    @property
    def run(self) -> str:
        return f"{self.name}{'-control' if self.control else ''}-{self.seed}"


@dataclass(frozen=True)
class Curve:
    """One run's held-out mix, against its base, after some images and seconds of training."""

    images: list[int]
    seconds: list[float]
    mix: list[float]


def configs() -> dict[str, Path]:
    return {"grpo": CONFIGS / "quickstart.yaml"} | {
        path.stem: path for path in sorted((CONFIGS / "algorithms").glob("*.yaml"))
    }


def execute(job: Job, options: argparse.Namespace) -> None:
    folder = options.out / "runs" / job.run
    if (folder / "result.json").is_file():
        return
    command = [
        sys.executable, "-m", "rlrestore", "train", str(configs()[job.name]),
        f"run.name={job.run}", f"run.dir={options.out / 'runs'}", f"run.seed={job.seed}", f"run.steps={options.iterations}",
        f"env.seed={job.seed}", f"env.size={options.size}", f"credit.shuffle={str(job.control).lower()}",
        "placement.kind=local", "placement.ranks=1", "placement.threads=1", "engine.kind=torch",
        f"evaluate.every={max(1, options.iterations // 4)}", f"evaluate.tasks={options.tasks}", "evaluate.samples=2",
        "checkpoint.every=0", "log.image_tasks=2", *options.set,
    ]  # fmt: skip
    log = options.out / f"{job.run}.log"
    with log.open("w") as output:
        done = subprocess.run(command, env=os.environ | THREADS, stdout=output, stderr=subprocess.STDOUT)
    print(f"{job.run}: {'done' if done.returncode == 0 else f'failed, see {log}'}", flush=True)


def curve(folder: Path, images: int) -> Curve:
    rows = read_metrics(folder / "metrics.jsonl")
    spent = [0.0, *accumulate(row["time/iteration_s"] for row in rows if "time/iteration_s" in row)]
    points = [(row["step"], row[MIX]) for row in rows if MIX in row]
    return Curve([step * images for step, _ in points], [spent[step] for step, _ in points], [mix for _, mix in points])


def interval(values: Sequence[float]) -> str:
    """Mean over seeds with its 95 % Student interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}"


def finished(jobs: Sequence[Job], out: Path) -> dict[tuple[str, bool], list[Path]]:
    found: dict[tuple[str, bool], list[Path]] = {}
    for job in jobs:
        if (out / "runs" / job.run / "result.json").is_file():
            found.setdefault((job.name, job.control), []).append(out / "runs" / job.run)
    return found


def share_of_ddpo(curves: Sequence[Curve], ddpo: Sequence[Curve]) -> str:
    """Time to the held-out mix that ddpo ends with, over ddpo's whole time: of the mean curves, straight between points."""
    if not ddpo:
        return ""
    goal = statistics.fmean(c.mix[-1] for c in ddpo)
    whole = statistics.fmean(c.seconds[-1] for c in ddpo)
    seconds = [statistics.fmean(column) for column in zip(*(c.seconds for c in curves), strict=True)]
    mix = [statistics.fmean(column) for column in zip(*(c.mix for c in curves), strict=True)]
    for (s, m), (s_next, m_next) in pairwise(zip(seconds, mix, strict=True)):
        if m_next >= goal > m:
            return f"{(s + (s_next - s) * (goal - m) / (m_next - m)) / whole:.2f}"
    return "0.00" if mix[0] >= goal else "not reached"


def table(runs: dict[tuple[str, bool], list[Path]], images: int) -> str:
    head = ["algorithm", "seeds", *COLUMNS, "s an iteration", "time to ddpo's end, of ddpo's"]
    ddpo = [curve(folder, images) for folder in runs.get(("ddpo", False), [])]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (name, control), folders in runs.items():
        results = [json.loads((folder / "result.json").read_text())["metrics"] for folder in folders]
        deltas = [interval([result[column]["delta"] for result in results]) for column in COLUMNS]
        curves = [curve(folder, images) for folder in folders]
        pace = statistics.median(c.seconds[-1] / c.images[-1] * images for c in curves)
        reached = "" if control or name in DIRECT else share_of_ddpo(curves, ddpo)
        label = f"`{name}`" + (" shuffled" if control else "") + (" (its own mix)" if name in DIRECT else "")
        lines.append(f"| {' | '.join([label, str(len(folders)), *deltas, f'{pace:.1f}', reached])} |")
    return "\n".join(lines)


def plot(runs: dict[tuple[str, bool], list[Path]], images: int, axis: str, out: Path) -> None:
    """Mean held-out mix over seeds; the band is their range."""
    figure, panel = plt.subplots(figsize=(7, 4.5))
    colours = plt.get_cmap("tab20")
    for index, ((name, control), folders) in enumerate(runs.items()):
        if control:
            continue
        curves = [curve(folder, images) for folder in folders]
        x = [statistics.fmean(values) for values in zip(*(getattr(c, axis) for c in curves), strict=True)]
        columns = list(zip(*(c.mix for c in curves), strict=True))
        panel.plot(x, [statistics.fmean(column) for column in columns], label=name, color=colours(index), lw=1.6)
        panel.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colours(index), alpha=0.12)
    panel.axhline(0, color="grey", lw=0.6)
    panel.set_xlabel({"images": "images generated", "seconds": "seconds of training, one thread"}[axis])
    panel.set_ylabel("held-out mix, against the base")
    panel.legend(fontsize=7, ncols=2)
    panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / f"{axis}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(configs())}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12, help="of 64 images")
    parser.add_argument("--size", type=int, default=96, help="pixels of a training and evaluation crop")
    parser.add_argument("--tasks", type=int, default=32, help="held-out crops")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; times compare only where this is equal")
    parser.add_argument("--controls", action="store_true", help="also with shuffled rewards")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for every run, e.g. another mix")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_algorithms"))
    options = parser.parse_args()
    if unknown := set(options.names) - configs().keys():
        parser.error(f"no config for {', '.join(sorted(unknown))}; known: {', '.join(configs())}")
    names = options.names or list(configs())
    controls = (False, True) if options.controls else (False,)
    jobs = [
        Job(name, seed, control)
        for seed in range(options.seeds)
        for control in controls
        for name in names
        if not (control and name in DIRECT)
    ]
    (options.out / "runs").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: execute(job, options), jobs))
    runs = finished(jobs, options.out)
    if not runs:
        raise SystemExit(f"error: no run finished; the logs are in {options.out}")
    images = 64
    (options.out / "table.md").write_text(text := table(runs, images) + "\n")
    for axis in ("images", "seconds"):
        plot(runs, images, axis, options.out)
    print(text + f"\n{options.out}/table.md, images.png, seconds.png")


if __name__ == "__main__":
    main()
