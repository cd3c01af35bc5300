"""A loss or gradient that is not finite stops the run before anything is updated, published or saved, and is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlrestore.algorithms.nft import Nft
from rlrestore.build import build_crew, build_env
from rlrestore.crew import LocalCrew, StageTimes
from rlrestore.engine.base import NonFiniteError
from tests.tiny import iterate, tiny_config, train_tiny


def broken(monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """`spoil` changes the loss of each sample, which nft made from its velocity."""
    objective = Nft.objective

    def spoilt(self, noised, batch):
        loss_B, metrics = objective(self, noised, batch)
        return spoil(loss_B, noised.v), metrics

    monkeypatch.setattr(Nft, "objective", spoilt)


def nan_in_one_sample(loss_B: Tensor, v: Tensor) -> Tensor:
    return loss_B + torch.tensor([0.0, float("nan"), 0.0, 0.0])


def nan_in_the_gradient_only(loss_B: Tensor, v: Tensor) -> Tensor:
    return loss_B + (v - v.detach()).flatten(1).square().sum(1).sqrt()  # 0, with slope 0 / 0


@pytest.mark.parametrize(
    "engine", [["torch"], *(["deepspeed", f"engine.zero={zero}"] for zero in range(4))], ids=lambda engine: engine[-1]
)
def test_the_weights_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: list[str]) -> None:
    config = tiny_config(tmp_path, "nft", [f"engine.kind={engine[0]}", *engine[1:]])
    env, crew = build_env(config.env), build_crew(config, StageTimes())
    assert isinstance(crew, LocalCrew)
    before = {name: value.clone() for name, value in crew.learner.weights("current").items()}
    for spoil, told in ((nan_in_one_sample, "loss"), (nan_in_the_gradient_only, "gradient")):
        with monkeypatch.context() as patch:
            broken(patch, spoil)
            with pytest.raises(NonFiniteError, match=told):
                iterate(crew, config, env, 0)
        assert crew.learner.iteration == 0
        assert all(value.equal(before[name]) for name, value in crew.learner.weights("current").items())
    crew.close()


def test_the_run_ends_and_names_the_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty alone breaks: it is named, with the loss that it spoils, and the algorithm's own terms are not."""
    monkeypatch.setattr(
        "rlrestore.learning.regularisers.velocity_mse_N", lambda v, target: v.flatten(1).sum(1) * float("inf")
    )
    config = tiny_config(tmp_path, "nft", ["regularise.velocity=1", "checkpoint.every=1"])
    with pytest.raises(NonFiniteError, match=r"iteration 0: loss, regularise_velocity \(") as error:
        train_tiny(config)
    assert "lower engine.lr" in str(error.value)
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").glob("*"))
