"""Plans: formulas on numbers that can be checked by hand, the simulation against closed forms, and what a user gets wrong."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import yaml

from rlrestore.build import load_train_config
from rlrestore.cli import app
from rlrestore.config.files import read_yaml
from rlrestore.planning.memory import Copies, Network, Sharding
from rlrestore.planning.needs import checkpoint_bytes, cost, in_flight, run_seconds, traffic
from rlrestore.planning.past_run import constants_of
from rlrestore.planning.pipeline import (
    Pipeline,
    all_reduce_s,
    closed_form,
    pipeline_of,
    publish_s,
    samplers_to_feed,
    workers_to_hide,
)
from rlrestore.planning.plan import verdict
from rlrestore.planning.probe import line_through, ranks_together
from rlrestore.planning.published import checks, dit_forward_flops, published_table
from rlrestore.planning.scaling import at_size, stops_at, sweep
from rlrestore.planning.simulate import PARTS, simulate, without
from rlrestore.planning.workload import Bytes, Cluster, Constants, Cost, Workload
from tests.tiny import write_tiny

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
    fast = closed_form(pipe_of(WORK.replace(staleness=1)))
    assert fast.iteration == pytest.approx(13 + 0.28 + fast.publish)  # the trainer and the driver, above 10 + 1.6
    late = CONSTANTS.replace(score=Cost(0.0, 0.2))  # 12.8 s of scoring, of which 7.8 s are left when sampling ends
    one, two = (closed_form(pipe_of(WORK.replace(staleness=bound), late)).iteration for bound in (1, 2))
    assert one == pytest.approx(10 + 7.8 + 0.28)  # what is sampled during one update is not scored by its end
    assert two == pytest.approx(13.28)  # with two iterations to do it in, it is


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
    pipe = pipe_of(WORK.replace(staleness=2), CONSTANTS.replace(score=Cost(0.0, 1.0)))
    simulated = simulate(pipe, iterations=40)
    assert simulated.iteration_s == pytest.approx(64, rel=1e-6)
    assert simulated.busy["rewards"] > 0.9 > simulated.busy["trainers"]
    # with a worker a chunk, one behind, it is 10 s of sampling, the last chunk's 16 s and the driver
    more = pipe_of(WORK.replace(staleness=1, reward_workers=4), CONSTANTS.replace(score=Cost(0.0, 1.0)))
    assert simulate(more).iteration_s == pytest.approx(26.28, rel=1e-6)


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


# -- scaling -------------------------------------------------------------------------------------------------------


def test_strong_scaling_stops_where_there_is_nothing_left_to_deal_out() -> None:
    """64 rollouts of 1 s each: 64 GPUs at the most have work."""
    even = CONSTANTS.replace(sample=Cost(0.0, 1.0), step_s=0.0, score=Cost(), draw_s=0.0, driver_s=0.0)
    rows = sweep(WORK.replace(kind="colocated", ranks=1), even, FREE, weak=False, largest=256)
    at = {row.gpus: row for row in rows}
    assert at[64].efficiency == pytest.approx(1, rel=1e-6)
    assert at[128].images_per_s == pytest.approx(at[64].images_per_s)
    last = stops_at(rows)
    assert last is not None and last.gpus == 64
    assert at[128].bottleneck in ("sampling", "training")


def test_weak_scaling_stops_at_the_driver() -> None:
    """Chunks grow with the fleet, and one driver asks for them all: four calls a chunk, here of half a second."""
    work = WORK.replace(kind="colocated", ranks=1, tasks_drawn=8)
    rows = sweep(work, CONSTANTS.replace(draw_s=0.0), dataclasses.replace(FREE, call_s=0.5, per_node=8), True, 64)
    assert rows[-1].bottleneck == "driver"
    assert rows[-1].efficiency < 0.5 < rows[1].efficiency
    assert "driver" in verdict(work, tuple(rows))


def test_separate_keeps_its_ratio() -> None:
    sized, cluster = at_size(WORK.replace(ranks=1, rollout_actors=3), Cluster(per_node=8), 16, 2, weak=True)
    assert (sized.ranks, sized.rollout_actors, sized.groups, cluster.nodes) == (4, 12, 32, 2)


# -- bytes, files, money -------------------------------------------------------------------------------------------


def test_traffic_by_hand() -> None:
    lines = {line.name: line.value for line in traffic(WORK)}
    # groups of 8 in chunks of 16: no group is cut, so 8 tasks travel
    assert lines["tasks to samplers and rewards"] == 8 * 1000
    assert lines["images to rewards"] == 64 * 100
    assert lines["latents to trainers"] == 64 * 50
    assert lines["weights to samplers"] == 2 * 4000
    assert lines["object store"] == 8000 + 6400 + 3200 + 8000
    cut = {line.name: line.value for line in traffic(WORK.replace(chunk_rows=4))}
    assert cut["tasks to samplers and rewards"] == 16 * 1000  # every group lies in two chunks
    assert in_flight(WORK.replace(staleness=2)) == 3 * (8000 + 6400 + 3200 + 4000)


def test_checkpoint_by_hand() -> None:
    """1,000 parameters, all trained in float32; DeepSpeed ZeRO-1 keeps master weights beside them."""
    network = Network(parameters=1000, trained=1000, lora=False)
    torch_total = checkpoint_bytes(network, Sharding("torch"), Copies())[-1].value
    assert torch_total == 12_000 + 4000 + 4000 + 4000  # weights and moments, EMA, base, export
    zero = checkpoint_bytes(network, Sharding("deepspeed", 1, 2), Copies(old=True))[-1].value
    assert zero == 16_000 + 4000 + 4000 + 4000 + 4000


def test_run_and_cost_by_hand() -> None:
    constants = CONSTANTS.replace(evaluation_row_s=0.5, checkpoint_s=3.0)
    total = run_seconds(WORK, constants, 20.0)[-1].value
    assert total == pytest.approx(10 * 20 + 2 * 32 * 0.5 / 2 + 3)
    assert cost(16, 1800, 2.5).value == pytest.approx(20)  # 8 GPU hours


# -- from a log ------------------------------------------------------------------------------------------------------


def test_a_log_gives_itself_back() -> None:
    """Constants of a run, played on the machines of that run, take that run's time: the two lose nothing twice."""
    seconds = {"sample": 12.0, "score": 1.0, "update": 14.0, "publish": 0.0, "rest": 0.5, "iteration": 27.5}
    work = WORK.replace(kind="colocated")
    cluster = Cluster(per_node=2, cores=2.0)
    constants = constants_of(seconds, work, cluster, threads=1, source="a log")
    played = simulate(pipeline_of(work, constants, cluster))
    assert played.iteration_s == pytest.approx(27.5, rel=0.02)
    assert played.sample_s == pytest.approx(12, rel=0.02)


def test_a_line_through_two_measurements() -> None:
    assert line_through(8, 5.0, 16, 9.0) == Cost(1.0, 0.5)
    assert line_through(8, 5.0, 16, 4.0) == Cost(4.0, 0.0)  # noise: more rows took less
    assert line_through(1, 5.0, 16, 100.0) == Cost(0.0, 6.25)  # noise: a negative start
    assert line_through(4, 1.0, 4, 2.0) == Cost(0.0, 0.5)


# -- published runs --------------------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    # 2 blocks of hidden 4: 24 * 2 * 16 * 10 for the linears, 4 * 2 * 100 * 4 for attention
    assert dit_forward_flops(2, 4, 6, 4) == 7680 + 3200


def test_published_errors_are_what_the_table_says() -> None:
    """Two rows of a table of six were fitted: a = 6.275 s a forward, b = 28.625 s a trained step."""
    found = {check.run.split(" (")[0]: check for check in checks()}
    assert found["MixGRPO, window of 5"].predicted_s == pytest.approx(20 * 6.275 + 5 * 28.625, rel=1e-3)
    assert found["BranchGRPO"].predicted_s == pytest.approx(13.68 * (6.275 + 28.625), rel=1e-3)
    assert found["BranchGRPO"].error == pytest.approx(477.432 / 493 - 1, abs=1e-3)
    assert len(published_table().splitlines()) == 2 + len(checks())


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    return write_tiny(folder, "grpo")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        app(["plan", *(str(argument) for argument in arguments)])
    return int(stop.value.code or 0)


def test_probe_plans_a_cluster(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--probe",
        "--json",
        "--nodes",
        2,
        "--gpus-per-node",
        2,
        "--gpu-memory",
        24,
        "--price",
        2,
        "--largest",
        16,
    )
    assert call(tiny, *options) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpus"] == plan["work"]["ranks"] == 4
    assert sum(plan["constants"]["sample"].values()) > 0 and plan["constants"]["score"]["row_s"] > 0
    assert plan["simulated"]["iteration_s"] > 0
    assert plan["chosen"]["fits"] and plan["fits"][0]["name"] == "torch"
    assert plan["cost"]["value"] == pytest.approx(4 * plan["run"][-1]["value"] / 3600 * 2)
    assert [row["gpus"] for row in plan["scaling"]["strong"]["rows"]] == [1, 2, 4, 8, 16]
    assert not list(tiny.parent.glob("runs*"))  # nothing was trained or written


def test_ranks_that_have_cores_are_probed_together(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ("placement.kind=colocated", "placement.ranks=2", "placement.threads=1", "engine.kind=torch")
    assert call(tiny, *two, "--probe", "--json") == 0
    constants = json.loads(capsys.readouterr().out)["constants"]
    assert constants["ranks"] == min(2, os.cpu_count() or 1)
    config = load_train_config(tiny, [*two, "placement.threads=1024"])
    assert ranks_together(config) == 1  # they would wait for each other's cores


def test_an_all_reduce_that_was_measured_is_not_reckoned_as_well() -> None:
    cluster = dataclasses.replace(FREE, store_Bps=1000.0)
    assert pipe_of(cluster=cluster).reduce_s == pytest.approx(4.0)  # 4000 bytes, two ranks
    assert pipe_of(constants=CONSTANTS.replace(ranks=2), cluster=cluster).reduce_s == 0
    assert pipe_of(WORK.replace(ranks=4), CONSTANTS.replace(ranks=2), cluster).reduce_s == pytest.approx(6.0)


def test_without_a_probe_no_time_is_claimed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tiny) == 0
    text = capsys.readouterr().out
    assert "nothing is known of this config's speed" in text and "images a second" not in text
    assert "checkpoint" in text and "peak" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "0"], ["--nodes", "0"]),
        (["--nodes", "200"], ["200", "1024"]),
        (["--largest", "2000"], ["--largest", "1024"]),
        (["--price", "-1"], ["--price"]),
        (["--speedup", "nan"], ["--speedup"]),
        (["--probe", "--from-run", "x"], ["one of them"]),
        (["--from-run", "no/such/run"], ["no/such/run", "config.resolved.yaml"]),
        (["rollout.sample=4"], ["rollout.sample"]),
    ],
)
def test_what_the_user_gets_wrong(
    tiny: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert call(tiny, *options) == 64
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines


def test_a_plan_needs_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 64
    assert "needs a CONFIG" in capsys.readouterr().err


def test_validate_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--validate") == 0
    assert "| BranchGRPO (FLUX, 16 H200) | calibrated | 477 | 493 | -3% |" in capsys.readouterr().out


def test_the_log_of_another_job_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    past = read_yaml(tiny, ["env.size=64"])
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(past))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "time/iteration_s": 1.0}\n' * 3)
    assert call(tiny, "--from-run", tmp_path) == 64
    assert "env differ" in capsys.readouterr().err
