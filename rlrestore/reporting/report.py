"""`report.html` of a run: one file that a person opens. It needs no network and holds what it shows.

In: a run directory (result.json, run.json, config.resolved.yaml, metrics.jsonl, panel/). What is missing is left out, not
invented. All text from the run is escaped by the template.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from rlrestore.checkpoint import read_json
from rlrestore.reporting.charts import Series, line_chart
from rlrestore.reporting.log import read_metrics
from rlrestore.reporting.maps import error_map, invention_map, moved_map
from rlrestore.reporting.panel import open_picture, read_panel
from rlrestore.reporting.pictures import from_pil, to_pil

LOSSLESS_PX = 320  # pictures with a longer side are embedded as JPEG
SLIDERS = 6
WORST = 4
PICTURE_NAMES = {"lq": "LQ", "base": "base", "tuned": "tuned", "gt": "reference"}


def write_report(run_dir: Path) -> Path:
    """RUN/report.html, replaced atomically."""
    return write_page(run_dir / "report.html", "report.html", run_context(run_dir))


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Replaced atomically."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(page_text(template, context), encoding="utf-8")
    os.replace(temporary, path)
    return path


def page_text(template: str, context: Mapping[str, Any]) -> str:
    """A template of `pages/` with everything in it escaped but `Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files("rlrestore.reporting.pages").joinpath(name).read_text("utf-8")),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "signed": signed}
    return environment.get_template(template).render(**context)


def run_context(run_dir: Path) -> dict[str, Any]:
    """All that the template shows of a run."""
    facts, result = _json(run_dir / "run.json"), _json(run_dir / "result.json")
    saved = run_dir / "config.resolved.yaml"
    config_text = saved.read_text() if saved.is_file() else ""
    config = yaml.safe_load(config_text) or {}
    metrics = run_dir / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    panel = read_panel(run_dir)
    rows = metric_rows(result.get("metrics", {}))
    return {
        "title": run_dir.name, "facts": facts, "rows": rows, "verdict": verdict(rows, result, config),
        "caveats": _caveats(panel), "alarms": alarm_lines(result.get("alarm") or {}),
        "summary": _summary(config), "config_text": config_text,
        "versions": result.get("versions") or facts.get("versions") or {}, "charts": curves(records),
        "cost": cost(result, config, records), "sliders": _sliders(run_dir, panel), "worst": _worst(run_dir, panel),
        "harm_of": _harm_of(panel),
    }  # fmt: skip


# -- the table ---------------------------------------------------------------------------------------------------------


def metric_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of result.json with a verdict each: better, worse, within noise, or unknown."""
    rows = []
    roles = {"reward": 1, "gold": 2}
    for name, row in sorted(
        metrics.items(), key=lambda item: (item[0] != "mix", roles.get(item[1]["role"], 3), item[0])
    ):
        low, high = row["ci95"]
        known = None not in (low, high, row["delta"])
        sign = 1 if row["higher_is_better"] else -1
        word = "unknown"
        if known:
            word = (
                "better"
                if min(sign * low, sign * high) > 0
                else "worse"
                if max(sign * low, sign * high) < 0
                else "within noise"
            )
        rows.append({**row, "name": name, "low": low, "high": high, "word": word})
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """One or two sentences for somebody who reads nothing else."""
    if not rows:
        return "This run has no result yet: it has not come to its end."
    mix = next((row for row in rows if row["name"] == "mix"), rows[0])
    start = f"After {result.get('images', 0):,} rollouts the held-out {mix['name']} is {mix['word']}"
    if mix["delta"] is not None:
        start += f" ({signed(mix['delta'])})"
    gold = [row for row in rows if row["role"] == "gold"]
    named = {word: [row["name"] for row in gold if row["word"] == word] for word in ("better", "worse")}
    if not gold:
        return start + ". No metric outside the mix was watched, so nobody knows whether the mix was gamed."
    parts = [f"{', '.join(names)} {word}" for word, names in named.items() if names]
    rest = len(gold) - sum(map(len, named.values()))
    parts += [f"{rest} within noise"] if rest else []
    return f"{start}. Of the metrics that were never rewarded: {'; '.join(parts)}."


def alarm_lines(alarm: Mapping[str, Any]) -> list[str]:
    """What the alarm of result.json says, a line an event."""
    lines = []
    for event in alarm.get("events") or ():
        since = f"step {event['since']}" if event["since"] else "the base"
        falls = ", ".join(f"{name} {signed(fall['delta'])}" for name, fall in event["falls"].items())
        lines.append(
            f"Step {event['step']}: since {since} the mix rose by {signed(event['mix_delta'])} while gold fell: {falls}."
        )
    return lines


def number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def signed(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.3g}"


def _caveats(panel: Mapping[str, Any] | None) -> list[str]:
    from rlrestore.evaluation.evaluate import caveats_of

    return (
        [line.removeprefix("note: ") for line in caveats_of([task["photo"] for task in panel["tasks"]])]
        if panel
        else []
    )


# -- curves and cost ---------------------------------------------------------------------------------------------------


def curves(records: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """[{title, charts: [{title, svg}]}] from metrics.jsonl."""
    tags = sorted({tag for record in records for tag in record} - {"step", "time"})
    rewards = [tag.split("/")[1] for tag in tags if tag.startswith("reward/") and tag.endswith("/mean")]
    rewards.sort(key=lambda name: name != "mix")
    training = [(name, [_series(records, f"reward/{name}/mean", name, band=True)]) for name in rewards]
    held_out = [(tag.split("/")[2], [_series(records, tag, tag.split("/")[2])]) for tag in tags
                if tag.startswith("eval/") and tag.endswith("/delta")]  # fmt: skip
    policy = [(tag, [_series(records, tag, tag)]) for tag in tags if tag.startswith(("policy/", "train/", "x0/"))]
    seconds = [
        _series(records, tag, tag[5:-2]) for tag in tags if tag.startswith("time/") and tag != "time/iteration_s"
    ]
    groups = [
        ("Rewards of the rollouts", "mean of an iteration's rollouts on training photos, p10 to p90", training),
        ("Held-out, tuned minus base", "equal photos, equal noise", held_out),
        ("Optimisation", "", policy),
        ("Time", "seconds an iteration by stage", [("stages", seconds)]),
    ]
    return [
        {
            "title": title,
            "note": note,
            "charts": [{"title": name, "svg": svg} for name, lines in charts if (svg := line_chart(lines))],
        }
        for title, note, charts in groups
        if any(len(line.y) > 1 for _, lines in charts for line in lines)
    ]


def _series(records: Sequence[Mapping[str, float]], tag: str, name: str, band: bool = False) -> Series:
    known = [record for record in records if tag in record]
    edges = [tag.removesuffix("mean") + edge for edge in ("p10", "p90")] if band else []
    low, high = ([record.get(edge, record[tag]) for record in known] for edge in edges) if band else ((), ())
    return Series(name, [record["step"] for record in known], [record[tag] for record in known], low, high)


def cost(
    result: Mapping[str, Any], config: Mapping[str, Any], records: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """What the run took: wall time, by stage, device hours, speed."""
    if not result:
        return {}
    placement = config.get("placement") or {}
    devices = placement.get("ranks", 1) + (
        placement.get("rollout_actors", 0) if placement.get("kind") == "separate" else 0
    )
    stages = {name: seconds for name, seconds in (result.get("stages_s") or {}).items() if seconds > 0}
    total = sum(stages.values()) or 1.0
    speed = [record["throughput/images_per_s"] for record in records if "throughput/images_per_s" in record]
    return {
        "wall": _duration(result.get("wall_s") or 0.0), "images": result.get("images", 0),
        "unit": "GPU" if placement.get("gpus") else "process", "hours": devices * (result.get("wall_s") or 0.0) / 3600,
        "devices": devices, "efficiency": result.get("efficiency"), "speed": float(np.median(speed)) if speed else None,
        "stages": [(name, seconds, 100 * seconds / total) for name, seconds in stages.items()],
    }  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _summary(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, in the words of the config."""
    if not config or "rewards" not in config:
        return []
    rollout, engine, placement = config["rollout"], config["engine"], config["placement"]
    terms = ", ".join(f"{name} × {term.get('weight', 1):g}" for name, term in config["rewards"].items())
    return [
        ("algorithm", config["algorithm"]["kind"]), ("restorer", config["restorer"]["kind"]), ("photos", config["env"]["kind"]),
        ("rewards", terms), ("watched", ", ".join(config["evaluate"].get("gold") or {}) or "nothing"),
        ("iterations", f"{config['run']['steps']} of {rollout['groups']} photos × {rollout['samples']} samples"),
        ("optimiser", f"{engine['kind']}, lr {engine['lr']:g}, {engine['precision']}"),
        ("placement", f"{placement['kind']}, {placement['ranks']} rank(s)"), ("seed", str(config["run"]["seed"])),
    ]  # fmt: skip


# -- pictures ----------------------------------------------------------------------------------------------------------


def data_uri(pixels_HW3: np.ndarray) -> str:
    """PNG, or JPEG of quality 92 for what would make the file large."""
    image, stream = Image.fromarray(pixels_HW3), io.BytesIO()
    lossless = max(image.size) <= LOSSLESS_PX
    if lossless:
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "JPEG", quality=92)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _sliders(run_dir: Path, panel: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The env's first tasks, not the best ones."""
    if panel is None:
        return []
    first = sorted((task for task in panel["tasks"] if task["pictures"]), key=lambda task: task["index"])[:SLIDERS]
    return [_compare(run_dir, panel, task) for task in first]


def _worst(run_dir: Path, panel: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The tasks that got worse most, worst first, with maps; tasks that did not get worse are not shown."""
    if panel is None:
        return []
    shown = [task for task in panel["tasks"] if task["pictures"] and task["harm"] > 0][:WORST]
    return [{**_compare(run_dir, panel, task), "maps": _maps(run_dir, task)} for task in shown]


def _compare(run_dir: Path, panel: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    pictures = {name: open_picture(run_dir, file) for name, file in task["pictures"].items()}
    height, width = next(iter(pictures.values())).shape[:2]
    moved = []
    for name, kind in panel["metrics"].items():
        pair = task["values"][name]
        both = [(b, t) for b, t in zip(pair["base"], pair["tuned"], strict=True) if None not in (b, t)]
        if both:
            before, after = np.mean(both, axis=0)
            better = (after > before) == kind["higher_is_better"]
            moved.append({"name": name, "role": kind["role"], "base": float(before), "tuned": float(after),
                          "word": "same" if after == before else "better" if better else "worse"})  # fmt: skip
    return {
        "id": task["id"], "name": task["photo"].rsplit("/", 1)[-1], "harm": task["harm"], "moved": moved,
        "pictures": [(name, PICTURE_NAMES[name], Markup(data_uri(pixels))) for name, pixels in pictures.items()],
        "width": width, "height": height, "small": max(height, width) <= LOSSLESS_PX,
    }  # fmt: skip


def _maps(run_dir: Path, task: Mapping[str, Any]) -> list[tuple[str, str]]:
    picture = {name: from_pil(Image.fromarray(open_picture(run_dir, file))) for name, file in task["pictures"].items()}
    base, tuned = picture["base"], picture["tuned"]
    maps = [("moved: where tuned differs from base", moved_map(base, tuned)),
            ("detail that the LQ does not explain: red more than base", invention_map(base, tuned, picture["lq"]))]  # fmt: skip
    if "gt" in picture:
        maps.insert(
            1, ("error: red farther from the reference than base, blue closer", error_map(base, tuned, picture["gt"]))
        )
    return [(title, Markup(data_uri(np.asarray(to_pil(image))))) for title, image in maps]


def _harm_of(panel: Mapping[str, Any] | None) -> str:
    if panel is None:
        return ""
    gold = [name for name, kind in panel["metrics"].items() if kind["role"] == "gold"]
    return ", ".join(gold) or "all metrics"


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
