"""Gates on numbers that can be worked out by hand, and what an unknown level must not do."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.base import RewardSpec, Scores, checked_scores
from rewards.gates import (
    GateConfig,
    Levels,
    apply_gates,
    check_gate,
    gate_metrics,
    multiplied,
    oars,
    on_oars_scale,
    openness,
    shortfall,
)
from rewards.rubric import Rubric, RubricScores, TermConfig

NAN = math.nan
T = torch.tensor


def spec(name: str, block: str = "quality", up: bool = True, scale: float = 1.0) -> RewardSpec:
    return RewardSpec(name, "1", up, (None, None), frozenset(), block, scale, False, True, "own code")  # type: ignore[arg-type]


FID = spec("fid", "fidelity", up=False, scale=0.5)  # lower is better, half a raw unit is one of utility


def scores_of(quality: list[float], fid: list[float]) -> RubricScores:
    """A quality reward "q" (scale 1) and a gate's term "fid"; NaN is a failed score."""
    terms = [TermConfig("q"), TermConfig("fid", role="gate")]
    rubric = Rubric(terms, specs=[spec("q"), FID])
    return rubric.combine({"q": rows(quality), "fid": rows(fid)})


def rows(values: list[float]) -> Scores:
    return checked_scores(T(values), (None, None))


def gate(**keys: object) -> GateConfig:
    return GateConfig(TermConfig("fid", role="gate"), **keys)  # type: ignore[arg-type]


def test_shortfall_is_positive_where_it_is_worse() -> None:
    assert shortfall(T([20.0, 26.0]), T(25.0), higher_is_better=True).tolist() == [5.0, -1.0]
    assert shortfall(T([0.2, 0.6]), T(0.5), higher_is_better=False).tolist() == pytest.approx([-0.3, 0.1])


def test_openness_is_linear_between_margin_and_limit() -> None:
    # (3 - s) / (3 - 1): s = 1 is open, 2 half, 3 shut; beyond either end it stays
    assert openness(T([-5.0, 1.0, 2.0, 3.0, 9.0]), 1.0, 3.0).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_a_shut_rollout_ranks_below_the_worst_open_one_whatever_the_sign() -> None:
    # zero = min - 1 = -6: open rows stay, (-3) half open is -6 + .5 * 3 = -4.5, (-1) shut is -6
    out = multiplied(T([[-5.0, -3.0, -1.0]]), T([[1.0, 0.5, 0.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert out.tolist() == [[-5.0, -4.5, -6.0]]


def test_a_group_that_is_shut_as_a_whole_is_tied_and_a_failed_row_is_not_its_zero() -> None:
    valid = T([[True, True, True], [True, True, False]])
    out = multiplied(T([[1.0, 2.0, 3.0], [1.0, 2.0, NAN]]), T([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), valid)
    assert out[0].tolist() == [0.0, 0.0, 0.0]
    assert out[1, :2].tolist() == [1.0, 2.0]
    assert math.isnan(out[1, 2])


def test_oars_as_in_the_paper() -> None:
    # F .9: .9 * 3.5 + .9^.5 * 1.5 = 3.15 + 1.423025; F .5: 1.75 + .707107 * 1.5
    assert float(oars(T(5.0), T(3.5), T(0.9), 7.0)) == pytest.approx(4.573025, abs=1e-6)
    assert float(oars(T(5.0), T(3.5), T(0.5), 7.0)) == pytest.approx(2.810660, abs=1e-6)
    assert float(oars(T(5.0), T(3.5), T(1.0), 7.0)) == 5.0  # full fidelity: the quality itself
    # F = 0 and Q_lq > 0: nothing is left; Q_lq = 0: 0^0 = 1, improvement counts whatever the fidelity
    assert float(oars(T(5.0), T(3.5), T(0.0), 7.0)) == 0.0
    assert float(oars(T(5.0), T(0.0), T(0.0), 7.0)) == 5.0
    assert float(oars(T(5.0), T(-2.0), T(0.5), 7.0)) == pytest.approx(
        -1 + 7
    )  # below the scale: exponent 0, not 2^(2/7)


def test_the_oars_scale_goes_through_both_ends_in_either_direction() -> None:
    assert on_oars_scale(T([2.0, 4.0, 3.0]), (2.0, 4.0)).tolist() == pytest.approx([1.0, 10.0, 5.5])
    assert on_oars_scale(T([4.0, 1.0]), (4.0, 1.0)).tolist() == pytest.approx([1.0, 10.0])  # lower is better


def test_multiply_against_the_base_of_the_same_photo() -> None:
    scores = scores_of([1.0, 2.0, 1.0, 2.0], [0.2, 0.7, 0.2, 0.7])
    # photo 1: base .2, so .7 is .5 worse, half of the default limit (2 scales = 1.0); photo 2: base .7, nothing is worse
    levels = Levels(base={"fid": T([[0.1, 0.3], [0.7, 0.7]])})
    gated = apply_gates({"fid": gate()}, scores, levels, 2)
    # photo 1: zero = 1 - 1 = 0, so 2 half open is 1
    assert gated.utility_RN[0].tolist() == pytest.approx([1.0, 1.0, 1.0, 2.0])
    assert torch.equal(gated.utility_RN[1], scores.utility_RN[1])  # its own row and fidelity are left alone
    assert gated.known_N.all() and not gated.veto_N.any() and gated.penalty_N.tolist() == [0.0] * 4
    assert gate_metrics(gated) == pytest.approx(
        {"gate/open/fid": 0.875, "gate/shut_frac/fid": 0.0, "gate/unknown_frac/fid": 0.0}
    )


def test_two_gates_on_one_term_multiply_in_either_order() -> None:
    terms = [TermConfig("q"), TermConfig("a", role="gate"), TermConfig("b", role="gate")]
    rubric = Rubric(terms, specs=[spec("q"), spec("a", up=False), spec("b", up=False)])
    scores = rubric.combine({"q": rows([1.0, 3.0]), "a": rows([0.0, 0.5]), "b": rows([0.0, 0.75])})
    gates = {
        name: GateConfig(TermConfig(name, role="gate"), against="absolute", level=0.0, limit=1.0) for name in ("a", "b")
    }
    # openness .5 and .25; zero = 1 - 1 = 0, so 3 becomes 3 / 8
    for order in (("a", "b"), ("b", "a")):
        gated = apply_gates({name: gates[name] for name in order}, scores, Levels(), 1)
        assert gated.utility_RN[0].tolist() == pytest.approx([1.0, 0.375])


def test_hinge_is_priced_in_scales_beyond_the_margin() -> None:
    scores = scores_of([1.0, 2.0], [0.3, 1.0])
    # lq scores .1; shortfalls .2 and .9; margin .3: 0 and .6, which is 1.2 scales of .5; price 2
    gated = apply_gates(
        {"fid": gate(form="hinge", against="lq", margin=0.3, price=2.0)}, scores, Levels(lq={"fid": T([0.1])}), 1
    )
    assert gated.penalty_N.tolist() == pytest.approx([0.0, 2.4])
    assert torch.equal(gated.utility_RN, scores.utility_RN)


def test_veto_against_a_number() -> None:
    scores = scores_of([1.0, 2.0, 3.0], [0.3, 1.0, 0.5])
    gated = apply_gates({"fid": gate(form="veto", against="absolute", level=0.5)}, scores, Levels(), 1)
    assert gated.veto_N.tolist() == [False, True, False]  # at the level is not beyond it


def test_oars_gate_on_a_term_whose_lower_is_better() -> None:
    terms = [TermConfig("niqe"), TermConfig("fid", role="gate")]
    rubric = Rubric(terms, specs=[spec("niqe", up=False, scale=2.0), FID])
    scores = rubric.combine({"niqe": rows([5.5, 4.0]), "fid": rows([0.0, 0.5])})
    config = gate(form="oars", against="absolute", level=0.0, limit=1.0, acts_on=("niqe",), quality=(10.0, 1.0))
    gated = apply_gates({"fid": config}, scores, Levels(lq={"niqe": T([7.0])}), 1)
    # on 1..10: raw 10 is 1, raw 1 is 10, so Q = 11 - raw: lq 4, rollouts 5.5 and 7; F 1 and .5
    # 5.5 and .5 * 4 + .5^(4/7) * 3 = 2 + .672950 * 3 = 4.018850; a point is 1 raw unit, half a unit of utility
    assert gated.utility_RN[0].tolist() == pytest.approx([2.75, 2.009425], abs=1e-5)


@pytest.mark.parametrize("form", ["multiply", "hinge", "veto"])
def test_what_is_not_known_neither_opens_nor_shuts(form: str) -> None:
    scores = scores_of([1.0, 2.0, 3.0, 4.0], [0.2, NAN, 0.2, 0.2])  # a failed score in photo 1, no level in photo 2
    gated = apply_gates({"fid": gate(form=form)}, scores, Levels(base={"fid": T([[0.2, NAN], [NAN, NAN]])}), 2)
    assert gated.known_N.tolist() == [True, False, False, False]
    assert gated.penalty_N.tolist() == [0.0] * 4 and not gated.veto_N.any()
    assert gate_metrics(gated)["gate/unknown_frac/fid"] == 0.75
    assert gated.utility_RN[0, 0] == 1.0


def test_no_gates_change_nothing() -> None:
    scores = scores_of([1.0, NAN], [0.2, 0.1])
    gated = apply_gates({}, scores, Levels(), 1)
    assert torch.equal(gated.utility_RN.nan_to_num(), scores.utility_RN.nan_to_num()) and gated.known_N.all()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"form": "soft"}, "form 'soft' is unknown"),
        ({"against": "gt"}, "against 'gt' is unknown"),
        ({"against": "absolute"}, "level=None"),
        ({"level": 3.0}, "against=base with level=3.0"),
        ({"margin": 1.0, "limit": 1.0}, "limit=1.0 must lie above margin=1.0"),
        ({"price": -1.0}, "price=-1.0"),
        ({"acts_on": ("nope",)}, "'nope', which is no reward of this run: q"),
        ({"form": "oars"}, "acts on one term"),
        ({"form": "oars", "acts_on": ("q",)}, "quality: "),
        ({"form": "oars", "acts_on": ("q",), "quality": (5.0, 1.0)}, "higher"),
        ({"form": "oars", "acts_on": ("q",), "quality": (1.0, 5.0), "gamma": 0.0}, "gamma=0.0"),
    ],
)
def test_impossible_gates_are_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_gate(gate(**keys), 0.5, {"q": spec("q")})


def test_a_gate_that_would_act_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="act on nothing"):
        check_gate(gate(), 0.5, {"f": spec("f", "fidelity")})
