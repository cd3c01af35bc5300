"""How well a judge agrees with people (or a reference): pure numpy on vectors, NaN where a number has no meaning.

Field conventions: SRCC, KRCC (tau-b, handles ties), PLCC after the VQEG 4-parameter logistic, pairwise accuracy with
half credit for predicted ties, AUROC with half credit for ties, F1 at a threshold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import curve_fit
from scipy.stats import kendalltau, pearsonr, rankdata, spearmanr

Vector = np.ndarray


def srcc(predicted: Vector, target: Vector) -> float:
    """Spearman's rank correlation; NaN for fewer than two values or a constant side."""
    return _correlation(lambda a, b: spearmanr(a, b).statistic, predicted, target)


def krcc(predicted: Vector, target: Vector) -> float:
    return _correlation(lambda a, b: kendalltau(a, b).statistic, predicted, target)


def plcc_raw(predicted: Vector, target: Vector) -> float:
    return _correlation(lambda a, b: pearsonr(a, b).statistic, predicted, target)


def plcc(predicted: Vector, target: Vector) -> float:
    """Pearson after f(x) = (b1 - b2) / (1 + exp(-(x - b3) / b4)) + b2 is fitted; the raw one if the fit fails."""
    x, y = np.asarray(predicted, float), np.asarray(target, float)
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return plcc_raw(x, y)

    def logistic(v, b1, b2, b3, b4):
        return (b1 - b2) / (1 + np.exp(-np.clip((v - b3) / b4, -60, 60))) + b2

    start = (y.max(), y.min(), x.mean(), max(x.std() / 4, 1e-6) * (1 if plcc_raw(x, y) >= 0 else -1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted, _ = curve_fit(logistic, x, y, p0=start, maxfev=10_000)
    except RuntimeError:
        return plcc_raw(x, y)
    return plcc_raw(logistic(x, *fitted), y)


def pairwise_accuracy(predicted: Vector, target: Vector) -> float:
    """Share of pairs with different targets that are ordered right; a predicted tie is half right."""
    p, t = np.asarray(predicted, float), np.asarray(target, float)
    i, j = np.triu_indices(len(p), 1)
    gap, order = t[i] - t[j], p[i] - p[j]
    kept = gap != 0
    return float(np.mean(np.where(order == 0, 0.5, np.sign(order) == np.sign(gap))[kept])) if kept.any() else np.nan


def auroc(score: Vector, label: Vector) -> float:
    """P(a positive scores above a negative), ties half; NaN without one of the two classes."""
    s, y = np.asarray(score, float), np.asarray(label).astype(bool)
    positives, negatives = int(y.sum()), int((~y).sum())
    if not positives or not negatives:
        return np.nan
    return float((rankdata(s)[y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def f1(score: Vector, label: Vector, threshold: float) -> float:
    said, y = np.asarray(score) >= threshold, np.asarray(label).astype(bool)
    hits = int((said & y).sum())
    return 2 * hits / max(int(said.sum()) + int(y.sum()), 1)


def mean_over(groups: Sequence[tuple[Vector, Vector]], measure: Callable[[Vector, Vector], float]) -> float:
    """Mean of a measure over groups (sources), without those where it is NaN."""
    values = np.array([measure(a, b) for a, b in groups])
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


def bootstrap(values: Vector, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean, percentile bootstrap over the values (one a source)."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _correlation(function: Callable, predicted: Vector, target: Vector) -> float:
    a, b = np.asarray(predicted, float), np.asarray(target, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(function(a, b))
