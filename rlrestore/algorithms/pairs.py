"""Preference pairs inside the groups of a micro-batch: the best rollouts of a photo against its worst."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrestore.algorithms.base import Batch


@dataclass(frozen=True)
class Pairs:
    """P pairs, as rows of the micro-batch."""

    winner_P: Tensor  # [P] int64
    loser_P: Tensor  # [P] int64
    weight_P: Tensor  # [P] float32, mean 1 inside a group
    group_P: Tensor  # [P] int64, the group's id


def pair_rows(batch: Batch, count: int) -> Pairs:
    """All pairs of the `count` best and the `count` worst valid rollouts of each group, by advantage.

    Weights are DP2O-SR's inside a group (arXiv 2510.18851): |R_w - R_l| + 1 - their mean, R the advantage scaled to [0, 1].
    Groups whose rollouts are tied, or of which fewer than two are valid, give no pair.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for row, (which, weight) in enumerate(zip(batch.rows_B, batch.weight_B.tolist(), strict=True)):
        if weight > 0:
            members[which.group].append(row)
    advantages = batch.advantage_B.tolist()
    winners, losers, weights, groups = [], [], [], []
    for group, rows in members.items():
        ranked = sorted(rows, key=lambda row: (-advantages[row], row))
        top = min(count, len(ranked) // 2)
        width = advantages[ranked[0]] - advantages[ranked[-1]]
        if top == 0 or width <= 0:
            continue
        pairs = [(good, bad) for good in ranked[:top] for bad in ranked[-top:] if advantages[good] > advantages[bad]]
        gaps = [(advantages[good] - advantages[bad]) / width for good, bad in pairs]
        mean_gap = sum(gaps) / len(gaps)
        for (winner, loser), gap in zip(pairs, gaps, strict=True):
            winners.append(winner)
            losers.append(loser)
            weights.append(gap + 1 - mean_gap)
            groups.append(group)
    device = batch.advantage_B.device

    def indices(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Pairs(indices(winners), indices(losers), torch.tensor(weights, device=device), indices(groups))


def spread_over_groups(loss_P: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
    """[B] each row has its group's weighted mean over pairs, so that the mean over rows is the mean over groups.

    A group without pairs has 0, which keeps its gradient out and its share of the denominator.
    """
    values = {group: (loss_P * pairs.weight_P)[pairs.group_P == group].mean() for group in set(pairs.group_P.tolist())}
    zero = 0.0 * loss_P.sum()
    return torch.stack([values.get(row.group, zero) for row in batch.rows_B])
