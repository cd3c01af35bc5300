"""Bradley-Terry scores from wins, by minorise-maximise with a prior of half wins (Hunter 2004, eq. 3)."""

from __future__ import annotations

import numpy as np


def bradley_terry(
    wins_KK: np.ndarray, prior: float = 0.5, sweeps: int = 10_000, tolerance: float = 1e-10
) -> np.ndarray:
    """Scores beta [K], mean 0, with P(i over j) = sigmoid(beta_i - beta_j).

    wins[i, j] counts how often i was preferred to j; a tie is half a win for each. `prior` virtual wins each way keep a
    perfect ranking finite. A > B > C, once each, prior 0.5: (0.7563, 0, -0.7563). ValueError for fewer than two.
    """
    k = len(wins_KK)
    if k < 2 or wins_KK.shape != (k, k) or not (wins_KK >= 0).all():
        raise ValueError(f"Bradley-Terry needs a square matrix of counts of at least two, got shape {wins_KK.shape}")
    w = wins_KK + prior * (1 - np.eye(k))
    np.fill_diagonal(w, 0.0)
    won, met = w.sum(1), w + w.T
    p = np.ones(k)
    for _ in range(sweeps):
        new = won / (met / (p[:, None] + p[None])).sum(1)
        new /= np.exp(np.log(new).mean())
        moved = np.abs(np.log(new / p)).max()
        p = new
        if moved < tolerance:
            break
    return np.log(p)


def wins_from_ranks(ranks: dict[int, float], count: int) -> np.ndarray:
    """[K, K] of one annotator's ranking: index -> rank, 1 is best, equal ranks share the win."""
    wins = np.zeros((count, count))
    for i, rank_i in ranks.items():
        for j, rank_j in ranks.items():
            if i != j:
                wins[i, j] = 1.0 if rank_i < rank_j else 0.5 if rank_i == rank_j else 0.0
    return wins
