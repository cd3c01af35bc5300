"""The rubric's arithmetic and the failure budget, on numbers that a reader can check."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rewards.base import RewardSpec, Scores, checked_scores
from rewards.rubric import FailureBudget, RewardBudgetError, Rubric, TermConfig

OPEN = (None, None)


def spec(
    name: str, block: str = "quality", up: bool = True, scale: float = 1.0, needs: frozenset[str] = frozenset()
) -> RewardSpec:
    return RewardSpec(name, "1", up, OPEN, needs, block, scale, False, True, "own code")  # type: ignore[arg-type]


def rows(*values: float) -> Scores:
    return checked_scores(torch.tensor(values), OPEN)


def rubric(*terms: tuple[TermConfig, RewardSpec], block_mass: dict[str, float] | None = None) -> Rubric:
    return Rubric([t for t, _ in terms], block_mass, [s for _, s in terms])


def test_blocks_share_equally_however_many_terms_they_have() -> None:
    r = rubric(
        (TermConfig("a", weight=1.0), spec("a")),
        (TermConfig("b", weight=3.0), spec("b")),
        (TermConfig("c", weight=7.0), spec("c", "fidelity")),
        (TermConfig("d", role="gold"), spec("d", "fidelity")),
    )
    # quality has 1/2, split 1:3; fidelity has 1/2, all of it c's; gold terms have none
    assert r.weight_R.tolist() == pytest.approx([0.125, 0.375, 0.5, 0.0])


def test_one_block_alone_has_all_the_mass_and_block_mass_overrides() -> None:
    assert rubric((TermConfig("a"), spec("a")), (TermConfig("b"), spec("b"))).weight_R.tolist() == pytest.approx(
        [0.5, 0.5]
    )
    r = rubric(
        (TermConfig("a"), spec("a")),
        (TermConfig("c"), spec("c", "fidelity")),
        block_mass={"quality": 3.0, "fidelity": 1.0},
    )
    assert r.weight_R.tolist() == pytest.approx([0.75, 0.25])


def test_utility_is_aligned_and_scaled() -> None:
    r = rubric(
        (TermConfig("up", scale=2.0), spec("up")), (TermConfig("down"), spec("down", "fidelity", up=False, scale=0.5))
    )
    out = r.combine({"up": rows(4.0, 6.0), "down": rows(1.0, 0.25)})
    assert out.utility_RN.tolist() == [[2.0, 3.0], [-2.0, -0.5]]  # 4/2, 6/2; -1/.5, -.25/.5
    assert out.mix_N.tolist() == pytest.approx([0.0, 1.25])  # (2 - 2)/2, (3 - .5)/2
    assert out.raw_RN.tolist() == [[4.0, 6.0], [1.0, 0.25]]
    assert out.floor_R.tolist() == pytest.approx([0.1, 0.1])


def test_a_missing_required_score_masks_the_row_and_an_optional_one_is_neutral() -> None:
    terms = ((TermConfig("a"), spec("a")), (TermConfig("b", required=False), spec("b")))
    out = rubric(*terms).combine({"a": rows(1.0, 2.0, math.nan), "b": rows(4.0, math.nan, 8.0)})
    assert out.valid_N.tolist() == [True, True, False]
    assert out.valid_RN.tolist() == [[True, True, False], [True, False, True]]
    # row 1 takes b's mean over its valid rows, (4 + 8)/2 = 6: mix = (2 + 6)/2
    assert out.mix_N[:2].tolist() == pytest.approx([2.5, 4.0]) and out.mix_N[2].isnan()
    assert out.reason_RN == (("", "", "non-finite"), ("", "non-finite", ""))


def test_a_failed_gold_metric_masks_nothing() -> None:
    out = rubric((TermConfig("a"), spec("a")), (TermConfig("g", role="gold"), spec("g"))).combine(
        {"a": rows(1.0), "g": Scores.failed(1, "infra: timeout")}
    )
    assert out.valid_N.tolist() == [True] and out.mix_N.tolist() == [1.0]


def test_all_invalid_gives_all_masked() -> None:
    out = rubric((TermConfig("a"), spec("a"))).combine({"a": Scores.failed(3, "infra: timeout")})
    assert not out.valid_N.any() and out.mix_N.isnan().all() and out.utility_RN.isnan().all()


def test_a_linear_change_of_a_metric_leaves_utility_differences_alone() -> None:
    # r -> 3 r + 5 with the scale times 3: utilities shift by a constant, differences stay
    a, b = rows(0.0, 1.0, 4.0), rows(5.0, 8.0, 17.0)
    u = rubric((TermConfig("a"), spec("a"))).combine({"a": a}).utility_RN
    v = rubric((TermConfig("a", scale=3.0), spec("a"))).combine({"a": b}).utility_RN
    assert torch.allclose(u.diff(), v.diff())


def test_needs_is_the_union_and_names_can_be_given() -> None:
    r = Rubric(
        [
            TermConfig("low_frequency"),
            TermConfig("psnr_y", role="gold"),
            TermConfig("consistency", name="degrade_again"),
        ]
    )
    assert r.needs == frozenset({"lq", "gt"})
    assert r.names == ("low_frequency", "psnr_y", "degrade_again")


@pytest.mark.parametrize(
    ("terms", "part"),
    [
        ([], "at least one term"),
        ([TermConfig("gmsd", role="gold")], "role: reward"),
        ([TermConfig("gmsd"), TermConfig("gmsd")], "2 reward terms are called 'gmsd'"),
        ([TermConfig("gmsd", weight=-1.0)], "weight -1.0"),
        ([TermConfig("gmsd", weight=0.0)], "sum to 0"),
        ([TermConfig("gmsd", scale=0.0)], "scale 0.0"),
        ([TermConfig("gmsd", floor=0.0)], "floor 0.0"),
        ([TermConfig("gmsd", timeout_s=0.0)], "timeout_s 0.0"),
        ([TermConfig("gmsd", role="silver")], "one of reward, gold, gate, constraint"),  # type: ignore[arg-type]
    ],
)
def test_impossible_terms_are_refused(terms: list[TermConfig], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Rubric(terms)


def test_block_mass_must_cover_the_blocks() -> None:
    with pytest.raises(ValueError, match="gmsd belong to it"):
        Rubric([TermConfig("gmsd")], {"quality": 1.0})
    with pytest.raises(ValueError, match="'quality' and 'fidelity'"):
        Rubric([TermConfig("gmsd")], {"fidelty": 1.0})


def batch(n: int, failed: int, reason: str = "non-finite") -> Scores:
    return Scores(torch.zeros(n), torch.arange(n) >= failed, (reason,) * failed + ("",) * (n - failed))


def test_budget_names_the_reward_the_reason_and_both_numbers() -> None:
    budget = FailureBudget(max_fraction=0.05, window=50)
    budget.update({"good": batch(100, 5), "bad": batch(100, 5)})
    budget.check()  # 5 of 100 is 5 %: allowed
    budget.add("bad", batch(100, 6, "data: no face"))
    with pytest.raises(
        RewardBudgetError, match=r"'bad' failed on 11 of its last 200 scores \(5.5%\); 5.0% is allowed.*data: no face"
    ):
        budget.check()  # 11 of 200 is 5.5 %


def test_budget_forgives_one_bad_photo_at_the_start_but_not_a_dead_reward() -> None:
    budget = FailureBudget(max_fraction=0.05, min_scores=100)
    budget.add("r", batch(8, 1))
    budget.check()  # 1 > 0.05 * 8, but the denominator is at least 100
    budget.add("r", Scores.failed(8, "infra: timeout"))
    with pytest.raises(RewardBudgetError):
        budget.check()  # 9 > 5


def test_budget_forgets_what_left_the_window() -> None:
    budget = FailureBudget(max_fraction=0.05, window=2)
    budget.add("r", batch(100, 5))
    for _ in range(2):
        budget.add("r", batch(100, 0))
    assert budget.recent("r")[:2] == (0, 200) and budget.fractions() == {"r": 0.0}
    assert budget.total["r"] == {"non-finite": 5}


def test_budget_resumes_through_json() -> None:
    budget, resumed = FailureBudget(window=3), FailureBudget(window=3)
    for k in range(4):
        budget.add("r", batch(50, k))
    resumed.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    for b in (budget, resumed):
        b.add("r", batch(50, 2))
    assert resumed.recent("r") == budget.recent("r") == (2 + 3 + 2, 150, budget.recent("r")[2])
    assert resumed.state_dict() == budget.state_dict()
