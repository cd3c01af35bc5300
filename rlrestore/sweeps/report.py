"""The report of a sweep: which mixes are worth having, what each weight did, and the config of the one to take.

A point's gain in a metric is tuned minus base on held-out tasks, turned so that higher is better, the mean over the runs of its
seeds; the interval is a bootstrap over tasks. A point is on the front if no other one has both more quality and more fidelity; its
share says in how many of the bootstrap's draws (the same for all points) that was so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup
from scipy import stats

from rewards.rubric import Rubric
from rlrestore.build import load_train_config
from rlrestore.config.files import read_yaml
from rlrestore.evaluation.statistics import bootstrap_ci
from rlrestore.reporting.charts import Dot, bars, legend, parallel, scatter
from rlrestore.reporting.panel import deltas, open_picture, read_panel
from rlrestore.reporting.report import data_uri, write_page
from rlrestore.sweeps.sweep import Sweep, Trial, describe, shown

DRAWS = 1000
PHOTOS, SHOWN = 5, 4  # tasks and points in the table of pictures
AXES = 7  # most features in the parallel coordinates
BOOKKEEPING = ("run.name", "run.dir")


@dataclass(frozen=True)
class Outcome:
    """One point with at least one finished trial."""

    point: str
    sets: dict[str, Any]
    trials: tuple[Trial, ...]  # finished
    gains: dict[str, np.ndarray]  # metric -> [tasks, seeds], higher is better
    shares: dict[str, float]  # reward term -> share of the mix

    def mean(self, metric: str) -> float:
        return float(np.nanmean(self.gains[metric]))

    def interval(self, metric: str) -> tuple[float, float]:
        found = bootstrap_ci(self.gains[metric])
        return found.low, found.high


def write_sweep_report(sweep: Sweep) -> tuple[Path, Path | None]:
    """(SWEEP/report.html, SWEEP/chosen.yaml or None if nothing has finished)."""
    outcomes = [outcome for trials in sweep.points.values() if (outcome := _outcome(sweep, trials))]
    chosen = choose(outcomes, sweep.config.quality, sweep.config.fidelity)
    config = None
    if chosen is not None:
        config = sweep.folder / "chosen.yaml"
        config.write_text(chosen_config(sweep, chosen))
    page = write_page(sweep.folder / "report.html", "sweep.html", context(sweep, outcomes, chosen))
    return page, config


def _outcome(sweep: Sweep, trials: Sequence[Trial]) -> Outcome | None:
    done = tuple(trial for trial in trials if trial.state() == "done" and read_panel(trial.folder))
    if not done:
        return None
    panels = [panel for trial in done if (panel := read_panel(trial.folder))]
    config = load_train_config(sweep.train, trials[0].overrides)
    rubric = Rubric(list(config.rewards.values()), vars(config.blocks))
    gains = {
        name: np.stack([deltas(panel, name)[0] for panel in panels], axis=1) * (1 if kind["higher_is_better"] else -1)
        for name, kind in panels[0]["metrics"].items()
        if name != "mix"  # every point has another one
    }
    shares = dict(zip(rubric.names, rubric.weight_R.tolist(), strict=True))
    return Outcome(trials[0].point, trials[0].sets, done, gains, shares)


# -- which to take -----------------------------------------------------------------------------------------------------


def on_front(gain_P2: np.ndarray) -> np.ndarray:
    """[P] whether no other point is at least as good in both columns and better in one."""
    below, above = gain_P2[:, None], gain_P2[None]
    beaten_PP = np.all(below <= above, axis=2) & np.any(below < above, axis=2)
    return ~np.any(beaten_PP, axis=1)


def front_shares(outcomes: Sequence[Outcome], quality: str, fidelity: str, draws: int = DRAWS) -> np.ndarray:
    """[P] share of the bootstrap draws over tasks in which each point is on the front."""
    gains_P2T = np.stack([[np.nanmean(o.gains[axis], axis=1) for axis in (fidelity, quality)] for o in outcomes])
    generator = np.random.default_rng(0)
    tasks = gains_P2T.shape[2]
    count = np.zeros(len(outcomes))
    for _ in range(draws):
        count += on_front(np.nanmean(gains_P2T[:, :, generator.integers(0, tasks, tasks)], axis=2))
    return count / draws


def choose(outcomes: Sequence[Outcome], quality: str, fidelity: str) -> Outcome | None:
    """The most quality among the points whose fidelity is not worse than the base's beyond noise; if all are, the most faithful."""
    if not outcomes:
        return None
    faithful = [outcome for outcome in outcomes if outcome.interval(fidelity)[1] >= 0]
    if faithful:
        return max(faithful, key=lambda outcome: outcome.mean(quality))
    return max(outcomes, key=lambda outcome: outcome.mean(fidelity))


def chosen_config(sweep: Sweep, chosen: Outcome) -> str:
    """A train config that stands alone, with the seed of the first trial."""
    overrides = [text for text in chosen.trials[0].overrides if text.partition("=")[0] not in BOOKKEEPING]
    data = read_yaml(sweep.train, overrides)
    data["run"] = {**data.get("run", {}), "name": f"{sweep.config.name}_chosen"}
    header = (
        f"# The point that the sweep {sweep.config.name} chose: {describe(chosen.sets)}.\n"
        f"# Most {sweep.config.quality} among those not worse in {sweep.config.fidelity} than the base.  rlrestore train chosen.yaml\n"
    )
    return header + yaml.safe_dump(data, sort_keys=False)


# -- what the weights did ----------------------------------------------------------------------------------------------


def features(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Numbers that differ between the points: each reward's share of the mix, and the space's numeric keys that are no shares."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.shares))
    found = {f"share of {name}": [outcome.shares.get(name, 0.0) for outcome in outcomes] for name in names}
    for key in outcomes[0].sets:
        values = [outcome.sets[key] for outcome in outcomes]
        if not key.startswith(("mixes", "blocks.", "rewards.")) and all(isinstance(v, int | float) for v in values):
            found[key] = [float(value) for value in values]
    return {name: values for name, values in found.items() if len(set(np.round(values, 9))) > 1}


def importance(values: Sequence[float], gain: Sequence[float], draws: int = DRAWS) -> tuple[float, float, float]:
    """Spearman's rank correlation over points and its percentile bootstrap interval; NaN bounds below 5 points."""
    rho = float(stats.spearmanr(values, gain).statistic)
    if len(values) < 5:
        return rho, math.nan, math.nan
    generator, x, y = np.random.default_rng(0), np.asarray(values), np.asarray(gain)
    drawn = []
    for _ in range(draws):
        rows = generator.integers(0, len(x), len(x))
        if np.ptp(x[rows]) > 0 and np.ptp(y[rows]) > 0:
            drawn.append(stats.spearmanr(x[rows], y[rows]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return rho, float(low), float(high)


# -- the page ----------------------------------------------------------------------------------------------------------


def context(sweep: Sweep, outcomes: Sequence[Outcome], chosen: Outcome | None) -> dict[str, Any]:
    quality, fidelity = sweep.config.quality, sweep.config.fidelity
    states = [trial.state() for trial in sweep.trials]
    base: dict[str, Any] = {
        "title": sweep.config.name, "quality": quality, "fidelity": fidelity, "method": sweep.config.method,
        "points": len(sweep.points), "seeds": len(sweep.config.seeds), "done": states.count("done"), "trials": len(states),
        "unfinished": [(t.name, s) for t, s in zip(sweep.trials, states, strict=True) if s != "done"],
        "chosen": None, "rows": [], "scatter": "", "legend": "", "parallel": "", "importance": [], "photos": [], "columns": [],
        "metrics": [], "chosen_text": "", "rewarded": [], "cost_h": _hours(outcomes), "tasks": 0, "photo_count": 0,
    }  # fmt: skip
    if not outcomes or chosen is None:
        return base
    gain = np.array([[o.mean(fidelity), o.mean(quality)] for o in outcomes])
    front, share = on_front(gain), front_shares(outcomes, quality, fidelity)
    kinds = list(dict.fromkeys(_family(outcome.sets) for outcome in outcomes))
    dots = [
        Dot(
            describe(o.sets),
            x,
            y,
            o.interval(fidelity),
            o.interval(quality),
            kinds.index(_family(o.sets)),
            bool(f),
            o is chosen,
        )
        for o, (x, y), f in zip(outcomes, gain, front, strict=True)
    ]
    line = sorted((float(x), float(y)) for (x, y), f in zip(gain, front, strict=True) if f)
    panel = read_panel(outcomes[0].trials[0].folder) or {"tasks": []}
    metrics = [quality, fidelity, *(name for name in outcomes[0].gains if name not in (quality, fidelity)
                                    and all(name in o.gains for o in outcomes))]  # fmt: skip
    return base | {
        "chosen": describe(chosen.sets), "metrics": metrics, "tasks": len(panel["tasks"]),
        "photo_count": len({task["photo"] for task in panel["tasks"]}),
        "rows": [_row(o, metrics, bool(f), s, o is chosen) for o, f, s in zip(outcomes, front, share, strict=True)],
        "scatter": scatter(dots, f"{fidelity}, gain over the base", f"{quality}, gain over the base", line),
        "legend": legend(kinds), "parallel": _parallel(outcomes, gain, quality, fidelity),
        "importance": _importance(outcomes, gain, quality, fidelity),
        "photos": _photos(outcomes, front, chosen, quality), "chosen_text": chosen_config(sweep, chosen),
        "columns": ["LQ", "base", *(describe(o.sets) for o in _shown(outcomes, front, chosen, quality)), "reference"],
        "rewarded": [axis for axis in (quality, fidelity) if any(axis in o.shares for o in outcomes)],
    }  # fmt: skip


def _family(sets: Mapping[str, Any]) -> str:
    """What colours a dot: the words of a point, without its numbers."""
    words = [shown(value) for value in sets.values() if not isinstance(value, int | float)]
    return ", ".join(words) or "all"


def _row(outcome: Outcome, metrics: Sequence[str], front: bool, share: float, chosen: bool) -> dict[str, Any]:
    cells = []
    for metric in metrics:
        low, high = outcome.interval(metric)
        word = "better" if low > 0 else "worse" if high < 0 else ""
        seeds = np.nanmean(outcome.gains[metric], axis=0).tolist()
        cells.append({"mean": outcome.mean(metric), "low": low, "high": high, "word": word, "seeds": seeds})
    return {"label": describe(outcome.sets), "runs": len(outcome.trials), "cells": cells, "front": front, "share": share,
            "chosen": chosen, "names": ", ".join(trial.name for trial in outcome.trials)}  # fmt: skip


def _parallel(outcomes: Sequence[Outcome], gain: np.ndarray, quality: str, fidelity: str) -> Markup:
    columns = dict(list(features(outcomes).items())[:AXES])
    rows = [
        [*(values[i] for values in columns.values()), float(gain[i, 1]), float(gain[i, 0])]
        for i in range(len(outcomes))
    ]
    span = float(np.ptp(gain[:, 0])) or 1.0
    shade = ((gain[:, 0] - gain[:, 0].min()) / span).tolist()
    axes = [*(name.removeprefix("share of ") for name in columns), f"{quality} gain", f"{fidelity} gain"]
    return parallel(axes, rows, [describe(outcome.sets) for outcome in outcomes], shade)


def _importance(outcomes: Sequence[Outcome], gain: np.ndarray, quality: str, fidelity: str) -> list[tuple[str, Markup]]:
    if len(outcomes) < 3:
        return []
    found = features(outcomes)
    return [
        (axis, bars([(name, *importance(values, gain[:, column].tolist())) for name, values in found.items()]))
        for axis, column in ((quality, 1), (fidelity, 0))
        if np.ptp(gain[:, column]) > 0
    ]


def _shown(outcomes: Sequence[Outcome], front: np.ndarray, chosen: Outcome, quality: str) -> list[Outcome]:
    """The chosen one and the ends and middle of the front, by quality."""
    best = sorted((o for o, f in zip(outcomes, front, strict=True) if f), key=lambda o: o.mean(quality))
    picked = [best[round(i)] for i in np.linspace(0, len(best) - 1, min(SHOWN, len(best)))]
    return list({id(o): o for o in [chosen, *picked]}.values())[: SHOWN + 1]


def _photos(outcomes: Sequence[Outcome], front: np.ndarray, chosen: Outcome, quality: str) -> list[dict[str, Any]]:
    shown_points = _shown(outcomes, front, chosen, quality)
    panels = [(o.trials[0].folder, read_panel(o.trials[0].folder)) for o in shown_points]
    tasks = [{task["index"]: task for task in panel["tasks"] if task["pictures"]} for _, panel in panels if panel]
    common = sorted(set.intersection(*(set(found) for found in tasks)))[:PHOTOS]
    rows = []
    for index in common:
        folder, first = panels[0][0], tasks[0][index]
        files = [(folder, first["pictures"]["lq"]), (folder, first["pictures"]["base"])]
        files += [(place, found[index]["pictures"]["tuned"]) for (place, _), found in zip(panels, tasks, strict=True)]
        files += [(folder, first["pictures"]["gt"])] if "gt" in first["pictures"] else []
        rows.append(
            {
                "name": first["photo"].rsplit("/", 1)[-1],
                "uris": [Markup(data_uri(open_picture(*file))) for file in files],
            }
        )
    return rows


def _hours(outcomes: Sequence[Outcome]) -> float:
    from rlrestore.checkpoint import read_json

    return sum(read_json(trial.folder / "result.json")["wall_s"] for o in outcomes for trial in o.trials) / 3600
