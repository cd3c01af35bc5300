"""The shipped runs against the same runs with rewards shuffled inside each group: what improves, improves for the rewards.

The quickstart and a config of each kind of method, whole, with their own photos, mix and steps, in this process on one thread.
Several minutes a run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlrestore.commands.train import run_train
from rlrestore.evaluation.statistics import bootstrap_ci
from rlrestore.reporting.panel import deltas, read_panel

CONFIGS = Path(__file__).parents[2] / "configs"
HERE = [
    "placement.kind=local", "placement.ranks=1", "placement.threads=1", "engine.kind=torch", "evaluate.every=0", "checkpoint.every=0",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("config", ["quickstart", "algorithms/nft", "algorithms/grpo"])
def test_the_mix_improves_with_its_rewards_and_not_without(tmp_path: Path, config: str) -> None:
    for name in ("taught", "shuffled"):
        shuffle = f"credit.shuffle={str(name == 'shuffled').lower()}"
        run_train(CONFIGS / f"{config}.yaml", [*HERE, f"run.dir={tmp_path}", f"run.name={name}", shuffle])
    taught, untaught = (mix_deltas(tmp_path / name) for name in ("taught", "shuffled"))
    assert bootstrap_ci(taught).low > 0, bootstrap_ci(taught)
    assert bootstrap_ci(untaught).low <= 0, bootstrap_ci(untaught)
    assert bootstrap_ci(taught - untaught).low > 0  # paired: the same crops and noise


def mix_deltas(run: Path) -> np.ndarray:
    """[tasks] gain of the mix on held-out crops, in one order for all runs."""
    panel = read_panel(run)
    assert panel is not None
    return deltas(panel, "mix")[0]
