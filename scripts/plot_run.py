"""Curves of a run's metrics.jsonl as one picture, for model cards and docs.

python scripts/plot_run.py runs/finetune_embedded curve.png train/flow train/mean_psnr eval/psnr_rgb/mean_of_samples
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rlrestore.reporting.log import read_metrics


def stages(runs: list[Path]) -> list[dict]:
    """The rows of all runs, the steps of each counted on from the last one's."""
    rows: list[dict] = []
    for run in runs:
        first = max((row["step"] for row in rows), default=0)
        rows += [{**row, "step": row["step"] + first} for row in read_metrics(run / "metrics.jsonl")]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="a run directory; several joined by commas are stages, whose steps are counted on")
    parser.add_argument("out", type=Path, help="picture to write (.png or .svg)")
    parser.add_argument("tags", nargs="+", help="metrics, one panel each; several with + share a panel: a+b")
    options = parser.parse_args()
    rows = stages([Path(run) for run in options.runs.split(",")])
    figure, axes = plt.subplots(1, len(options.tags), figsize=(4.2 * len(options.tags), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], options.tags, strict=True):
        for tag in panel.split("+"):
            points = [(row["step"], row[tag]) for row in rows if tag in row]
            if not points:
                raise SystemExit(f"error: {tag} is not in {options.runs}")
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, lw=0.6 if len(points) > 200 else 1.5, label=tag)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)
    print(options.out)


if __name__ == "__main__":
    main()
