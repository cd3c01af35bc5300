"""The on-policy identity: what was sampled is what is replayed, in every placement and engine.

At the first update of an iteration the policy that trains is the policy that sampled, so every ratio is 1 and every
replayed log-probability is the recorded one. An error of the version, the batch, the seed or the weights shows here
first. One Ray serves all checks: starting it costs more than all of their arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from envs.base import Env
from rlrestore.actors.cluster import fetch
from rlrestore.actors.crew import RayCrew
from rlrestore.build import LearnerRecipe, build_crew, build_env
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import Crew, StageTimes
from rlrestore.learning.weights import SyncError
from rlrestore.types import UpdateReport
from tests.tiny import iterate, tiny_config

LIMIT_S = 300.0
# Every other way to take a policy gradient with a ratio, as configs/algorithms/ has them: kind, overrides.
METHODS = {
    "ddpo": (
        "grpo",
        ["sampling.sampler=ddim", "sampling.level=1.0", "sampling.window=3", "sampling.window_range=[0,3]"],
    ),
    "flow_dppo": ("flow_dppo", ["algorithm.updates=1"]),
    "grpo_guard": ("grpo_guard", ["algorithm.updates=1"]),
    "mix_grpo": ("grpo", ["sampling.window=1", "sampling.window_every=1"]),
}
IDENTITY = 1e-6  # what the issue owes; float32 rounds the mean of a transition to about 1e-7 of its std
RAY = [
    "placement.start_timeout_s=900", "placement.stage_timeout_s=300", "placement.threads=1", "placement.rank_cpus=0.2",
    "placement.rollout_cpus=0.2", "placement.reward_cpus=0.2", "ray.object_store_mb=80",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("on_policy")


@pytest.fixture(scope="module")
def env(folder: Path) -> Env:
    return build_env(tiny_config(folder, "grpo").env)


def run_two(crew: Crew, config: TrainConfig, env: Env) -> list[list[UpdateReport]]:
    """Two iterations: in the second the weights have moved, so that a stale copy would show."""
    return [iterate(crew, config, env, iteration)[1] for iteration in range(2)]


def assert_on_policy(iterations: list[list[UpdateReport]], updates: int) -> None:
    for reports in iterations:
        for report in reports:
            assert len(report.grad_norms) == updates and min(report.grad_norms) > 0
            assert report.maxima["ratio_deviation_max_on_policy"] < IDENTITY
            # the difference of two log-probs, each of about 1 nat a latent element, in float32
            assert report.maxima["logp_deviation_max_on_policy"] < IDENTITY
            if updates > 1:  # after a step the policy is another one
                assert report.maxima["ratio_deviation_max"] > 1e-5


# -- in this process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("batch", [4, 8])  # 8: two micro-batches of 4 replay what was sampled as one batch
def test_local_torch(folder: Path, env: Env, updates: int, batch: int) -> None:
    config = tiny_config(folder, "grpo", [f"algorithm.updates={updates}", f"rollout.batch={batch}"])
    crew = build_crew(config, StageTimes())
    assert_on_policy(run_two(crew, config, env), updates)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_this_process(folder: Path, env: Env, method: str) -> None:
    kind, options = METHODS[method]
    config = tiny_config(folder, kind, options)
    assert_on_policy(run_two(build_crew(config, StageTimes()), config, env), 1)


def test_a_policy_that_moved_behind_the_back_is_seen(folder: Path, env: Env) -> None:
    """The identity can fail: weights changed by 0.1 % between rollout and update."""
    config = tiny_config(folder, "grpo")
    crew = build_crew(config, StageTimes())
    roll_out = crew.roll_out

    def roll_out_and_move(chunks: Any, chain: Any) -> Any:
        yield from roll_out(chunks, chain)
        with torch.no_grad():
            for parameter in crew.learner.engine.network.parameters():
                parameter.mul_(1.001)

    crew.roll_out = roll_out_and_move
    reports = iterate(crew, config, env, 0)[1]
    assert reports[0].maxima["ratio_deviation_max_on_policy"] > 10 * IDENTITY
    assert reports[0].maxima["logp_deviation_max_on_policy"] > 10 * IDENTITY


def test_local_deepspeed(folder: Path, env: Env, straight: dict[str, Tensor]) -> None:
    for updates in (2, 1):
        config = tiny_config(folder, "grpo", ["engine.kind=deepspeed", f"algorithm.updates={updates}"])
        crew = build_crew(config, StageTimes())
        assert_on_policy(run_two(crew, config, env), updates)
    # one rank reduces nothing, and both engines step the same AdamW: not a bit differs
    assert difference(dict(crew.learner.weights("current")), straight) == 0
    crew.close()


@pytest.fixture(scope="module")
def straight(folder: Path, env: Env) -> dict[str, Tensor]:
    """Parameters after two updates with the torch engine on one rank."""
    config = tiny_config(folder, "grpo")
    crew = build_crew(config, StageTimes())
    run_two(crew, config, env)
    return {name: value.clone() for name, value in crew.learner.weights("current").items()}


# -- on Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def ray_ends() -> Iterator[None]:
    """Ray starts with the first crew that needs it, and stays for the others."""
    import ray

    yield
    ray.shutdown()


def ray_crew(config: TrainConfig) -> RayCrew:
    """A crew whose end leaves Ray to the next one."""
    crew = build_crew(config, StageTimes())
    assert isinstance(crew, RayCrew)
    crew.owns_ray = False
    return crew


@pytest.fixture(scope="module")
def colocated(folder: Path) -> Iterator[RayCrew]:
    config = tiny_config(
        folder, "grpo", ["engine.kind=deepspeed", "placement.kind=colocated", "placement.ranks=2", *RAY]
    )
    crew = ray_crew(config)
    yield crew
    crew.close()


def change_engine(crew: RayCrew, config: TrainConfig) -> None:
    """New learners in the same two processes: a second start of Ray actors would cost half a minute."""
    recipe = LearnerRecipe.of(config)
    setups = [
        trainer.setup.remote(recipe, rank, crew.ranks, "", 0, 1, crew.ranks, LIMIT_S)
        for rank, trainer in enumerate(crew.trainers)
    ]
    fetch(setups, LIMIT_S, "new learners")


def parameters_of(crew: RayCrew) -> dict[str, Tensor]:
    published = fetch([trainer.publish.remote("current", 0) for trainer in crew.trainers], LIMIT_S, "weights")
    assert published[1:] == [None] * (crew.ranks - 1)
    return load(published[0].blob)


@pytest.mark.parametrize("zero", [2, 3, 0, 1])
def test_colocated_zero(folder: Path, env: Env, colocated: RayCrew, straight: dict[str, Tensor], zero: int) -> None:
    """Two ranks that share the work move the weights as one rank does.

    Not bit for bit: the gradient is summed over 2 + 2 chunks instead of 4 in a row, and AdamW's first steps divide it
    by its own size, so that an element whose gradient is near 0 may differ by a part of the step, lr = 1e-3.
    """
    engine = ["engine.kind=deepspeed", f"engine.zero={zero}", "engine.partition_threshold=0"]
    for updates in (2, 1):
        options = [*engine, f"algorithm.updates={updates}", "placement.kind=colocated", "placement.ranks=2"]
        config = tiny_config(folder, "grpo", options)
        change_engine(colocated, config)
        assert_on_policy(run_two(colocated, config, env), updates)
    assert_same_training(parameters_of(colocated), straight)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_colocated(folder: Path, env: Env, colocated: RayCrew, method: str) -> None:
    kind, options = METHODS[method]
    for zero in (2, 3):
        engine = ["engine.kind=deepspeed", f"engine.zero={zero}", "engine.partition_threshold=0"]
        config = tiny_config(folder, kind, [*options, *engine, "placement.kind=colocated", "placement.ranks=2"])
        change_engine(colocated, config)
        assert_on_policy(run_two(colocated, config, env), 1)


@pytest.mark.slow  # a Ray crew each
@pytest.mark.parametrize("method", METHODS)
def test_every_method_separate(folder: Path, env: Env, method: str) -> None:
    kind, options = METHODS[method]
    placement = ["placement.kind=separate", "placement.ranks=1", "placement.rollout_actors=2"]
    config = tiny_config(folder, kind, [*options, *placement, *RAY])
    crew = ray_crew(config)
    try:
        assert_on_policy(run_two(crew, config, env), 1)
    finally:
        crew.close()


def test_separate(folder: Path, env: Env, straight: dict[str, Tensor]) -> None:
    """Rollout actors sample from published weights; their latents travel to the trainer."""
    options = ["placement.kind=separate", "placement.ranks=1", "placement.rollout_actors=2", *RAY]
    config = tiny_config(folder, "grpo", options)
    crew = ray_crew(config)
    try:
        assert_on_policy(run_two(crew, config, env), 1)
        assert crew.version == 2
        assert_same_training(parameters_of(crew), straight)
        config = tiny_config(folder, "grpo", [*options, "algorithm.updates=2"])
        change_engine(crew, config)  # the new learner is at version 0
        with pytest.raises(SyncError, match="older than version 2"):
            crew.publish()
    finally:
        crew.close()


def assert_same_training(moved: dict[str, Tensor], straight: dict[str, Tensor]) -> None:
    """After two steps of lr = 1e-3: 99 % of all elements agree to 1 % of a step, and none is off by more than both."""
    assert moved.keys() == straight.keys()
    gaps = torch.cat([(moved[name] - straight[name]).abs().flatten() for name in straight])
    assert float((gaps > 1e-5).float().mean()) < 0.01
    assert float(gaps.max()) < 4e-3


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
