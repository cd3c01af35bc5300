"""Every algorithm in the dictionary, through the real learner: it moves the policy, and asks the networks no more than it must."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from envs.base import Env
from rlrestore.algorithms.registry import ALGORITHMS
from rlrestore.build import build_crew, build_env, load_train_config
from rlrestore.config.files import ConfigError
from rlrestore.crew import LocalCrew, StageTimes
from rlrestore.iteration.stages import cost_metrics, rollout_chain
from tests.tiny import iterate, tiny_config

# Forwards of the current, old and reference networks at one training point of one micro-batch (docs/algorithms.md, "Cost").
COST = {
    "awm": (1, 1, 0),
    "d3po": (1, 0, 1),
    "dgpo": (1, 1, 1),
    "dpo": (1, 0, 1),
    "draft": (1, 0, 0),
    "flow_dppo": (1, 0, 0),
    "grpo": (1, 0, 0),
    "grpo_guard": (1, 0, 0),
    "nft": (1, 1, 0),
    "refl": (1, 0, 0),
    "reinforce": (1, 0, 0),
}
REGULARISED = ["regularise.low_frequency=1", "regularise.supervised=0.1"]
EXPECTED_POINTS = {"draft": 1, "nft": 2, "refl": 1}  # of the tiny configs; others: the window, or 4 times


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("algorithms")


@pytest.fixture(scope="module")
def env(folder: Path) -> Env:
    return build_env(tiny_config(folder).env)


def counted(networks: dict[str, nn.Module | None]) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, network in networks.items():
        if network is not None:
            network.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("regularised", [False, True], ids=["plain", "regularised"])
@pytest.mark.parametrize("kind", sorted(ALGORITHMS))
def test_it_moves_the_policy_at_its_documented_cost(folder: Path, env: Env, kind: str, regularised: bool) -> None:
    config = tiny_config(folder, kind, REGULARISED if regularised else [])
    crew = build_crew(config, StageTimes())
    assert isinstance(crew, LocalCrew)
    learner, algorithm = crew.learner, crew.learner.algorithm
    before = {name: value.clone() for name, value in learner.weights("current").items()}
    updating = learner.update
    calls: Counter[str] = Counter()

    def update(request, chain):
        nonlocal calls
        calls = counted({"current": learner.engine.network, "old": learner.old, "reference": learner.reference})
        return updating(request, chain)

    learner.update = update  # type: ignore[method-assign]
    scored, (report,) = iterate(crew, config, env, 0)
    assert len(report.grad_norms) == algorithm.updates and min(report.grad_norms) > 0
    after = learner.weights("current")
    assert any(not value.equal(before[name]) for name, value in after.items())
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    if algorithm.needs.trajectory:
        assert report.maxima["ratio_deviation_max_on_policy"] < 1e-6

    chain = rollout_chain(config.sampling, config.run.seed, 0, algorithm)
    points = len(algorithm.points(chain, 0))
    assert points == EXPECTED_POINTS.get(kind, config.sampling.window if algorithm.needs.trajectory else 4)
    micro_batches = config.rollout.groups * config.rollout.samples // config.engine.micro_batch
    cost = dict(zip(("current", "old", "reference"), COST[kind], strict=True))
    if regularised:  # the start is asked once a point, whoever wants to know; references have a pass of their own
        cost |= {"reference": 1, "current": 2}
    assert {name: calls[name] for name in cost} == {name: n * points * micro_batches for name, n in cost.items()}
    logged = cost_metrics([part.images for part in scored], [report], config.rollout.groups * config.rollout.samples)
    assert logged == {
        "cost/sample_forwards": config.sampling.steps,
        "cost/train_forwards": (cost["old"] + cost["reference"]) * points,
        "cost/train_backwards": cost["current"] * points,
    }


@pytest.mark.parametrize("kind", ["d3po", "dgpo", "dpo"])
def test_a_cut_group_is_refused_with_the_remedy(folder: Path, kind: str) -> None:
    config = tiny_config(folder, kind)
    assert config.engine.micro_batch == config.rollout.samples == 4
    path = folder / f"tiny_{kind}.yaml"
    with pytest.raises(
        ConfigError, match=r"engine.micro_batch=2 cuts groups of rollout.samples=4: make it a multiple of 4"
    ):
        load_train_config(path, ["engine.micro_batch=2"])
