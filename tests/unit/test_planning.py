"""Plans: formulas on numbers that can be checked by hand, the simulation against closed forms, and what a user gets wrong."""

from __future__ import annotations

import dataclasses

import pytest

from rlrestore.planning.pipeline import (
    Pipeline,
    all_reduce_s,
    closed_form,
    pipeline_of,
    publish_s,
    samplers_to_feed,
    workers_to_hide,
)
from rlrestore.planning.simulate import PARTS, simulate, without
from rlrestore.planning.workload import Bytes, Cluster, Constants, Cost, Workload

# 8 groups of 8 in chunks of 16: 4 chunks. Sampling 1 + 16 / 4 = 5 s a chunk, a micro-batch of 16 takes 2 s a point.
WORK = Workload(
    groups=8, samples=8, chunk_rows=16, micro_rows=16, points=3, updates=1, kind="separate", ranks=2, rollout_actors=2,
    reward_workers=1, staleness=0, iterations=10, evaluations=2, evaluation_rows=32, checkpoints=1, tasks_drawn=8,
    bytes=Bytes(task=1000, image=100, latent=50, published=4000, gradient=4000),
)  # fmt: skip
CONSTANTS = Constants(
    sample=Cost(1.0, 0.25), train=Cost(0.0, 0.125), step_s=1.0, score=Cost(0.0, 0.1), draw_s=0.01, driver_s=0.2,
    source="by hand",
)  # fmt: skip
FREE = Cluster(call_s=0.0, latency_s=0.0, store_Bps=1e30, link_Bps=1e30, device_link_Bps=1e30)


def pipe_of(work: Workload = WORK, constants: Constants = CONSTANTS, cluster: Cluster = FREE) -> Pipeline:
    return pipeline_of(work, constants, cluster)


def test_pieces_of_an_iteration() -> None:
    pipe = pipe_of()
    assert pipe.shares == ((5.0, 5.0), (5.0, 5.0))  # two chunks a sampler
    assert pipe.score_s == pytest.approx((1.6,) * 4)
    # 2 micro-batches a rank * 3 points * 2 s
    assert pipe.train_s == ((12.0, 12.0),)
    assert pipe.before_s == pytest.approx(0.08)


def test_synchronous_is_the_sum_of_what_nothing_hides() -> None:
    stages = closed_form(pipe_of())
    # sampling ends at 10 s with two chunks at once: 1.6 s each on one worker, of which the closed form shows one
    assert (stages.sample, stages.update) == (10.0, 13.0)
    assert stages.score == pytest.approx(1.6)
    assert stages.iteration == pytest.approx(10 + 1.6 + 13 + stages.publish + 0.08 + 0.2)


def test_asynchronous_is_the_slowest_stage() -> None:
    latency = 10 + 1.6 + 13 + 0.08 + 0.2
    one, two = (closed_form(pipe_of(WORK.replace(staleness=bound))) for bound in (1, 2))
    assert one.iteration == pytest.approx(max(10, 6.4, 13, latency / 2))
    assert two.iteration == pytest.approx(max(10, 6.4, 13, latency / 3))
    slow = closed_form(pipe_of(WORK.replace(staleness=1), CONSTANTS.replace(step_s=0.0, score=Cost(0.0, 0.2))))
    # training takes 12 s, but an iteration 10 + 3.2 + 12 + 0.28 s from draw to version, of which two may be under way
    assert slow.iteration == pytest.approx((10 + 7.8 + 12 + 0.28) / 2)


def test_ring_and_tree() -> None:
    cluster = Cluster(nodes=4, per_node=1, link_Bps=100.0, store_Bps=50.0, latency_s=0.5)
    # 2 * 3/4 * 1000 / 100 + 2 * log2(4) * 0.5
    assert all_reduce_s(1000, 4, cluster) == pytest.approx(15 + 2)
    assert all_reduce_s(1000, 1, cluster) == 0
    # put and read in the store, two hops of the tree, hashed twice at 1e9 bytes/s
    assert publish_s(1000, 4, cluster) == pytest.approx(2 * 20 + 2 * (10 + 0.5) + 2e-6)


def test_how_many_workers() -> None:
    slow = CONSTANTS.replace(score=Cost(0.0, 0.5))  # 32 s of scoring
    assert workers_to_hide(pipe_of(constants=slow)) == 4  # within 10 s of sampling
    assert workers_to_hide(pipe_of(WORK.replace(staleness=1), slow)) == 3  # within 13 s of training
    assert samplers_to_feed(pipe_of(WORK.replace(staleness=1))) == 2  # 20 s of sampling within 13 s


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("score_row_s", [0.01, 0.2])
def test_simulation_is_the_closed_form_without_chance(staleness: int, score_row_s: float) -> None:
    """One sampler and one reward worker, so that the order of equal chunks does not matter."""
    work = WORK.replace(rollout_actors=1, staleness=staleness)
    pipe = pipe_of(work, CONSTANTS.replace(score=Cost(0.0, score_row_s), driver_s=0.0, draw_s=0.0))
    assert simulate(pipe).iteration_s == pytest.approx(closed_form(pipe).iteration, rel=1e-9)


def test_one_reward_worker_saturates() -> None:
    """64 images at 1 s on one worker: 64 s an iteration, whatever the others do, and the worker is always busy."""
    pipe = pipe_of(WORK.replace(staleness=1), CONSTANTS.replace(score=Cost(0.0, 1.0)))
    simulated = simulate(pipe, iterations=40)
    assert simulated.iteration_s == pytest.approx(64, rel=1e-6)
    assert simulated.busy["rewards"] > 0.9 > simulated.busy["trainers"]
    # with a worker a chunk it is the latency of two iterations at once: 10 s, the last chunk's 16 s, 13 s, the driver's 0.28
    more = pipe_of(WORK.replace(staleness=1, reward_workers=4), CONSTANTS.replace(score=Cost(0.0, 1.0)))
    assert simulate(more).iteration_s == pytest.approx((10 + 16 + 13 + 0.28) / 2, rel=1e-6)


def test_staleness_is_bounded() -> None:
    fast = CONSTANTS.replace(sample=Cost(0.0, 0.001))  # samplers run as far ahead as they may
    for bound in (0, 1, 3):
        assert simulate(pipe_of(WORK.replace(staleness=bound), fast)).lag == pytest.approx(bound)


def test_cores_are_shared() -> None:
    """Two ranks and a reward worker on two cores: 2 * 10 + 6.4 core-seconds take 13.2 s where alone they would take 11.6."""
    work = WORK.replace(kind="colocated")
    alone = pipe_of(work, CONSTANTS, dataclasses.replace(FREE, per_node=2))
    shared = pipe_of(work, CONSTANTS, dataclasses.replace(FREE, per_node=2, cores=2.0))
    free, busy = simulate(alone), simulate(shared)
    assert free.sample_s + free.score_s == pytest.approx(10 + 3.2)  # the last two chunks on the one worker
    # while it scores the first two, 3.2 s of work, three processes share two cores
    assert busy.sample_s == pytest.approx(10 + 3.2 / 2)
    assert busy.update_s == pytest.approx(free.update_s)  # nobody scores then


def test_stragglers_cost_at_the_barrier() -> None:
    """The mean of the slowest of 64 lognormal times is far above the mean of one."""
    work = WORK.replace(groups=128, ranks=64, rollout_actors=64, reward_workers=64)
    calm, noisy = (simulate(pipe_of(work, CONSTANTS.replace(noise=noise))) for noise in (0.0, 0.2))
    assert noisy.update_s > 1.3 * calm.update_s
    assert simulate(without(pipe_of(work, CONSTANTS.replace(noise=0.2)), "stragglers")).update_s == calm.update_s


@pytest.mark.parametrize("part", sorted(PARTS))
def test_no_part_makes_it_slower_to_have_it_for_free(part: str) -> None:
    pipe = pipe_of(WORK, CONSTANTS, Cluster(nodes=2, per_node=1))
    assert simulate(without(pipe, part)).iteration_s <= simulate(pipe).iteration_s + 1e-9
