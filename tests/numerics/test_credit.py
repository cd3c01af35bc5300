"""Advantages on numbers that can be worked out by hand, and what missing scores must not do."""

import json
import math

import pytest
import torch

from rlrestore.iteration.credit import Credit, group_credit
from rlrestore.iteration.history import RewardHistory

NAN = math.nan


def credit(rewards: list[list[float]], groups: int, weights=None, required=None, **options) -> Credit:
    """nan in `rewards` is a failed score; all rewards are required and of equal weight unless said."""
    utility_RN = torch.tensor(rewards)
    R = len(rewards)
    return group_credit(
        utility_RN,
        torch.tensor(weights or [1.0] * R),
        ~utility_RN.isnan(),
        torch.tensor(required if required is not None else [True] * R),
        groups,
        **options,
    )


def values(c: Credit) -> list[float]:
    return c.advantage_N.tolist()


@pytest.mark.parametrize("fuse", ["normalise_then_sum", "sum_then_normalise"])
@pytest.mark.parametrize("normalise", ["pooled", "group", "global"])
def test_a_failed_score_is_missing_not_zero(normalise, fuse):
    # valid mean .4, std sqrt(.08/3) = .163299; A = -+.2/(.163299 + 1e-4). A failure scored 0 would give the 4th +.447
    c = credit([[0.2, 0.6, NAN, 0.4]], 1, normalise=normalise, fuse=fuse)
    assert values(c) == pytest.approx([-1.223995, 1.223995, 0, 0], abs=1e-6)
    assert c.weight_N.tolist() == [1, 1, 0, 1]
    assert c.stats["masked_samples"] == 1
    assert c.stats["kept_samples"] == 3
    assert c.stats["adv_abs_mean"] == pytest.approx(2 * 1.223995 / 3, abs=1e-6)


@pytest.mark.parametrize("fuse", ["normalise_then_sum", "sum_then_normalise"])
@pytest.mark.parametrize(
    ("normalise", "std_1", "std_2"),
    [
        # in-group stds .163299 and .001633; pooled sqrt((.163299^2 + .001633^2)/2); global over all six
        ("pooled", 0.115476, 0.115476),
        ("global", 0.125836, 0.125836),
        ("group", 0.163299, 0.001633),
        ("none", 1 - 1e-4, 1 - 1e-4),
    ],
)
def test_the_second_group_is_a_near_tie(normalise, std_1, std_2, fuse):
    c = credit([[0.2, 0.6, 0.4, 0.5, 0.502, 0.498]], 2, normalise=normalise, fuse=fuse)
    a, b = 0.2 / (std_1 + 1e-4), 0.002 / (std_2 + 1e-4)
    # atol: .502 is 6e-9 off in float32, which group normalisation makes 6e-6
    assert values(c) == pytest.approx([-a, a, 0, 0, b, -b], rel=1e-4, abs=1e-5)


def test_global_and_group_of_the_near_tie_by_hand():
    near_tie = [[0.2, 0.6, 0.4, 0.5, 0.502, 0.498]]
    assert values(credit(near_tie, 2, normalise="global"))[4] == pytest.approx(0.015881, abs=1e-6)
    assert values(credit(near_tie, 2, normalise="group"))[4] == pytest.approx(1.154073, abs=1e-5)


def test_sum_then_normalise_lets_the_reward_of_large_units_win():
    # a MUSIQ-like and a CLIPIQA-like reward: correlation of A with the second is .63 against .90
    large, small = [10.0, 20.0, 30.0, 40.0], [0.3, 0.2, 0.1, 0.9]

    def correlation(fuse: str) -> float:
        pair = torch.stack([credit([large, small], 1, fuse=fuse).advantage_N, torch.tensor(small)])
        return torch.corrcoef(pair)[0, 1].item()

    assert correlation("sum_then_normalise") == pytest.approx(0.63, abs=0.005)
    assert correlation("normalise_then_sum") == pytest.approx(0.90, abs=0.005)


def test_normalise_then_sum_tells_agreement_of_two_rewards_from_one():
    # groups {(0,0), (0,1)} and {(0,0), (1,1)}, group std
    r1, r2 = [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]
    c = credit([r1, r2], 2, normalise="group", fuse="sum_then_normalise")
    assert values(c) == pytest.approx([-1, 1, -1, 1], abs=1e-3)
    c = credit([r1, r2], 2, normalise="group", fuse="normalise_then_sum")
    # shares 1/2: -+1/2 and -+1, std sqrt(5/8) > sqrt(1/2), so they are divided by sqrt(5/8)
    assert values(c) == pytest.approx([s / math.sqrt(5 / 8) for s in (-0.5, 0.5, -1, 1)], abs=1e-3)
    assert c.stats["adv_std"] == pytest.approx(1, abs=1e-6)


def test_weights_count_relative_to_each_other():
    # uncorrelated rewards, +-1 each: share 3/4 and 1/4, std sqrt(9 + 1)/4 = that of independent rewards, so A has std 1
    r1, r2 = [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]
    expected = [a / math.sqrt(10) for a in (4, 2, -2, -4)]
    for weights in ([3.0, 1.0], [0.3, 0.1]):
        assert values(credit([r1, r2], 1, weights)) == pytest.approx(expected, abs=1e-3)
    # a cost, share -1/4, turns the second around
    turned = [a / math.sqrt(10) for a in (2, 4, -4, -2)]
    assert values(credit([r1, r2], 1, [3.0, -1.0])) == pytest.approx(turned, abs=1e-3)


def test_rewards_in_conflict_are_not_amplified():
    r1 = [0.1, 0.2, 0.3, 0.4]
    c = credit([r1, [1 - r for r in r1]], 1)
    assert max(map(abs, values(c))) < 1e-5


def test_floor_keeps_a_nearly_constant_reward_quiet():
    quality, constant = [0.2, 0.4, 0.6, 0.8], [0.501, 0.499, 0.501, 0.499]
    loud = credit([quality, constant], 1)
    quiet = credit([quality, constant], 1, floor_R=torch.tensor([0.0, 0.1]))
    only = credit([quality], 1)
    assert abs(values(loud)[0] - values(only)[0]) > 0.5
    # std .001 against a floor of .1: 1 % of full volume is left; the sum has the std .5 of one share, not sqrt(.5)
    assert values(quiet) == pytest.approx([a / math.sqrt(2) for a in values(only)], abs=0.01)
    # alone, it stays quiet: -+.001/(.1 + 1e-4), no renormalisation to unit std
    alone = credit([constant], 1, floor_R=torch.tensor([0.1]))
    assert values(alone) == pytest.approx([0.00999, -0.00999, 0.00999, -0.00999], abs=1e-5)


@pytest.mark.parametrize("fuse", ["normalise_then_sum", "sum_then_normalise"])
def test_a_missing_optional_score_moves_nobody(fuse):
    quality = [0.2, 0.4, 0.6, 0.8]
    c = credit([quality, [0.5, NAN, 0.3, 0.7]], 1, required=[True, False], fuse=fuse, normalise="none")
    # shares 1/2; the second has mean .5 over its three members, and adds 0 to the 2nd sample
    assert values(c) == pytest.approx([-0.15, -0.05, 0.05 - 0.1, 0.15 + 0.1], abs=1e-6)
    assert c.weight_N.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("normalise", ["pooled", "group", "global"])
def test_a_missing_optional_score_stands_at_its_mean_in_a_sum(normalise):
    # .5 r1 + .5 * 90, also for the missing one: 45.1 45.2 45.3 45.4, std sqrt(.0125) (and 19.5 if it stood at 0)
    rewards = [[0.2, 0.4, 0.6, 0.8], [90.0, NAN, 90.0, 90.0]]
    c = credit(rewards, 1, required=[True, False], fuse="sum_then_normalise", normalise=normalise)
    std = math.sqrt(0.0125) + 1e-4
    assert values(c) == pytest.approx([a / std for a in (-0.15, -0.05, 0.05, 0.15)], rel=1e-4)


def test_floors_of_a_sum_add_up_by_weight_also_for_a_cost():
    # shares 3/4 and -1/4: sums -+.0075, floor .75 * .1 + .25 * .3 = .15
    c = credit([[0.01, 0.03], [0.5, 0.5]], 1, [3.0, -1.0], floor_R=[0.1, 0.3], fuse="sum_then_normalise")
    assert values(c) == pytest.approx([-0.0075 / 0.1501, 0.0075 / 0.1501], rel=1e-4)


@pytest.mark.parametrize("normalise", ["pooled", "group", "global", "none"])
@pytest.mark.parametrize("fuse", ["normalise_then_sum", "sum_then_normalise"])
def test_what_a_failed_score_holds_is_never_read(normalise, fuse):
    g = torch.Generator().manual_seed(0)
    utility_RN = torch.rand(3, 24, generator=g)
    valid_RN = torch.rand(3, 24, generator=g) > 0.2
    results = []
    for junk in (0.0, NAN, 1e9, -math.inf):
        filled = torch.where(valid_RN, utility_RN, junk)
        results.append(
            group_credit(filled, [1.0, 2.0, 0.5], valid_RN, [True, False, False], 4, normalise=normalise, fuse=fuse)
        )
    for other in results[1:]:
        assert torch.equal(other.advantage_N, results[0].advantage_N)
        assert torch.equal(other.weight_N, results[0].weight_N)
        assert other.stats == results[0].stats
    assert results[0].advantage_N.abs().sum() > 0
    # masked or not, the advantages of a group add up to 0 (no clamp was hit)
    assert results[0].advantage_N.view(4, 6).sum(1).abs().max() < 1e-5


def test_non_finite_counts_as_failed_even_if_called_valid():
    utility = torch.tensor([[0.2, 0.6, math.inf, 0.4]])
    c = group_credit(utility, [1.0], torch.ones(1, 4, dtype=torch.bool), [True], 1)
    assert values(c) == pytest.approx([-1.223995, 1.223995, 0, 0], abs=1e-6)


def test_a_sample_of_which_no_weighted_reward_is_known_is_masked():
    c = credit([[0.2, NAN, 0.6, 0.4], [9.0, 9.0, 9.0, 9.0]], 1, weights=[1.0, 0.0], required=[False, False])
    assert c.weight_N.tolist() == [1, 0, 1, 1]
    assert values(c) == pytest.approx([-1.223995, 0, 1.223995, 0], abs=1e-6)


def test_groups_with_too_few_valid_members_are_dropped():
    # K = 5: default min_valid is max(2, ceil(2.5)) = 3; the first group has 2
    rewards = [[0.2, 0.6, NAN, NAN, NAN, 0.2, 0.6, 0.4, NAN, NAN]]
    c = credit(rewards, 2)
    assert c.weight_N.tolist() == [0] * 5 + [1, 1, 1, 0, 0]
    assert values(c)[:5] == [0] * 5
    assert values(c)[5:8] == pytest.approx([-1.223995, 1.223995, 0], abs=1e-6)  # the dropped group enters no std
    assert c.stats["dropped_groups"] == c.stats["dropped_groups_invalid"] == 1
    assert c.stats["masked_samples"] == 5
    assert credit(rewards, 2, min_valid=2).weight_N.sum() == 5


def test_groups_without_spread_are_counted_and_dropped_on_request():
    rewards = [[0.5, 0.5, 0.5, 0.2, 0.6, 0.4]]
    c = credit(rewards, 2)
    assert values(c)[:3] == [0, 0, 0]
    assert c.weight_N.tolist() == [1] * 6
    assert (c.stats["zero_spread_groups"], c.stats["dropped_groups"]) == (1, 0)
    assert c.stats["group_spread_mean"] == pytest.approx(0.163299 / 2, abs=1e-6)
    c = credit(rewards, 2, min_spread=0.01)
    assert c.weight_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert values(c)[3:] == pytest.approx([-1.223995, 1.223995, 0], abs=1e-6)  # pooled over the kept group only
    assert (c.stats["zero_spread_groups"], c.stats["dropped_groups"], c.stats["dropped_groups_invalid"]) == (1, 1, 0)
    assert c.stats["masked_samples"] == 0


@pytest.mark.parametrize("normalise", ["pooled", "group", "global", "none"])
@pytest.mark.parametrize("rewards", [[[0.5] * 4], [[NAN] * 4], [[0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]]])
def test_nothing_to_learn_is_zero_not_nan(normalise, rewards):
    c = credit(rewards, 2, normalise=normalise)
    assert c.advantage_N.abs().max() < 1e-9
    assert all(math.isfinite(v) for v in c.stats.values())


def test_one_sample_a_group_teaches_nothing():
    c = credit([[0.1, 0.9]], 2)
    assert c.weight_N.tolist() == [0, 0]
    assert values(c) == [0, 0]


def test_clamp_acts_after_fusion():
    # one of 64 far ahead: A = (63/64)/sqrt(63)/8 = 7.9 unclamped
    rewards = [[1.0] + [0.0] * 63]
    c = credit(rewards, 1)
    assert max(values(c)) == 5
    assert c.stats["clamped_frac"] == pytest.approx(1 / 64)
    assert max(values(credit(rewards, 1, clamp=10.0))) == pytest.approx(63 / 64 / (math.sqrt(63) / 64 + 1e-4), rel=1e-5)


def test_easy_and_hard_photos_do_not_matter():
    # adding a constant to a group changes nothing; permuting samples permutes credit
    base = torch.rand(2, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = base + torch.tensor([[10.0] * 6 + [-3.0] * 6], dtype=torch.float64)
    ok, order = torch.ones(2, 12, dtype=torch.bool), torch.tensor([2, 0, 1, 5, 4, 3, *range(6, 12)])
    a = group_credit(base, [1.0, 1.0], ok, [True, True], 2).advantage_N
    torch.testing.assert_close(group_credit(moved, [1.0, 1.0], ok, [True, True], 2).advantage_N, a)
    torch.testing.assert_close(group_credit(base[:, order], [1.0, 1.0], ok, [True, True], 2).advantage_N, a[order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "divide"),
        ({"weights": [0.0]}, "weights"),
        ({"normalise": "rank"}, "pooled"),
        ({"fuse": "mean"}, "normalise_then_sum"),
    ],
)
def test_refusals_name_the_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        credit([[0.1, 0.2, 0.3, 0.4]], **{"groups": 2, **change})


def test_leave_one_out_by_hand():
    # .2 against the mean of .6, .4: -.3; .6: +.3; .4: 0. The failed one is nobody's baseline
    c = credit([[0.2, 0.6, NAN, 0.4]], 1, normalise="none", baseline="leave_one_out")
    assert values(c) == pytest.approx([-0.3, 0.3, 0, 0], abs=1e-6)
    # std normalisation takes the factor away again, up to its epsilon
    mean, others = (credit([[1.0, 2.0, 6.0]], 1, normalise="none", baseline=b) for b in ("mean", "leave_one_out"))
    assert values(others) == pytest.approx([1.5 * value for value in values(mean)])


def test_ranks_by_hand():
    # .1 < .5 = .5 < 9: ranks 0, 1.5, 1.5, 3 of 3, scaled to -1, 0, 0, 1: the outlier has no more pull than the last
    c = credit([[0.5, 9.0, 0.1, 0.5]], 1, normalise="none", rank=True)
    assert values(c) == pytest.approx([0, 1, -1, 0])
    # the failed one is not ranked: .1 and .5 of two
    c = credit([[0.5, NAN, 0.1, NAN]], 1, normalise="none", rank=True, min_valid=2)
    assert values(c) == pytest.approx([1, 0, -1, 0])


def test_a_spread_below_the_floor_is_one_tie():
    rewards = [[0.500, 0.501, 0.502, 0.1, 0.5, 0.9]]
    c = credit(rewards, 2, normalise="none", rank=True, floor_R=[0.01])
    assert values(c) == pytest.approx([0, 0, 0, -1, 0, 1])


# --- against the past of each photo (DDPO) -----------------------------------------------------------------------------


def test_a_photo_is_compared_with_its_last_scores():
    history = RewardHistory(depth=4)
    # no photo has 4 scores yet: the batch (1, 3, 5, 7) with mean 4 and std sqrt 5 serves for both
    first = history.credit(["a", "b"], torch.tensor([1.0, 3.0, 5.0, 7.0]), clamp=5.0)
    assert values(first) == pytest.approx([(x - 4) / (math.sqrt(5) + 1e-4) for x in (1, 3, 5, 7)], abs=1e-6)
    # a has (1, 3, 2, 6): mean 3, std sqrt(14 / 4); c is new and takes the batch (2, 6, 8, 8): mean 6, std sqrt 6
    second = history.credit(["a", "c"], torch.tensor([2.0, 6.0, 8.0, 8.0]), clamp=5.0)
    a, c = math.sqrt(3.5) + 1e-4, math.sqrt(6) + 1e-4
    assert values(second) == pytest.approx([-1 / a, 3 / a, 2 / c, 2 / c], abs=1e-6)
    assert second.stats["photos_with_history"] == 1
    # the oldest scores are forgotten: a is (2, 6, 4, 4) now
    third = history.credit(["a"], torch.tensor([4.0, 4.0]), clamp=5.0)
    assert values(third) == pytest.approx([0, 0], abs=1e-6)


def test_a_failed_score_is_not_remembered():
    history = RewardHistory(depth=2)
    credit = history.credit(["a"], torch.tensor([1.0, NAN, 3.0]), clamp=0.5)
    assert values(credit) == [-0.5, 0, 0.5]  # +-1 / (1 + 1e-4), clamped
    assert credit.weight_N.tolist() == [1, 0, 1]
    assert credit.stats["masked_samples"] == 1 and credit.stats["clamped_frac"] == 1
    assert history.state_dict() == {"a": [1.0, 3.0]}


def test_a_history_continues_from_its_saved_state():
    straight, resumed = RewardHistory(depth=4), RewardHistory(depth=4)
    straight.credit(["a", "b"], torch.rand(8), clamp=5.0)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    mix = torch.rand(4)
    assert values(straight.credit(["b"], mix, clamp=5.0)) == values(resumed.credit(["b"], mix, clamp=5.0))


# --- normalisers of single rewards, penalties, vetoes ------------------------------------------------------------------


def test_a_reward_may_have_a_normaliser_of_its_own():
    # min_max: 0, .25, 1, .75 less .5 (floor 0, + 1e-4 of 4); alone its weight is 1, and 1 std is never amplified to
    c = credit([[1.0, 2.0, 5.0, 4.0]], 1, normalise_R=["min_max"])
    assert values(c) == pytest.approx([-0.5, -0.25, 0.5, 0.25], abs=2e-5)
    # None leaves the other one as it was
    rewards = [[1.0, 2.0, 5.0, 4.0], [0.3, 0.1, 0.2, 0.9]]
    assert values(credit(rewards, 1, normalise_R=[None, None])) == values(credit(rewards, 1))
    assert values(credit(rewards, 1, normalise_R=["group_z", "group_z"])) == values(
        credit(rewards, 1, normalise="group")
    )


@pytest.mark.parametrize("fuse", ["normalise_then_sum", "sum_then_normalise"])
def test_no_penalty_is_bitwise_nothing(fuse):
    rewards = [[0.2, 0.6, NAN, 0.4], [1.0, 7.0, 2.0, 3.0]]
    plain = credit(rewards, 1, fuse=fuse)
    fined = credit(rewards, 1, fuse=fuse, penalty_N=torch.zeros(4), veto_N=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(plain.advantage_N, fined.advantage_N) and plain.stats == fined.stats


def test_a_penalty_is_subtracted_in_stds_of_the_mix():
    # z of 0, 1 is -+1 (std .5, + 1e-4: .9998). Penalties 0, .5 less their mean .25: -.25, .25, so -.7498, .7498; rms below 1: kept
    c = credit([[0.0, 1.0]], 1, penalty_N=torch.tensor([0.0, 0.5]))
    assert values(c) == pytest.approx([-0.749800, 0.749800], abs=1e-6)
    # a price of 4: .9998 - 2 turns the order round; then unit std again
    c = credit([[0.0, 1.0]], 1, penalty_N=torch.tensor([0.0, 4.0]))
    assert values(c) == pytest.approx([1.0, -1.0], abs=1e-6)


def test_a_penalty_that_all_pay_or_nobody_knows_moves_nothing():
    plain = values(credit([[0.0, 1.0, 3.0]], 1))
    assert values(credit([[0.0, 1.0, 3.0]], 1, penalty_N=torch.full((3,), 7.0))) == pytest.approx(plain)
    assert values(credit([[0.0, 1.0, 3.0]], 1, penalty_N=torch.full((3,), NAN))) == plain


def test_a_penalty_of_a_masked_rollout_is_never_read():
    one, other = (credit([[0.0, 1.0, NAN]], 1, penalty_N=torch.tensor([0.0, 0.5, hidden])) for hidden in (-9.0, 1e6))
    assert torch.equal(one.advantage_N, other.advantage_N) and one.stats == other.stats


def test_a_tied_group_that_pays_differently_is_not_dropped():
    tied = [[1.0, 1.0]]
    assert credit(tied, 1, min_spread=0.01).stats["dropped_groups"] == 1
    c = credit(tied, 1, min_spread=0.01, penalty_N=torch.tensor([0.0, 1.0]))
    assert c.stats["dropped_groups"] == 0 and values(c) == pytest.approx([0.5, -0.5])


def test_a_veto_takes_the_worst_advantage():
    # z of 0, 1, 2, 5 (mean 2, std sqrt(3.5) = 1.870829): -1.068988, -.534494, 0, 1.603482; the last becomes the first: mean
    # (-1.068988 * 2 - .534494) / 4 = -.668118 is taken off again
    vetoed = torch.tensor([False, False, False, True])
    c = credit([[0.0, 1.0, 2.0, 5.0]], 1, veto_N=vetoed)
    assert values(c) == pytest.approx([-0.400871, 0.133624, 0.668118, -0.400871], abs=1e-4)
    assert values(credit([[0.0, 1.0, 2.0, 5.0]], 1, veto_N=torch.ones(4, dtype=torch.bool))) == [0, 0, 0, 0]


# ---- weights between groups


def test_weights_between_groups_by_hand():
    # stretched to [0, 1] the first group is 1 .875 .5 .375 .125 0 with std .363837, the second 1 .75 .5 .5 .25 0 with .322749;
    # their mean is .343293
    rewards = torch.tensor([[0.9, 0.8, 0.5, 0.4, 0.2, 0.1, 0.6, 0.55, 0.5, 0.5, 0.45, 0.4]])
    valid = torch.ones_like(rewards, dtype=torch.bool)
    found = group_credit(rewards, [1.0], valid, [True], 2, between="spread")
    expected = torch.tensor([1.020544] * 6 + [0.979456] * 6)
    torch.testing.assert_close(found.weight_N, expected, atol=1e-5, rtol=0)
    equal = group_credit(rewards, [1.0], valid, [True], 2)
    assert torch.equal(found.advantage_N, equal.advantage_N) and equal.weight_N.tolist() == [1.0] * 12
    # a tied group: sigma 0 against .363837, mean .181919; and a reward below its floor has no say
    tied = torch.cat([rewards[:, :6], torch.full((1, 6), 0.5)], 1)
    weight_N = group_credit(tied, [1.0], valid, [True], 2, between="spread").weight_N
    torch.testing.assert_close(weight_N, torch.tensor([1.181919] * 6 + [0.818081] * 6), atol=1e-5, rtol=0)
    assert (
        group_credit(rewards, [1.0], valid, [True], 2, between="spread", floor_R=[9.0]).weight_N.tolist() == [1.0] * 12
    )


def test_masked_members_and_dropped_groups_have_no_weight_between_groups_either():
    rewards = torch.tensor([[0.9, 0.1, 0.5, 0.4, 0.2, 0.6]])
    valid = torch.tensor([[True, True, False, True, False, False]])
    found = group_credit(rewards, [1.0], valid, [True], 2, between="spread")
    assert found.weight_N.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0] and found.dropped(2) == [1]
