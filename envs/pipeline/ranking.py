"""Bradley-Terry ranking of providers from pairwise verdicts, with intervals over photos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SWEEPS, TOLERANCE = 10_000, 1e-10


def bradley_terry(wins: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """[M] log strengths of mean 0 from `wins[i, j]`, how often i beat j (a tie is 0.5 for each).

    Minorise-maximise (Hunter 2004): `p_i <- w_i / sum_j n_ij / (p_i + p_j)`, rescaled to a geometric mean of 1. `alpha` wins are
    added to each ordered pair: a perfect ranking has no finite maximum without. P(i over j) = sigmoid(beta_i - beta_j).
    """
    count = len(wins)
    padded = wins + alpha * (1.0 - np.eye(count))
    total, games = padded.sum(1), padded + padded.T
    strength = np.ones(count)
    for _ in range(SWEEPS):
        new = total / (games / (strength[:, None] + strength[None, :])).sum(1)
        new /= np.exp(np.log(new).mean())
        if np.abs(new - strength).max() < TOLERANCE:
            break
        strength = new
    return np.log(strength)


def ranking(
    by_photo: Sequence[np.ndarray], alpha: float = 0.5, resamples: int = 500, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(beta, low, high), each [M]: log strengths and their 95 % percentile bootstrap over photos.

    by_photo: a `wins` matrix for each photo. With one photo the interval is nan.
    """
    stack = np.stack(list(by_photo))
    beta = bradley_terry(stack.sum(0), alpha)
    if len(stack) < 2:
        return beta, np.full_like(beta, np.nan), np.full_like(beta, np.nan)
    rng = np.random.default_rng(seed)
    drawn = [bradley_terry(stack[rng.integers(len(stack), size=len(stack))].sum(0), alpha) for _ in range(resamples)]
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return beta, low, high
