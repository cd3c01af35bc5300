"""How sure a measured difference is: bootstrap intervals over photos.

The unit of chance is the photo. Seeds of one photo are averaged first, and crops of one photo are resampled together;
either taken as independent would make intervals too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Interval:
    mean: float  # over units, each with equal weight
    low: float  # nan if fewer than 2 clusters
    high: float
    units: int  # that had at least one value
    clusters: int
    level: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap_ci(
    delta_by_unit: ArrayLike,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    cluster_ids: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean of paired differences (tuned - base) and its bias-corrected (BCa) cluster-bootstrap interval.

    delta_by_unit [n] or [n, m]: n photos or tasks, m seeds; nan is a missing value. cluster_ids [n]: equal ids are
    resampled together (the photo of which a task is a crop); without it each unit is its own cluster. Deterministic.
    With fewer than about 10 clusters any bootstrap interval is too narrow: `clusters` is there to be shown.
    Source: Efron, Better Bootstrap Confidence Intervals, 1987; `scipy.stats.bootstrap`.
    """
    delta = np.asarray(delta_by_unit, dtype=np.float64)
    if delta.ndim not in (1, 2) or delta.size == 0:
        raise ValueError(f"differences must be [units] or [units, seeds] and not empty, got shape {delta.shape}")
    if np.isinf(delta).any():
        raise ValueError("infinite differences (PSNR of equal images?) have no mean: cap the metric first")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}; 0.95 is usual")
    if cluster_ids is not None and len(cluster_ids) != len(delta):
        raise ValueError(f"{len(cluster_ids)} cluster ids for {len(delta)} units")
    present = ~np.isnan(delta.reshape(len(delta), -1))
    known = np.any(present, axis=1)
    if not known.any():
        raise ValueError("every difference is missing (nan)")
    unit_mean = np.where(present, delta.reshape(present.shape), 0).sum(1)[known] / present.sum(1)[known]
    ids = range(len(delta)) if cluster_ids is None else cluster_ids
    index_by_id: dict[Hashable, int] = {}
    cluster = np.array([index_by_id.setdefault(i, len(index_by_id)) for i, ok in zip(ids, known, strict=True) if ok])
    sums = np.bincount(cluster, weights=unit_mean)
    counts = np.bincount(cluster).astype(np.float64)
    mean = float(sums.sum() / counts.sum())
    low, high = _bootstrap(sums, counts, mean, level, resamples, seed)
    return Interval(mean, low, high, int(known.sum()), len(sums), level)


def _bootstrap(
    sums: np.ndarray, counts: np.ndarray, mean: float, level: float, resamples: int, seed: int
) -> tuple[float, float]:
    if len(sums) < 2:
        return math.nan, math.nan
    if np.ptp(sums / counts) <= 1e-12 * max(1.0, abs(mean)):
        return mean, mean  # all clusters agree; BCa would divide by a spread of 0
    result = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=level,
        method="BCa",
        random_state=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
