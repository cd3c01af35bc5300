"""Diagnosis of metrics on LL-Bench (`rlrestore judge bench`): every reward beside the people, restorers beside each other.

Rewards that need a reference are refused: LL-Bench has none. The LQ is resampled to the size of each output.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from envs.types import Restoration, Task
from rewards.base import Reward
from rewards.judges.leaderboard import leaderboard
from rewards.judges.report import Judgement, agreement, by_task, detection
from rewards.ll_score.data import open_rgb
from rewards.ll_score.llbench import BenchSource, expected_counts
from rewards.ll_score.prompt import TYPE_TASKS


def judge_sources(reward: Reward, sources: Sequence[BenchSource]) -> list[Judgement]:
    """What one reward says about every output. A fidelity term counts as an opinion on hallucination, too."""
    if "gt" in reward.spec.needs:
        raise ValueError(f"reward {reward.spec.name!r} needs a reference and LL-Bench has none: leave it out")
    sign = 1.0 if reward.spec.higher_is_better else -1.0
    out = []
    for source in sources:
        degraded = open_rgb(source.degraded)
        types = tuple(t for t, task in TYPE_TASKS.items() if task == source.task)[:1]
        items = []
        for output in source.outputs:
            picture = open_rgb(output.path)
            lq = degraded if degraded.size == picture.size else degraded.resize(picture.size, Image.Resampling.BICUBIC)
            items.append(Restoration(Task(source.id, _tensor(lq), types), _tensor(picture)))
        value = sign * reward.score(items).value_N.numpy()
        score, label = (np.array([getattr(o, name) for o in source.outputs]) for name in ("score", "hallucinated"))
        out.append(
            Judgement(source.id, source.task, tuple(o.model for o in source.outputs), value, score, -value, label)
        )
    return out


def bench(rewards: Mapping[str, Reward], sources: Sequence[BenchSource]) -> dict[str, Any]:
    """Numbers for JSON: a block a metric, the leaderboard, and where metrics and people disagree most."""
    judged = {name: judge_sources(reward, sources) for name, reward in rewards.items()}
    metrics = {
        name: {"quality": agreement(js), "hallucination": detection(js), "tasks": by_task(js)}
        for name, js in judged.items()
    }
    first = next(iter(judged.values()))
    return {
        "counts": expected_counts(sources),
        "metrics": metrics,
        "restorers": [asdict(row) for row in leaderboard(first)],
        "disagreements": {name: disagreements(js, sources) for name, js in judged.items()},
    }


def disagreements(
    judgements: Sequence[Judgement], sources: Sequence[BenchSource], count: int = 5
) -> list[dict[str, Any]]:
    """The outputs whose rank by the metric is furthest from their rank by people, with their pictures."""
    found = []
    for j, source in zip(judgements, sources, strict=True):
        known = np.isfinite(j.quality) & np.isfinite(j.target)
        if known.sum() < 3:
            continue
        rows = np.flatnonzero(known)
        by_metric, by_people = (np.argsort(np.argsort(-v[known])) for v in (j.quality, j.target))
        worst = int(np.abs(by_metric - by_people).argmax())
        found.append({
            "source": j.source, "model": j.names[rows[worst]], "rank_metric": int(by_metric[worst]) + 1,
            "rank_people": int(by_people[worst]) + 1, "of": len(rows), "degraded": str(source.degraded),
            "restored": str(source.outputs[rows[worst]].path),
        })  # fmt: skip
    return sorted(found, key=lambda row: -abs(row["rank_metric"] - row["rank_people"]) / row["of"])[:count]


def to_html(result: Mapping[str, Any]) -> str:
    """One page: metrics, restorers, disagreements as pictures (by their paths on this machine)."""
    columns = ("srcc", "srcc_low", "srcc_high", "krcc", "pairwise_accuracy", "srcc_pooled", "plcc_pooled")
    metrics = [
        [name, *(block["quality"].get(c, math.nan) for c in columns), block["hallucination"]["auroc"]]
        for name, block in result["metrics"].items()
    ]
    restorers = [list(row.values()) for row in result["restorers"]]
    parts = [
        "<!doctype html><meta charset=utf-8><title>LL-Bench</title><style>td,th{padding:.2em .6em;text-align:right}</style>"
    ]
    parts += [f"<p>{html.escape(result['counts'])}</p>"]
    parts += ["<h2>Metrics beside people</h2>", _table(["metric", *columns, "hallucination AUROC"], metrics)]
    parts += ["<h2>Restorers</h2>", _table(list(result["restorers"][0]), restorers)]
    for name, rows in result["disagreements"].items():
        parts.append(f"<h2>{html.escape(name)}: furthest from people</h2>")
        for row in rows:
            text = f"{row['model']}: rank {row['rank_metric']} by the metric, {row['rank_people']} by people, of {row['of']}"
            images = "".join(
                f'<img width=320 src="{html.escape(Path(row[k]).resolve().as_uri())}">'
                for k in ("degraded", "restored")
            )
            parts.append(f"<p>{html.escape(text)}<br>{images}</p>")
    return "\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))

    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
