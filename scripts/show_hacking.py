"""The pictures of docs/reward_hacking.md: several runs of one task side by side, as curves and as samples at equal noise.

python scripts/show_hacking.py docs/img/hacking alone=runs/hack_alone gates=runs/hack_gates constraint=runs/hack_constraint
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from rlrestore.reporting.log import read_metrics
from rlrestore.reporting.pictures import GAP_PX, from_pil, grid, to_pil

ZOOM = 2
PANELS = {
    "NIQE, rewarded (lower is better)": "eval/reward/niqe/tuned",
    "PSNR, gold, dB": "eval/gold/psnr_rgb/tuned",
    "SSIM, gold": "eval/gold/ssim_rgb/tuned",
    "may look invented, share": "eval/held/judge_hallucination/measured",
    "judge's quality": "eval/{}/judge/tuned",
    "multiplier of the judge's quality": "constraint/lambda/judge",
}


def points(rows: list[dict[str, float]], tag: str) -> tuple[list[float], list[float]]:
    """Steps and values of the one tag that matches; {} is any name."""
    pattern = re.compile(re.escape(tag).replace(re.escape("{}"), "[^/]+"))
    found = [(row["step"], value) for row in rows for name, value in row.items() if pattern.fullmatch(name)]
    return [step for step, _ in found], [value for _, value in found]


def curves(runs: dict[str, Path], out: Path) -> None:
    logs = {label: read_metrics(run / "metrics.jsonl") for label, run in runs.items()}
    panels = {title: tag for title, tag in PANELS.items() if any(points(rows, tag)[0] for rows in logs.values())}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.9), squeeze=False)
    for axis, (title, tag) in zip(axes[0], panels.items(), strict=True):
        for label, rows in logs.items():
            axis.plot(*points(rows, tag), marker=".", label=label)
            for step in [row["step"] for row in rows if row.get("alarm/ringing")]:
                steps, values = points(rows, tag)
                if step in steps:
                    axis.plot(step, values[steps.index(step)], "rx", markersize=8)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("iterations; a red cross is the alarm", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def cells(run: Path, columns: int = 4) -> tuple[list[list[Tensor]], int]:
    """Rows of a run's last sample grid, each [LQ, base, tuned, GT], cut out by the geometry of `pictures.grid`; and the step."""
    size = yaml.safe_load((run / "config.resolved.yaml").read_text())["env"]["size"]
    path = max((run / "samples").glob("step_*/eval_lq_base_tuned_gt.png"))
    picture = Image.open(path)
    rows = (picture.height + GAP_PX) // (size + GAP_PX)
    left = [picture.width - size - (columns - 1 - c) * (size + GAP_PX) for c in range(columns)]
    top = [picture.height - size - (rows - 1 - r) * (size + GAP_PX) for r in range(rows)]
    cut = [[from_pil(picture.crop((x, y, x + size, y + size))) for x in left] for y in top]
    return cut, int(path.parent.name.removeprefix("step_"))


def samples(runs: dict[str, Path], out: Path) -> None:
    by_run = {label: cells(run)[0] for label, run in runs.items()}
    first = next(iter(by_run.values()))
    rows = [
        [first[r][0], first[r][1], *(by_run[label][r][2] for label in runs), first[r][3]] for r in range(len(first))
    ]
    big = [[interpolate(cell[None], scale_factor=ZOOM)[0] for cell in row] for row in rows]
    to_pil(grid(big, ["LQ", "base", *runs, "GT"])).quantize(255).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="start of the two file names: OUT_curves.png and OUT_samples.png")
    parser.add_argument("runs", nargs="+", help="LABEL=RUN_FOLDER")
    options = parser.parse_args()
    runs = {label: Path(folder) for label, _, folder in (text.partition("=") for text in options.runs)}
    curves(runs, Path(f"{options.out}_curves.png"))
    samples(runs, Path(f"{options.out}_samples.png"))


if __name__ == "__main__":
    main()
