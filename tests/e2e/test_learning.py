"""Does it learn, and from the rewards? Against a control in which rewards are shuffled inside each group.

The packaged restorer on real photographs. Both runs see the same tasks, draw the same noise in their first iteration
and spend the same updates; in the control, who gets which reward of its group is chance. Whatever the control gains
comes from elsewhere. Takes minutes a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from rlrestore.build import build_run, check_parts, load_train_config
from rlrestore.evaluate import MetricRow, compare
from rlrestore.loop import train
from rlrestore.rundir import open_run
from rlrestore.statistics import bootstrap_ci

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = {"grpo": CONFIGS / "quickstart.yaml", "nft": CONFIGS / "algorithms" / "nft.yaml"}  # as they are shipped

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Outcome:
    rows: dict[str, MetricRow]
    mix: Tensor  # [tasks, samples] of the tuned weights, at fixed seeds


def outcome(folder: Path, config_path: Path, shuffle: bool) -> Outcome:
    name = "control" if shuffle else "true"
    config = load_train_config(
        config_path, [f"run.name={name}", f"run.dir={folder}", f"credit.shuffle={str(shuffle).lower()}"]
    )
    env = check_parts(config)
    opened = open_run(config.run, config)
    run = build_run(config, opened, env)
    try:
        rows = train(run)
        tuned = run.evaluation.measure(run.crew, config.evaluate.weights)
        base = run.evaluation.measure(run.crew, "base")
        assert compare(base, tuned, run.evaluation.rubric)["mix"] == rows["mix"]  # measuring again repeats itself
        return Outcome(rows, tuned.values["mix"])
    finally:
        run.crew.close()
        opened.close()


@pytest.mark.parametrize("algorithm", RUNS)
def test_it_learns_from_its_rewards(tmp_path: Path, algorithm: str) -> None:
    true, control = (outcome(tmp_path, RUNS[algorithm], shuffle) for shuffle in (False, True))
    assert true.rows["mix"].ci95[0] > 0, true.rows["mix"]  # better than its start, on photographs it never saw
    assert control.rows["mix"].ci95[0] <= 0, control.rows["mix"]  # chance does not improve the mix
    # paired by task and noise: the true run beats its control
    advantage = bootstrap_ci((true.mix - control.mix).double().numpy())
    assert advantage.low > 0, advantage
    for name in ("psnr_rgb", "ssim_rgb"):  # and not at the price of the picture
        assert true.rows[name].verdict != "worse", true.rows[name]
