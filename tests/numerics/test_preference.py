"""Pairs and group preferences on numbers that can be worked out by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrestore.algorithms.dpo import Dpo, DpoConfig
from rlrestore.algorithms.forward import Noised
from rlrestore.algorithms.objectives import d3po_loss_P, dgpo_clipped_N, dgpo_loss_N, dpo_loss_P
from rlrestore.algorithms.pairs import pair_rows, spread_over_groups
from rlrestore.types import Row


def batch(groups: list[int], advantages: list[float], weights: list[float] | None = None) -> Any:
    rows = tuple(Row(group, member, seed=0) for member, group in enumerate(groups))
    return SimpleNamespace(
        rows_B=rows, advantage_B=torch.tensor(advantages), weight_B=torch.tensor(weights or [1.0] * len(rows))
    )


def rows_of(pairs: Any) -> list[tuple[int, int]]:
    return list(zip(pairs.winner_P.tolist(), pairs.loser_P.tolist(), strict=True))


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=0)


# ---- pairs


def test_best_against_worst_of_each_group() -> None:
    pairs = pair_rows(batch([7, 7, 7, 9, 9, 9], [0.0, 2.0, -2.0, 1.0, -3.0, 2.0]), 1)
    assert rows_of(pairs) == [(1, 2), (5, 4)]
    assert pairs.group_P.tolist() == [7, 9] and pairs.weight_P.tolist() == [1.0, 1.0]


def test_all_pairs_of_the_two_best_and_two_worst() -> None:
    # in [0, 1]: 1, .75, .25, 0; gaps .75 1 .5 .75 with mean .75, weights gap + 1 - .75
    pairs = pair_rows(batch([0] * 4, [2.0, 1.0, -1.0, -2.0]), 2)
    assert rows_of(pairs) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    close(pairs.weight_P, [1.0, 1.25, 0.75, 1.0])


def test_what_gives_no_pair() -> None:
    assert rows_of(pair_rows(batch([0, 0, 0], [1.0, 1.0, 1.0]), 1)) == []  # tied
    assert rows_of(pair_rows(batch([0, 0], [1.0, -1.0], [1.0, 0.0]), 1)) == []  # one valid member
    # the best failed to be scored: the second best wins
    assert rows_of(pair_rows(batch([0, 0, 0], [2.0, 1.0, -3.0], [0.0, 1.0, 1.0]), 1)) == [(1, 2)]
    # three members have no two disjoint halves of two
    assert rows_of(pair_rows(batch([0, 0, 0], [2.0, 1.0, -3.0]), 2)) == [(0, 2)]


def test_a_group_has_one_value_however_many_pairs_it_gave() -> None:
    given = batch([0] * 4 + [1] * 4 + [2] * 4, [2.0, 1.0, -1.0, -2.0, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    pairs = pair_rows(given, 2)
    assert rows_of(pairs)[4:] == [(4, 6), (4, 7), (5, 7)]  # rows 5 and 6 are tied, which is no preference
    loss_P = torch.arange(1.0, 8.0, requires_grad=True)
    value_B = spread_over_groups(loss_P, pairs, given)
    # group 0: (1 * 1 + 2 * 1.25 + 3 * .75 + 4 * 1) / 4; group 1: gaps .5 1 .5, mean 2/3, weights 5/6 4/3 5/6; group 2 is tied
    close(value_B, [2.4375] * 4 + [(5 * 5 / 6 + 6 * 4 / 3 + 7 * 5 / 6) / 3] * 4 + [0.0] * 4)
    value_B.mean().backward()
    assert loss_P.grad is not None
    close(loss_P.grad.sum(), 2 / 3)  # weights have mean 1 in a group: two of three groups speak


# ---- losses


def test_dpo_starts_at_log_2_and_points_from_loser_to_winner() -> None:
    error_w, error_l = torch.tensor([0.3], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    loss = dpo_loss_P(0.3 - error_w, 0.4 - error_l, 2000.0)
    close(loss.detach(), [math.log(2)])
    loss.sum().backward()
    close(error_w.grad, [500.0])  # beta / 4: less error on the winner,
    close(error_l.grad, [-500.0])  # more on the loser


def test_dpo_by_hand() -> None:
    # gains .001 and -.002, beta 2000: inside 3, -log sigmoid(3) = log(1 + e^-3)
    close(dpo_loss_P(torch.tensor([0.001]), torch.tensor([-0.002]), 2000.0), [math.log1p(math.exp(-3))])


def test_d3po_by_hand() -> None:
    close(d3po_loss_P(torch.zeros(1), torch.zeros(1), 0.1, 0.1), [math.log(2)])
    # rho 1.05 is inside 1 +- .1, rho .5 is clamped to .9: inside = b log(1.05 / .9)
    loss = d3po_loss_P(torch.tensor([1.05]).log(), torch.tensor([0.5]).log(), 2.0, 0.1)
    close(loss, [math.log1p(math.exp(-2 * math.log(1.05 / 0.9)))])
    log_rho = torch.tensor([0.0, -1.0], requires_grad=True)
    d3po_loss_P(log_rho[:1], log_rho[1:], 2.0, 0.1).sum().backward()
    assert log_rho.grad is not None
    assert log_rho.grad[0] < 0 and log_rho.grad[1] == 0  # up with the winner; the loser is beyond the clip already


def test_dgpo_weight_falls_as_the_group_is_told_apart() -> None:
    advantage, group = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([3, 3, 8, 8])
    reference = torch.tensor([0.5, 0.5, 0.5, 0.5])
    error = torch.tensor([0.5, 0.5, 0.4, 0.6], requires_grad=True)
    loss, weight = dgpo_loss_N(error, reference, advantage, torch.ones(4), group, beta=10.0)
    # group 3 is at the reference: 1/2. group 8: sum A (err - ref) / 2 = (2 * -.1 + -2 * .1) / 2 = -.2; sigmoid(-2)
    solved = 1 / (1 + math.exp(2))
    close(weight, [0.5, 0.5, solved, solved])
    loss.sum().backward()
    close(error.grad, [0.5, -0.5, 2 * solved, -2 * solved])  # W A: no gradient through W


def test_dgpo_is_the_gradient_of_its_log_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(8, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.rand(8, generator=generator, dtype=torch.float64)
    advantage = torch.randn(8, generator=generator, dtype=torch.float64)
    ones, group, beta = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.int64), 7.0
    (ours,) = torch.autograd.grad(dgpo_loss_N(error, reference, advantage, ones, group, beta)[0].mean(), error)
    inside = -(beta / 8) * (advantage * (error - reference)).sum()
    (likelihood,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(inside) / beta, error)
    torch.testing.assert_close(ours, likelihood)


def test_dgpo_leaves_invalid_members_out_of_the_sum() -> None:
    advantage, error = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.4, 0.6, 9.0])
    with_invalid = dgpo_loss_N(
        error, torch.full((3,), 0.5), advantage, torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3), 10.0
    )[1]
    without = dgpo_loss_N(error[:2], torch.full((2,), 0.5), advantage[:2], torch.ones(2), torch.zeros(2), 10.0)[1]
    close(with_invalid[:2], without)
    assert float(without[0]) == pytest.approx(1 / (1 + math.exp(1)))  # (-.1 - .1) / 2 * 10


def test_dgpo_holds_members_that_have_come_far_enough() -> None:
    """rho = exp(err_old - err): .11 -> .10 is e^.01 = 1.01005, .10 -> .11 is .99005; e = .01."""
    error, old = torch.tensor([0.10, 0.11, 0.10, 0.11, 0.10]), torch.tensor([0.11, 0.10, 0.11, 0.10, 0.10])
    held = dgpo_clipped_N(error, old, torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]), 0.0099)
    assert held.tolist() == [True, False, False, True, False]  # a good one nearer, a bad one further: enough of either


def test_dpo_of_epsilon_errors() -> None:
    """eps_hat = z_t + (1 - t) v, so at t = .25 its errors are .5625 times the velocity's; beta makes up for it."""
    generator = torch.Generator().manual_seed(0)
    v, target, reference = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    noised = Noised(torch.zeros_like(v), torch.full((2,), 0.25), target, v, reference, None)
    losses = [
        Dpo(DpoConfig(error=error, beta=beta, pairs=1)).objective(noised, batch([0, 0], [1.0, -1.0]))[0]
        for error, beta in (("velocity", 0.5625 * 0.3), ("epsilon", 0.3))
    ]
    close(losses[0], losses[1])
    eps = v * (1 - 0.25)  # z_t is 0
    gains = [
        float((unit - (1 - 0.25) * target).square()[row].mean()) for row in (0, 1) for unit in (reference * 0.75, eps)
    ]
    inside = 0.15 * ((gains[0] - gains[1]) - (gains[2] - gains[3]))
    close(losses[1], [math.log(1 + math.exp(-inside))] * 2)
