"""All algorithms on the same work, each against its control: held-out mix and gold metrics against images generated and time.

    python scripts/bench_algorithms.py [NAME ...] [--seeds 3] [--controls 1] [--set KEY=VALUE ...] [--out FOLDER]

Each config of configs/algorithms/ with the quickstart's restorer, photos and mix, but smaller crops (`WORK`); the same tasks, noise and
number of images, in this process on one thread (`placement.kind=local`, torch). A control is the same run with rewards shuffled inside
every group (direct methods: climbed or descended by chance); it has the seed, tasks and first noise of its run, so that the two are
compared pair by pair. Seconds are CPU seconds of this process without evaluation: other work on the machine matters little. What is
done already is not run again, so it may be stopped at any time. Writes runs/, table.md, images.png and seconds.png into --out; with
--docs the table and the plots go into docs/algorithms.md, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import t as student

from rlrestore.build import build_run, check_parts, load_train_config
from rlrestore.checkpoint import write_json_atomic
from rlrestore.crew import Crew
from rlrestore.evaluation.evaluate import Evaluation, Measured, compare
from rlrestore.evaluation.statistics import bootstrap_ci
from rlrestore.loop import images_trained, train
from rlrestore.rundir import open_run

ROOT = Path(__file__).parents[1]
CONFIGS, DOCS = ROOT / "configs" / "algorithms", ROOT / "docs"
BEGIN, END = "<!-- bench: scripts/bench_algorithms.py --docs writes this -->\n", "<!-- /bench -->"
COLUMNS = ("mix", "judge", "low_frequency", "judge_hallucination", "psnr_rgb", "ssim_rgb", "gmsd")
DIGITS = {"low_frequency": 5}
YARDSTICK = "ddpo"
# The quickstart's photos and mix, in smaller crops; every term has a gradient, so that direct methods take part.
WORK = (
    "env.size=64", "rollout.batch=32", "engine.micro_batch=32", "evaluate.tasks=16", "evaluate.samples=2", "log.image_tasks=1",
    "placement.kind=local", "placement.ranks=1", "placement.threads=1", "engine.kind=torch", "checkpoint.every=0",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    name: str
    seed: int
    control: bool

    @property
    def run(self) -> str:
        return f"{self.name}{'-control' if self.control else ''}-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """One run, as outcome.json has it. A delta is tuned minus base at equal noise."""

    images: list[int]  # generated before each evaluation
    seconds: list[float]  # of training before it
    mix: list[float]  # its mean delta
    final: dict[str, list[float]]  # metric -> delta of each held-out crop


class Watched(Evaluation):
    """Remembers what was measured and how much CPU time lay between."""

    def __init__(self, inner: Evaluation, bases: dict[str, Measured]):
        vars(self).update(vars(inner))
        self.key = repr([(term.kind, term.weight, term.scale) for term in inner.rubric.terms])
        self.bases, self.seen, self.seconds, self.mark = bases, [], [], 0.0  # type: ignore[var-annotated]

    def probe_is_no_training(self, crew: Crew) -> None:
        """The speed probe lies between the first evaluation and the first iteration."""
        probe = crew.probe

        def probed(*args: Any) -> Any:
            reports = probe(*args)
            self.mark = time.process_time()
            return reports

        crew.probe = probed  # type: ignore[method-assign]

    def measure(self, crew: Crew, which: str) -> Measured:
        between = time.process_time() - self.mark if self.seen else 0.0
        if which == "base" and self.key in self.bases:  # the same photos, noise, weights and metrics in every run
            measured = self.bases[self.key]
        else:
            measured = super().measure(crew, which)
        if which == "base":
            self.bases[self.key] = measured
        self.seen.append(measured)
        self.seconds.append((self.seconds[-1] if self.seconds else 0.0) + between)
        self.mark = time.process_time()
        return measured


def execute(job: Job, options: argparse.Namespace, bases: dict[str, Measured]) -> None:
    folder = options.out / "runs" / job.run
    if (folder / "outcome.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped
    every = max(1, options.iterations // options.points)
    config = load_train_config(
        CONFIGS / f"{job.name}.yaml",
        [
            *WORK, f"run.name={job.run}", f"run.dir={options.out / 'runs'}", f"run.seed={job.seed}", f"env.seed={job.seed}",
            f"run.steps={options.iterations}", f"evaluate.every={every}", f"credit.shuffle={str(job.control).lower()}",
            *options.set,
        ],
    )  # fmt: skip
    env = check_parts(config)
    opened = open_run(config.run, config)
    run = build_run(config, opened, env)
    run.evaluation = watched = Watched(run.evaluation, bases)
    watched.probe_is_no_training(run.crew)
    try:
        train(run)
    finally:
        run.crew.close()
        opened.close()
    base, *tuned = watched.seen
    last = tuned[-1]
    final = {name: (last.values[name] - base.values[name]).nanmean(1).tolist() for name in COLUMNS}
    mix = [0.0] + [compare(base, measured, watched.rubric)["mix"].delta for measured in tuned]
    steps = [0, *range(every, options.iterations, every), options.iterations]
    outcome = Outcome([images_trained(config, step) for step in steps], watched.seconds, mix, final)
    assert len(steps) == len(mix)
    write_json_atomic(folder / "outcome.json", vars(outcome))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"{job.run}: mix {mix[-1]:+.3f}, {watched.seconds[-1]:.0f} s", flush=True)


def read(job: Job, out: Path) -> Outcome | None:
    file = out / "runs" / job.run / "outcome.json"
    return Outcome(**json.loads(file.read_text())) if file.is_file() else None


def over_seeds(values: Sequence[float], digits: int = 3) -> str:
    """Mean over seeds with its 95 % Student interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def advantage(pairs: Sequence[tuple[Outcome, Outcome]]) -> str:
    """Of the true runs over their controls: mean difference of the mix and its interval over held-out crops."""
    if not pairs:
        return ""
    gaps = np.array([np.subtract(true.final["mix"], control.final["mix"]) for true, control in pairs])
    found = bootstrap_ci(gaps.T)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def share_of_yardstick(curves: Sequence[Outcome], yardstick: Sequence[Outcome]) -> str:
    """Time to the held-out mix that the yardstick ends with, over its whole time: of the mean curves, straight between points."""
    if not yardstick:
        return ""
    goal = statistics.fmean(c.mix[-1] for c in yardstick)
    whole = statistics.fmean(c.seconds[-1] for c in yardstick)
    seconds = [statistics.fmean(column) for column in zip(*(c.seconds for c in curves), strict=True)]
    mix = [statistics.fmean(column) for column in zip(*(c.mix for c in curves), strict=True)]
    for (s, m), (s_next, m_next) in pairwise(zip(seconds, mix, strict=True)):
        if m_next >= goal > m:
            return f"{(s + (s_next - s) * (goal - m) / (m_next - m)) / whole:.2f}"
    return "0" if mix[0] >= goal else "not reached"


def table(found: dict[str, list[Outcome]], controls: dict[str, list[tuple[Outcome, Outcome]]], iterations: int) -> str:
    head = [
        "algorithm",
        "seeds",
        *COLUMNS,
        "control's mix",
        "mix above its control",
        "s an iteration",
        "time to ddpo's end",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, runs in sorted(found.items(), key=lambda item: -statistics.fmean(run.mix[-1] for run in item[1])):
        deltas = [
            over_seeds([statistics.fmean(run.final[column]) for run in runs], DIGITS.get(column, 3))
            for column in COLUMNS
        ]
        pairs = controls.get(name, [])
        pace = statistics.fmean(run.seconds[-1] for run in runs) / iterations
        lines.append(
            f"| `{name}` | {len(runs)} | {' | '.join(deltas)} | {over_seeds([c.mix[-1] for _, c in pairs]) if pairs else ''} | "
            f"{advantage(pairs)} | {pace:.1f} | {share_of_yardstick(runs, found.get(YARDSTICK, []))} |"
        )
    return "\n".join(lines)


def plot(found: dict[str, list[Outcome]], axis: str, out: Path) -> None:
    """Mean held-out mix over seeds; the band is their range."""
    figure, panel = plt.subplots(figsize=(7, 4.5))
    colours = plt.get_cmap("tab20")
    for index, (name, runs) in enumerate(sorted(found.items())):
        x = [statistics.fmean(values) for values in zip(*(getattr(run, axis) for run in runs), strict=True)]
        columns = list(zip(*(run.mix for run in runs), strict=True))
        panel.plot(x, [statistics.fmean(column) for column in columns], label=name, color=colours(index), lw=1.6)
        panel.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colours(index), alpha=0.12)
    panel.axhline(0, color="grey", lw=0.6)
    panel.set_xlabel({"images": "images generated", "seconds": "CPU seconds of training, one thread"}[axis])
    panel.set_ylabel("held-out mix, against the base")
    panel.legend(fontsize=7, ncols=2)
    panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / f"{axis}.png", dpi=110)
    plt.close(figure)


def report(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    found: dict[str, list[Outcome]] = {}
    controls: dict[str, list[tuple[Outcome, Outcome]]] = {}
    for job in jobs:
        outcome = read(job, options.out)
        if outcome is None:
            continue
        if not job.control:
            found.setdefault(job.name, []).append(outcome)
        elif (true := read(Job(job.name, job.seed, False), options.out)) is not None:
            controls.setdefault(job.name, []).append((true, outcome))
    if not found:
        raise SystemExit(f"error: no run finished in {options.out}")
    (options.out / "table.md").write_text(text := table(found, controls, options.iterations) + "\n")
    for axis in ("images", "seconds"):
        plot(found, axis, options.out)
    print(text + f"\n{options.out}/table.md, images.png, seconds.png")
    if options.docs:
        publish(text, options.out, DOCS)


def publish(text: str, out: Path, docs: Path) -> None:
    """The table between its marks in algorithms.md, the plots beside the other pictures."""
    page = docs / "algorithms.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}{text}\n{END}{after}")
    for axis in ("images", "seconds"):
        shutil.copy(out / f"{axis}.png", docs / "img" / f"bench_{axis}.png")


def main() -> None:
    names = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--controls", type=int, default=1, help="seeds that also run with shuffled rewards")
    parser.add_argument("--iterations", type=int, default=10, help="of 64 images")
    parser.add_argument("--points", type=int, default=3, help="evaluations while training")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="for every run, e.g. another size or mix"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench_algorithms"))
    parser.add_argument("--docs", action="store_true", help="also into docs/algorithms.md and docs/img")
    parser.add_argument("--report", action="store_true", help="only the table and the plots of what is there")
    options: Any = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no config for {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    jobs = [
        Job(name, seed, control)
        for seed in range(options.seeds)
        for control in (False, True)
        if not control or seed < options.controls
        for name in options.names or names
    ]
    (options.out / "runs").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bases: dict[str, Measured] = {}
    for job in [] if options.report else jobs:
        execute(job, options, bases)
    report(jobs, options)


if __name__ == "__main__":
    main()
