"""Rollouts ahead of training: what is sampled by which weights, and what makes stale rollouts fit the policy that trains on them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlrestore.algorithms.base import Policies
from rlrestore.build import build_algorithm, build_env, build_restorer, load_train_config
from rlrestore.config.files import ConfigError
from rlrestore.config.sections import AsynchronyConfig, CurriculumConfig
from rlrestore.crew import Crew, Flight
from rlrestore.diffusion.kernels import log_ratio_mean
from rlrestore.iteration.asynchrony import Pipeline, correct
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.curriculum import Curriculum
from rlrestore.iteration.rollout import Sampler
from rlrestore.learning.anchor import importance, join_trajectories, reanchor
from tests.tiny import tiny_config, write_tiny

AHEAD = ["placement.kind=separate", "asynchrony.ahead=1", "placement.max_staleness=1"]


def test_weights_are_importance_truncated_and_dropped() -> None:
    """truncate 2, drop 5: 1 and 0.5 count as they are, 3 counts 2; 6 and 0.1 (< 1/5) are dropped; who was masked stays masked."""
    advantage, weight = torch.tensor([1.0, -1.0, 1.0, 2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    credit = Credit(advantage, weight, {"kept": 1.0})
    ratios = torch.tensor([1.0, 0.5, 3.0, 6.0, 0.1, 1.0])
    found = correct(credit, ratios, AsynchronyConfig(ahead=1))
    assert found.weight_N.tolist() == [1.0, 0.5, 2.0, 0.0, 0.0, 0.0]
    assert found.advantage_N.tolist() == [1.0, -1.0, 1.0, 0.0, 0.0, 0.0]
    assert found.stats == {
        "kept": 1.0, "importance_mean": pytest.approx(10.6 / 5), "importance_truncated_frac": pytest.approx(1 / 5),
        "importance_dropped_frac": pytest.approx(2 / 5),
    }  # fmt: skip
    assert correct(credit, None, AsynchronyConfig()) is credit, "on policy nothing is touched"


def test_importance_is_in_nats_of_the_whole_latent() -> None:
    """Steps of log ratio 0.01 and 0.03 an element, 100 elements: 1 and 3 nats, their mean 2."""
    assert importance(torch.tensor([[0.01, 0.03], [0.0, 0.0]]), 100).tolist() == pytest.approx([math.e**2, 1.0])


def test_a_new_anchor_makes_the_ratio_one_and_says_what_it_was(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "grpo")
    restorer, algorithm = build_restorer(config.restorer), build_algorithm(config.algorithm)
    pipeline = Pipeline(config, build_env(config.env), Curriculum(config.curriculum, 0), _Recorder(), algorithm)
    draft = pipeline.draw(0)
    chunk, sampler, network = draft.chunks[0], Sampler(restorer), restorer.denoiser
    trajectory = sampler.sample(chunk, draft.chain, network, 0, "")[1].trajectory
    assert trajectory is not None
    condition, policies = sampler.condition(chunk), Policies(restorer, network)

    same, log_ratio_BS = reanchor(policies, trajectory, condition)
    assert torch.count_nonzero(log_ratio_BS) == 0, "the policy that sampled: ratio exactly 1"
    assert torch.equal(same.mean_NS, trajectory.mean_NS) and torch.equal(same.logp_NS, trajectory.logp_NS)

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    moved, log_ratio_BS = reanchor(policies, trajectory, condition)
    index = draft.chain.window[0]
    std = draft.chain.step(trajectory.z_NS[:, 0], torch.zeros_like(trajectory.z_NS[:, 0]), index).std
    # log N(x; m', s) - log N(x; m, s) = ((x - m)^2 - (x - m')^2) / (2 s^2), a mean over elements
    x, m, m_new = (each[:, 0].double() for each in (trajectory.z_next_NS, trajectory.mean_NS, moved.mean_NS))
    by_hand = (((x - m) ** 2 - (x - m_new) ** 2) / (2 * float(std) ** 2)).flatten(1).mean(1)
    assert torch.allclose(log_ratio_BS[:, 0].double(), by_hand, rtol=1e-3, atol=1e-7) and bool((by_hand != 0).all())
    again = log_ratio_mean(moved.mean_NS[:, 0], moved.mean_NS[:, 0], trajectory.z_next_NS[:, 0], std)
    assert torch.count_nonzero(again) == 0
    halves = join_trajectories([moved.take(slice(0, 2)), moved.take(slice(2, 4))])
    assert torch.equal(halves.mean_NS, moved.mean_NS) and halves.chain == moved.chain


class _Recorder(Crew):
    """Writes down which iteration is sampled by which version; one version an update."""

    ranks = samplers = 1

    def __init__(self) -> None:
        self.version, self.sampled = 0, []

    def submit(self, chunks, chain):
        self.sampled.append(self.version)
        return Flight(self.version, (chunks,), {})

    def collect(self, flight):
        return [flight.version]

    def roll_out(self, chunks, chain):
        return self.collect(self.submit(chunks, chain))

    def generate(self, chunks, chain, which, names=None): ...
    def score(self, chunks, images, names): ...
    def update(self, requests, chain): ...
    def publish(self): ...
    def probe(self, chunk, chain): ...
    def save(self, folder): ...
    def load(self, folder): ...
    def export(self, folder, which): ...
    def close(self): ...


@pytest.mark.parametrize(
    ("ahead", "lags"),
    [(0, [0, 0, 0, 0, 0, 0]), (1, [0, 1, 1, 1, 1, 1]), (2, [0, 1, 2, 2, 2, 2]), (9, [0, 1, 2, 3, 4, 5])],
)
def test_rollouts_lag_as_far_as_they_are_ahead_and_no_further(tmp_path: Path, ahead: int, lags: list[int]) -> None:
    """Six iterations; the first has nobody to be ahead of, and nothing is sampled beyond the last."""
    options = [
        "run.steps=6",
        "placement.kind=separate",
        f"asynchrony.ahead={ahead}",
        f"placement.max_staleness={ahead}",
    ]
    config = tiny_config(tmp_path, "grpo", options)
    crew = _Recorder()
    pipeline = Pipeline(
        config, build_env(config.env), Curriculum(CurriculumConfig(), 0), crew, build_algorithm(config.algorithm)
    )
    found, seen = [], []
    for iteration in range(6):
        draft, versions = pipeline.take(iteration)
        found += [iteration - version for version in versions]
        seen.append((draft.iteration, [task.id for task in draft.tasks]))
        pipeline.look_ahead(iteration)
        crew.version += 1
    assert found == lags and len(crew.sampled) == 6 and not pipeline.flying
    assert seen == [(i, [task.id for task in pipeline.draw(i).tasks]) for i in range(6)], "the same tasks as on policy"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["asynchrony.ahead=1"],
            r"asynchrony\.ahead=1 needs samplers beside the trainers and placement\.kind=local has none",
        ),
        (
            ["placement.kind=separate", "asynchrony.ahead=2", "placement.max_staleness=1"],
            "ahead=2 makes rollouts lag 2 version",
        ),
        (["asynchrony.truncate=6"], r"truncate=6 at least 1 and drop=5 no smaller"),
        (
            [*AHEAD, "asynchrony.ahead=2", "placement.max_staleness=2", "curriculum.candidates=2"],
            "set asynchrony.ahead=1 or",
        ),
        ([*AHEAD, "algorithm.kind=d3po"], "algorithm.kind=d3po has no correction"),
        ([*AHEAD, "algorithm.kind=refl"], "has no correction for stale rollouts: set asynchrony"),
    ],
)
def test_what_cannot_be_asynchronous_is_refused(tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_train_config(write_tiny(tmp_path, "grpo"), options)
