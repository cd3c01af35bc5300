"""Which restorer people (or a reference) prefer: Bradley-Terry over sources, with intervals, and hallucination rates.

Every pair of restorers that a source has is one comparison by the truth (`Judgement.target`); equal targets are half a win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.judges.report import Judgement
from rewards.ll_score.bradley_terry import bradley_terry

DRAWS = 200


@dataclass(frozen=True)
class Standing:
    """One restorer."""

    name: str
    score: float  # Bradley-Terry, mean 0 over restorers
    low: float  # 95 %, bootstrap over sources
    high: float
    comparisons: int
    hallucination_rate: float  # of its labelled outputs; NaN without labels


def leaderboard(judgements: Sequence[Judgement], seed: int = 0) -> list[Standing]:
    """Best first. ValueError for fewer than two restorers."""
    names = sorted({name for j in judgements for name in j.names})
    if len(names) < 2:
        raise ValueError(f"a leaderboard compares restorers, and there is {len(names)}")
    wins_SKK = np.stack([_wins(j, names) for j in judgements])
    score_K = bradley_terry(wins_SKK.sum(0))
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(judgements), size=(DRAWS, len(judgements)))
    low_K, high_K = np.percentile([bradley_terry(wins_SKK[d].sum(0), sweeps=200) for d in draws], [2.5, 97.5], axis=0)
    met_K = (wins_SKK.sum(0) + wins_SKK.sum(0).T).sum(1)
    rate = {name: _rate(judgements, name) for name in names}
    rows = [
        Standing(name, float(score_K[k]), float(low_K[k]), float(high_K[k]), int(met_K[k]), rate[name])
        for k, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -row.score)


def _wins(j: Judgement, names: Sequence[str]) -> np.ndarray:
    wins = np.zeros((len(names), len(names)))
    place = [names.index(name) for name in j.names]
    for a in range(len(place)):
        for b in range(len(place)):
            if place[a] != place[b] and np.isfinite(j.target[a]) and np.isfinite(j.target[b]):
                wins[place[a], place[b]] += 1.0 if j.target[a] > j.target[b] else 0.5 * (j.target[a] == j.target[b])
    return wins


def _rate(judgements: Sequence[Judgement], name: str) -> float:
    labels = np.array([y for j in judgements for y, n in zip(j.label, j.names, strict=True) if n == name])
    labels = labels[np.isfinite(labels)]
    return float(labels.mean()) if len(labels) else float("nan")
