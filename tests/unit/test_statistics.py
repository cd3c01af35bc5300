"""Bootstrap intervals: coverage where the truth is known, and clusters that must not be taken apart."""

import math

import numpy as np
import pytest

from rlrestore.evaluation.statistics import bootstrap_ci


def test_coverage_of_a_known_mean():
    # 200 experiments of 25 photos with a skewed difference (exponential, mean 1): a 90 % interval must hold 1 in about
    # 90 % of them; the binomial std of that share is 2.1 %, and a skew of 2 at n = 25 costs BCa a few %
    rng = np.random.default_rng(0)
    samples = rng.exponential(1.0, (200, 25))
    intervals = [bootstrap_ci(x, level=0.9, resamples=500, seed=i) for i, x in enumerate(samples)]
    held = np.mean([i.low <= 1 <= i.high for i in intervals])
    assert 0.80 < held < 0.96


def test_interval_of_many_photos_is_the_normal_one():
    x = np.random.default_rng(1).normal(0.3, 2.0, 400)
    interval = bootstrap_ci(x, resamples=4000)
    half = 1.96 * x.std() / 20
    assert interval.mean == pytest.approx(x.mean())
    assert interval.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.1 * half)
    assert (interval.units, interval.clusters, interval.level) == (400, 400, 0.95)


def test_crops_of_one_photo_are_resampled_together():
    # 40 photos, each counted 4 times: as crops they add nothing, and taken as independent they would halve the interval
    x = np.random.default_rng(2).normal(size=40)
    alone = bootstrap_ci(x)
    crops = bootstrap_ci(np.repeat(x, 4), cluster_ids=[f"photo {i // 4}" for i in range(160)])
    naive = bootstrap_ci(np.repeat(x, 4))
    assert crops.clusters == 40
    assert crops.units == 160
    assert (crops.mean, crops.low, crops.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=1e-9)
    assert (naive.high - naive.low) / (alone.high - alone.low) == pytest.approx(0.5, abs=0.05)


def test_units_weigh_equally_whatever_the_size_of_their_cluster():
    # units 0, 0, 0 of photo a and 4 of photo b: mean over units 1, not over photos 2
    interval = bootstrap_ci([0.0, 0.0, 0.0, 4.0], cluster_ids=["a", "a", "a", "b"])
    assert interval.mean == 1
    assert interval.clusters == 2
    # 10 photos of 1 to 10 crops, all with a difference of 1 but one crop: no resample of photos has a mean far from 1
    sizes = range(1, 11)
    delta = [1.0] * 54 + [1.1]
    interval = bootstrap_ci(delta, cluster_ids=[photo for photo in sizes for _ in range(photo)])
    assert 1 <= interval.low <= interval.high < 1.02


def test_seeds_of_one_task_are_averaged_first():
    # +1 and -1 in every task: the seeds differ, the tasks do not
    interval = bootstrap_ci(np.tile([1.0, -1.0], (30, 1)))
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)


def test_missing_values_do_not_count_as_zero():
    # task means 1 (of its one known seed) and 3; the third task is unknown
    interval = bootstrap_ci([[1.0, math.nan], [2.0, 4.0], [math.nan, math.nan]])
    assert interval.mean == 2
    assert interval.units == 2


def test_one_photo_has_a_mean_but_no_interval():
    interval = bootstrap_ci([[0.5, 1.5]])
    assert interval.mean == 1
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert not interval.excludes_zero


def test_equal_differences_give_a_point():
    interval = bootstrap_ci([0.1] * 12)
    assert (interval.low, interval.high) == (interval.mean, interval.mean)
    assert interval.excludes_zero


def test_same_seed_same_interval():
    x = np.random.default_rng(3).normal(size=15)
    assert bootstrap_ci(x, seed=7) == bootstrap_ci(x, seed=7)
    assert bootstrap_ci(x, seed=7) != bootstrap_ci(x, seed=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta_by_unit": []}, "not empty"),
        ({"delta_by_unit": [[math.nan]]}, "missing"),
        ({"delta_by_unit": [1.0, math.inf]}, "cap the metric"),
        ({"delta_by_unit": [1.0, 2.0], "cluster_ids": ["a"]}, "1 cluster ids for 2 units"),
        ({"delta_by_unit": [1.0, 2.0], "level": 95}, "0.95"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(**arguments)
