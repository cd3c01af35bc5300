"""Constraints and their multipliers on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.base import RewardSpec, checked_scores
from rewards.constraints import ConstraintConfig, Multipliers, Reading, check_constraint, penalty, read
from rewards.rubric import Rubric, RubricScores, TermConfig

NAN = math.nan
T = torch.tensor


def constraint(**keys: float | None) -> ConstraintConfig:
    return ConstraintConfig(TermConfig("h", role="constraint"), **keys)  # type: ignore[arg-type]


def scores_of(raw: list[float], up: bool = False, scale: float = 2.0) -> RubricScores:
    specs = [
        RewardSpec("q", "1", True, (None, None), frozenset(), "quality", 1.0, False, True, "own code"),
        RewardSpec("h", "1", up, (None, None), frozenset(), "fidelity", scale, False, True, "own code"),
    ]
    rubric = Rubric([TermConfig("q"), TermConfig("h", role="constraint")], specs=specs)
    values = {"q": torch.zeros(len(raw)), "h": T(raw)}
    return rubric.combine({name: checked_scores(value, (None, None)) for name, value in values.items()})


def test_a_rate_counts_hard_and_ignores_what_failed() -> None:
    # beyond 1: 2 and 3 of the four that are known; at the threshold is not beyond. (.5 - .2) / .1 = 3 tens of points
    reading = read(constraint(threshold=1.0, bound=0.2), T([0.0, 1.0, 2.0, 3.0, NAN]), None, False, 2.0)
    assert reading == Reading(0.5, 0.2, pytest.approx(3.0))
    # higher is better: the bad side is below
    assert read(constraint(threshold=1.0, bound=0.2), T([0.0, 1.0, 2.0, 3.0]), None, True, 2.0).measured == 0.25


def test_a_mean_in_scales_and_its_direction() -> None:
    assert read(constraint(bound=1.0), T([2.0, 4.0]), None, False, 2.0) == Reading(3.0, 1.0, 1.0)  # (3 - 1) / 2
    assert read(constraint(bound=1.0), T([2.0, 4.0]), None, True, 2.0) == Reading(3.0, 1.0, -1.0)  # better than asked


def test_the_base_is_a_bound_and_tolerance_widens_it() -> None:
    base = T([[1.0, 2.0], [3.0, NAN]])  # mean of what is known 2
    assert read(constraint(tolerance=0.5), T([4.0]), base, False, 1.0) == Reading(4.0, 2.5, 1.5)
    assert read(constraint(tolerance=0.5), T([1.0]), base, True, 1.0) == Reading(1.0, 1.5, 0.5)
    # a rate against the base's: 1 of 3 beyond 2.5, a share plus a tenth
    reading = read(constraint(threshold=2.5, tolerance=0.1), T([3.0, 3.0]), base, False, 1.0)
    assert reading == Reading(1.0, pytest.approx(1 / 3 + 0.1), pytest.approx((1 - 1 / 3 - 0.1) * 10))


def test_penalties() -> None:
    assert penalty(constraint(bound=0.0), T([1.0, -3.0]), False, 2.0).tolist() == [0.5, -1.5]
    assert penalty(constraint(bound=0.0), T([1.0, -3.0]), True, 2.0).tolist() == [-0.5, 1.5]
    # logistic of the distance to the threshold in scales: half at it, 1 / (1 + e^-1) one scale beyond
    soft = penalty(constraint(threshold=1.0, bound=0.1), T([1.0, 3.0, -1.0]), False, 2.0)
    assert soft.tolist() == pytest.approx([0.5, 0.731059, 0.268941], abs=1e-6)
    assert penalty(constraint(threshold=1.0, bound=0.1), T([-1.0]), True, 2.0).tolist() == pytest.approx([0.731059])


def test_multipliers_climb_fall_and_stay_in_their_bounds() -> None:
    held = Multipliers({"h": constraint(bound=1.0, step=0.5, cap=1.2)})
    seen = [held.ascend(scores_of([mean]), {})["constraint/lambda/h"] for mean in (3.0, 5.0, 1.0, 0.0, -9.0)]
    # violations (raw - 1) / 2 = 1, 2, 0, -.5, -5 at step .5: .5, 1.5 -> cap 1.2, 1.2, .95, < 0 -> 0
    assert seen == pytest.approx([0.5, 1.2, 1.2, 0.95, 0.0])


def test_the_rollouts_pay_what_the_multiplier_was_before_this_batch() -> None:
    held = Multipliers({"h": constraint(bound=1.0, start=2.0)})
    assert held.penalty_N(scores_of([2.0, -4.0])).tolist() == [2.0, -4.0]  # 2 * raw / 2
    assert Multipliers({}).penalty_N(scores_of([2.0, 1.0])).tolist() == [0.0, 0.0]


def test_nothing_known_moves_nothing() -> None:
    held = Multipliers({"h": constraint(bound=1.0, start=2.0)})
    assert held.ascend(scores_of([NAN, NAN]), {}) == {"constraint/lambda/h": 2.0}
    assert held.penalty_N(scores_of([NAN, 2.0])).isnan().tolist() == [True, False]
    against_base = Multipliers({"h": constraint(start=2.0)})
    assert against_base.ascend(scores_of([1.0]), {"h": T([[NAN]])}) == {"constraint/lambda/h": 2.0}


def test_state_survives() -> None:
    held = Multipliers({"h": constraint(bound=1.0)})
    held.ascend(scores_of([3.7]), {})
    again = Multipliers({"h": constraint(bound=1.0)})
    again.load_state_dict(held.state_dict())
    assert again.value == held.value and again.value["h"] > 0


def test_dual_ascent_holds_a_bound_that_the_reward_pulls_against() -> None:
    """A policy with one number x climbs x - lambda x: without the constraint it runs away, with it x ends at the bound.

    x <- x + .1 (1 - lambda), lambda <- lambda + .1 (x - 1): a spiral whose centre is x = 1, lambda = 1.
    """
    held, x = Multipliers({"h": constraint(bound=1.0, step=0.1)}), 0.0
    path = []
    for _ in range(400):
        x += 0.1 * (1 - held.value["h"]) - 0.02 * (x - 1)  # the last term is a policy's own damping
        held.ascend(scores_of([x], scale=1.0), {})
        path.append(x)
    assert max(path) > 1.05  # it does overshoot
    assert x == pytest.approx(1.0, abs=0.02) and held.value["h"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"threshold": 0.0, "bound": 1.5}, "share"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"step": 0.0}, "step=0.0"),
        ({"start": 11.0}, "start=11.0"),
        ({"cap": 0.0}, "start in \\[0, cap=0.0\\]"),
    ],
)
def test_impossible_constraints_are_refused(keys: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_constraint(constraint(**keys))
