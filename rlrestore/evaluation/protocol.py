"""A test protocol: LQ and some restorers side by side on whole test sets, every metric with its colour space and crop.

In: photos of an index (`envs.index`), restorers by column name, metrics. Out: a `SetResult` a set, and its report. Restorers see
the same photos and the same noise; intervals are over photos. Sets with generated, captured and no references are never averaged
together: each set has a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image
from torch import Tensor

from envs.degradations.jpeg import from_uint8_hwc
from envs.images import decode_rgb
from envs.index import Index
from envs.sources.blobs import shown
from envs.sources.rows import Row, primary_type
from envs.types import Restoration, Task
from rewards.base import Reward
from rewards.rubric import TermConfig
from rlrestore.evaluation.statistics import Interval, bootstrap_ci

LQ = "lq"
COLOURS = {"_rgb": "mean of R, G, B", "_y": "Y of YCbCr (BT.601)", "_ycbcr": "Y of YCbCr (BT.601)", "_yiq": "Y of YIQ"}
NETWORK_INPUT = "RGB"  # of metrics whose name says nothing
MAX_DIFFERENCE_PX = 32  # of LQ and GT: cut to what both have (a model's padding); beyond it the pair is refused


@dataclass
class ProtocolSection:
    name: str = MISSING
    run: str = ""  # folder of a run: its start and its newest weights become the columns `base` and `tuned`
    dir: str = ""  # where the report goes; "": RUN/evaluations, or `evaluations`
    overwrite: bool = False
    photos: int = 0  # of each set, types taking turns; 0: all
    crop: int = 0  # px, centred; 0: whole photos
    samples: int = 1  # noise draws a photo
    steps: int = 8
    tile: int = 256  # px, of photos that are larger
    overlap: int = 64
    seed: int = 0
    grid: int = 6  # photos of each set that are shown
    skip_missing: bool = (
        False  # leave out metrics whose weights are not there, and say so, instead of refusing to begin
    )


@dataclass
class SetSection:
    source: str = MISSING  # as env.kind=manifest reads it
    root: str | None = None
    licence: str = ""  # told in the report


@dataclass
class ProtocolConfig:
    protocol: ProtocolSection
    sets: dict[str, SetSection] = field(default_factory=dict)
    restorers: dict[str, str] = field(
        default_factory=dict
    )  # column -> "packaged", a run, a checkpoint or a folder with weights
    rewards: dict[str, TermConfig] = field(default_factory=dict)  # the metrics


Restore = Callable[[np.ndarray, int], np.ndarray]  # ([H, W, 3] uint8, seed) -> the same shape


@dataclass
class SetResult:
    """One set measured. Arrays are [photos, draws] (LQ: [photos, 1]), NaN where a metric failed."""

    ids: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width)
    values: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)  # (metric, column) -> ...
    failures: list[str] = field(default_factory=list)  # rows that could not be read, with the reason
    shown: list[list[Tensor]] = field(default_factory=list)  # LQ, restorers, GT if there is one
    has_gt: bool = False

    def array(self, metric: str, column: str) -> np.ndarray:
        return np.array(self.values[metric, column], dtype=np.float64)


def rows_of(index: Index, photos: int) -> list[Row]:
    """Rows of the test split (else val, else all), types taking turns, at most `photos` of them (0: all)."""
    splits = set(index.column("split"))
    wanted = "test" if "test" in splits else "val" if "val" in splits else ""
    rows = [row for row in index if not wanted or row.split == wanted]
    turns: dict[str, int] = {}
    keyed = []
    for number, row in enumerate(rows):
        label = primary_type(row.types)
        turns[label] = turns.get(label, 0) + 1
        keyed.append((turns[label], label, number))
    chosen = sorted(number for *_, number in sorted(keyed)[: photos or None])
    return [rows[number] for number in chosen]


def read_task(index: Index, row: Row, crop: int) -> Task:
    """The photo as it is evaluated; ValueError if it cannot be. An LQ that is smaller by an integer is enlarged (bicubic)."""
    lq = decode_rgb(index.blobs.read(row.lq), shown(row.lq))
    gt = decode_rgb(index.blobs.read(row.gt), shown(row.gt)) if row.gt else None
    if gt is not None:
        scale = round(gt.shape[0] / lq.shape[0])
        if scale > 1 and gt.shape[:2] == (scale * lq.shape[0], scale * lq.shape[1]):
            lq = np.asarray(Image.fromarray(lq).resize(gt.shape[1::-1], Image.Resampling.BICUBIC))
        difference = max(abs(a - b) for a, b in zip(lq.shape[:2], gt.shape[:2], strict=True))
        if difference > MAX_DIFFERENCE_PX:
            sizes = f"{lq.shape[1]}x{lq.shape[0]} and {gt.shape[1]}x{gt.shape[0]}"
            raise ValueError(f"{row.id}: LQ and GT are {sizes}: resampling one of them would give a meaningless score")
        height, width = (min(a, b) for a, b in zip(lq.shape[:2], gt.shape[:2], strict=True))
        lq, gt = lq[:height, :width], gt[:height, :width]
    views = [view if view is None or not crop else _centre(view, crop) for view in (lq, gt)]
    assert views[0] is not None
    reference = None if views[1] is None else from_uint8_hwc(np.ascontiguousarray(views[1]))
    return Task(
        row.id, from_uint8_hwc(np.ascontiguousarray(views[0])), tuple(row.types.split("|")), row.prompt, reference
    )


def _centre(pixels: np.ndarray, crop: int) -> np.ndarray:
    height, width = (min(crop, side) for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def measure_set(
    index: Index, section: ProtocolSection, restorers: Mapping[str, Restore], metrics: Mapping[str, Reward],
    progress: Callable[[], object] = lambda: None,
) -> SetResult:  # fmt: skip
    """All photos of a set through all restorers. Metrics that need a reference are left out where a photo has none."""
    result = SetResult()
    rows = rows_of(index, section.photos)
    result.has_gt = all(row.gt for row in rows)
    usable = {name: metric for name, metric in metrics.items() if result.has_gt or "gt" not in metric.spec.needs}
    for row in rows:
        try:
            task = read_task(index, row, section.crop)
        except ValueError as error:
            result.failures.append(str(error))
            progress()
            continue
        pixels = (task.lq.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        images = {LQ: [task.lq]}
        for column, restore in restorers.items():
            images[column] = [from_uint8_hwc(restore(pixels, section.seed + draw)) for draw in range(section.samples)]
        for name, metric in usable.items():
            for column, draws in images.items():
                score = metric.score([Restoration(task, image) for image in draws])
                result.values.setdefault((name, column), []).append(score.value_N.tolist())
        result.ids.append(row.id)
        result.types.append(primary_type(row.types))
        result.sizes.append((pixels.shape[0], pixels.shape[1]))
        if len(result.shown) < section.grid:
            views = [draws[0] for draws in images.values()] + ([task.gt] if task.gt is not None else [])
            result.shown.append(_zoomed(views, len(images)))
        progress()
    return result


def _zoomed(views: list[Tensor], columns: int, side: int = 256) -> list[Tensor]:
    """A square of every view, where the first and the last restorer (or the LQ and the only one) differ most."""
    height, width = views[0].shape[1:]
    side = min(side, height, width)
    change = (views[1 if columns > 2 else 0] - views[columns - 1]).abs().mean(0)[None, None]
    mean = torch.nn.functional.avg_pool2d(change, side, stride=max(1, side // 8))[0, 0]
    y, x = (int(n) * max(1, side // 8) for n in np.unravel_index(int(mean.argmax()), tuple(mean.shape)))
    return [view[:, y : y + side, x : x + side] for view in views]


# -- the report ----------------------------------------------------------------------------------------------------


def colour_of(name: str) -> str:
    """In which colour space a metric of this name is measured."""
    return next((text for suffix, text in COLOURS.items() if name.endswith(suffix)), NETWORK_INPUT)


def difference(
    result: SetResult, metric: str, column: str, against: str, rows: Sequence[int] | None = None
) -> Interval | None:
    """Mean over photos of column - against at equal noise, with its interval; None where nothing was measured."""
    delta = result.array(metric, column) - result.array(metric, against)
    chosen = delta if rows is None else delta[list(rows)]
    return bootstrap_ci(chosen) if np.isfinite(chosen).any() else None


def summary_of(result: SetResult, section: ProtocolSection, metrics: Mapping[str, Reward]) -> dict[str, Any]:
    """For result.json: means, extremes over the draws, differences with intervals, all photos and by type."""
    names = sorted({name for name, _ in result.values})
    columns = list(dict.fromkeys(column for _, column in result.values))
    by_type = {label: [n for n, own in enumerate(result.types) if own == label] for label in sorted(set(result.types))}
    summary: dict[str, Any] = {
        "photos": len(result.ids), "references": result.has_gt, "types": {label: len(own) for label, own in by_type.items()},
        "crop": crop_text(result, section), "failures": result.failures, "metrics": {},
    }  # fmt: skip
    for name in names:
        spec = metrics[name].spec
        entry: dict[str, Any] = {
            "colour": colour_of(spec.name),
            "version": spec.version,
            "higher_is_better": spec.higher_is_better,
            "columns": {},
        }
        for column in columns:
            values = result.array(name, column)
            entry["columns"][column] = {
                "mean": _finite(_mean(values)), "best": _finite(_extreme(values, spec.higher_is_better)),
                "worst": _finite(_extreme(values, not spec.higher_is_better)),
            }  # fmt: skip
        first = columns[1] if len(columns) > 1 else LQ
        entry["differences"] = {
            f"{column} - {against}": {
                "all": _plain(difference(result, name, column, against)),
                **{label: _plain(difference(result, name, column, against, own)) for label, own in by_type.items() if len(own) > 1},
            }
            for column, against in [(c, LQ) for c in columns[1:]] + [(c, first) for c in columns[2:]]
        }  # fmt: skip
        summary["metrics"][name] = entry
    return summary


def crop_text(result: SetResult, section: ProtocolSection) -> str:
    sizes = sorted({f"{width}x{height}" for height, width in result.sizes})
    few = ", ".join(sizes[:3]) + (f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")
    what = f"centre crops of at most {section.crop} px" if section.crop else "whole photos"
    return f"{what} ({few}), no border shaved"


def table_of(name: str, summary: Mapping[str, Any]) -> str:
    """Markdown: a row a metric; the last column against the first restorer, with its interval."""
    lines = [
        f"## {name}", "",
        f"{summary['photos']} photos, {'with' if summary['references'] else 'without'} references; {summary['crop']}; 8-bit RGB. "
        "Intervals: 95 %, bootstrap over photos, equal noise.", "",
    ]  # fmt: skip
    if summary["failures"]:
        lines += [f"{len(summary['failures'])} photos could not be used, e.g. {summary['failures'][0]}", ""]
    if not summary["metrics"]:
        return "\n".join(lines)
    columns = list(next(iter(summary["metrics"].values()))["columns"])
    keys = list(next(iter(summary["metrics"].values()))["differences"])
    lines += [
        "| metric | colour | " + " | ".join([*columns, *keys]) + " |",
        "|---" * (2 + len(columns) + len(keys)) + "|",
    ]
    for metric, entry in summary["metrics"].items():
        cells = [_number(entry["columns"][column]["mean"]) for column in columns]
        cells += [_interval(entry["differences"][key]["all"]) for key in keys]
        arrow = "up" if entry["higher_is_better"] else "down"
        lines.append(f"| {metric} ({arrow}) | {entry['colour']} | " + " | ".join(cells) + " |")
    if len(summary["types"]) > 1 and keys:
        lines += ["", f"`{keys[-1]}` by type:", "", "| metric | " + " | ".join(summary["types"]) + " |"]
        lines.append("|---" * (1 + len(summary["types"])) + "|")
        for metric, entry in summary["metrics"].items():
            told = entry["differences"][keys[-1]]
            lines.append(f"| {metric} | " + " | ".join(_interval(told.get(label)) for label in summary["types"]) + " |")
    return "\n".join([*lines, ""])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


def _extreme(values: np.ndarray, highest: bool) -> float:
    """Mean over photos of the best (or worst) of the draws."""
    scored = values[np.isfinite(values).any(axis=1)]
    return float((np.nanmax if highest else np.nanmin)(scored, axis=1).mean()) if len(scored) else np.nan


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {
        "mean": _finite(interval.mean),
        "low": _finite(interval.low),
        "high": _finite(interval.high),
        "n": interval.units,
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(told: Mapping[str, Any] | None) -> str:
    if told is None or told["mean"] is None:
        return ""
    bounds = "" if told["low"] is None else f" [{told['low']:+.4f}, {told['high']:+.4f}]"
    return f"{told['mean']:+.4f}{bounds}"
