"""Direct back-propagation: what is differentiated is what was sampled and scored, and its gradient leads upward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards.differentiable import DifferentiableMix
from rewards.rubric import Rubric
from rlrestore.build import build_crew, build_env, build_term
from rlrestore.config.files import ConfigError
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import LocalCrew, StageTimes
from rlrestore.iteration.stages import combine, make_chunks, rollout_chain
from tests.tiny import iterate, tiny_config

NO_MOVE = 1e-5  # float32: 8-bit pixels are left out, only the order of sums differs


def local(config: TrainConfig) -> LocalCrew:
    crew = build_crew(config, StageTimes())
    assert isinstance(crew, LocalCrew)
    return crew


def mean_mix(scored: list, config: TrainConfig) -> float:
    return float(combine(scored, Rubric(list(config.rewards.values()))).mix_N.mean())


@pytest.mark.parametrize("last", [1, 3])
def test_draft_ends_where_the_rollout_ended(tmp_path: Path, last: int) -> None:
    """On policy the trained part repeats the rollout's: from the kept state to the same final latent."""
    config = tiny_config(tmp_path, "draft", [f"algorithm.last={last}"])
    learner = local(config).learner
    chain = rollout_chain(config.sampling, 0, 0, learner.algorithm)
    assert chain.window == (config.sampling.steps - last,)
    tasks = build_env(config.env).draw(0, 1)
    (chunk,) = make_chunks(tasks, 4, 4, 0, 0)
    _, latents = learner.sampler.sample(chunk, chain, learner.engine.network, 0, "")
    assert latents.trajectory is not None
    z = latents.trajectory.z_NS[:, 0]
    condition = learner.sampler.condition(chunk)
    for index in range(chain.window[0], chain.evaluations):
        t, t_next = chain.times[index], chain.times[index + 1]
        z = z + (t_next - t) * learner.restorer.velocity(z, torch.full((4,), t), condition).detach()
    assert float((z - latents.z_0).abs().max()) < NO_MOVE


def test_recomputed_activations_give_the_same_step(tmp_path: Path) -> None:
    env = build_env(tiny_config(tmp_path, "draft").env)
    weights = []
    for recompute in (False, True):
        config = tiny_config(tmp_path, "draft", ["algorithm.last=2", f"algorithm.recompute={str(recompute).lower()}"])
        crew = local(config)
        _, (report,) = iterate(crew, config, env, 0)
        assert report.rows["current"] == 16 * 2 * (
            1 + recompute
        )  # 16 rollouts, 2 steps; each once more in the backward
        weights.append(crew.learner.weights("current"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_mix_that_is_climbed_is_the_one_that_is_scored(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "draft")
    terms = list(config.rewards.values())
    mix = DifferentiableMix(terms, [build_term(term) for term in terms])
    crew = local(config)
    tasks = build_env(config.env).draw(0, 2)
    (chunk,) = make_chunks(tasks, 4, 8, 0, 0)
    (scored,) = crew.roll_out([chunk], rollout_chain(config.sampling, 0, 0, crew.learner.algorithm))
    pixels: Tensor = scored.images.pixels.float() / 255
    expected = combine([scored], Rubric(terms)).mix_N
    torch.testing.assert_close(mix(pixels, chunk.tasks_of(slice(None))), expected, atol=NO_MOVE, rtol=NO_MOVE)


@pytest.mark.parametrize("kind", ["draft", "refl"])
def test_a_step_raises_the_mix_of_the_same_rollouts(tmp_path: Path, kind: str) -> None:
    """Same photos, same noise, one small step of each method; with the sign turned it falls."""
    config = tiny_config(tmp_path, kind, ["engine.lr=3e-4", "run.steps=3"])
    env, crew = build_env(config.env), local(config)
    mixes = []
    for _ in range(3):
        scored, _ = iterate(crew, config, env, 0)
        mixes.append(mean_mix(scored, config))
    assert mixes[0] < mixes[1] < mixes[2]


def test_a_reward_without_a_gradient_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gradient of every reward and niqe has none: move it to evaluate\.gold"):
        tiny_config(tmp_path, "refl", ["rewards.niqe.weight=1"])


def test_a_solver_that_remembers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set sampling\.solver=euler"):
        tiny_config(tmp_path, "draft", ["sampling.solver=dpmpp_2m"])
