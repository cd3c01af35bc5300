"""Asynchronous runs on Ray: rollouts one version behind, the first ratio still exactly 1, and resume bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rlrestore.reporting.log import read_metrics
from tests.e2e.test_stop import STOPPED, at_draw, run_cli, weights
from tests.tiny import write_tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("algorithm", "ahead"), [("grpo", 1), ("grpo", 2), ("nft", 1)])
def test_a_stopped_asynchronous_run_ends_as_a_straight_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, ahead: int
) -> None:
    """The signal comes while rollouts of the next iterations are in flight: they are sampled again by the same weights."""
    config = write_tiny(tmp_path, algorithm)
    options = [
        "run.steps=5", "checkpoint.every=5", "evaluate.tasks=1", "engine.lr=1e-5", "placement.kind=separate", "placement.threads=1",
        f"asynchrony.ahead={ahead}", f"placement.max_staleness={ahead}",
    ]  # fmt: skip
    runs = tmp_path / "runs"
    assert run_cli("train", config, *options, "run.name=straight") == 0
    with monkeypatch.context() as patch:
        at_draw(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_cli("train", config, *options, "run.name=asked") == STOPPED
    (kept,) = (runs / "asked" / "checkpoints").iterdir()
    assert len(list(kept.glob("sampling_*.safetensors"))) == ahead
    assert run_cli("train", config, *options, "run.name=asked") == 0
    assert weights(runs / "asked", 5) == weights(runs / "straight", 5) != {}
    for record in [record for record in read_metrics(runs / "straight" / "metrics.jsonl") if "train/loss" in record]:
        lag = min(int(record["step"]) - 1, ahead)
        if algorithm == "grpo":
            assert record["policy/ratio_deviation_max_on_policy"] == 0.0
            assert ("group/importance_mean" in record) == (lag > 0)
            if lag:
                assert 0.2 < record["group/importance_mean"] < 5
    assert run_cli("train", config, *options[:-2], "run.name=on_policy") == 0
    assert weights(runs / "on_policy", 5) != weights(runs / "straight", 5), "stale rollouts are other rollouts"
