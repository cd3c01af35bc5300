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
from rlrestore.restorers.embedded import PACKAGED_WEIGHTS
from rlrestore.rundir import open_run
from rlrestore.statistics import bootstrap_ci

CONFIG = """
run: {{name: {name}, dir: {folder}, seed: 0, steps: {steps}}}
env: {{kind: photos, size: 96, recipe: mild}}
restorer: {{kind: embedded}}
algorithm: {{kind: {algorithm}{options}}}
rewards:
  nss: {{weight: 1.0}}
  low_frequency: {{weight: 1.0, scale: 5.0e-4}}
credit: {{shuffle: {shuffle}}}
rollout: {{groups: 8, samples: 8, batch: 16}}
sampling: {{window: 3, window_range: [0, 4], temperature: {temperature}}}
engine: {{lr: {lr}, micro_batch: 16}}
evaluate: {{tasks: 24, samples: 4, batch: 32, gold: {{psnr_rgb: {{}}, ssim_rgb: {{}}}}}}
checkpoint: {{every: 1000}}
"""
RUNS = {  # algorithm -> its options, temperatures, learning rate, iterations; nft is the quickstart's
    "grpo": (", updates: 2", "[1.0, 1.0]", 3e-5, 12),
    "nft": (", times: 3, old_decay: 0, shared_noise: true", "[0.4, 1.0]", 3e-5, 12),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACKAGED_WEIGHTS.exists(), reason="the packaged weights are not there"),
]


@dataclass(frozen=True)
class Outcome:
    rows: dict[str, MetricRow]
    mix: Tensor  # [tasks, samples] of the tuned weights, at fixed seeds


def outcome(folder: Path, algorithm: str, shuffle: bool) -> Outcome:
    options, temperature, lr, steps = RUNS[algorithm]
    name = f"{algorithm}_{'control' if shuffle else 'true'}"
    text = CONFIG.format(
        name=name,
        folder=folder,
        steps=steps,
        algorithm=algorithm,
        options=options,
        shuffle=str(shuffle).lower(),
        lr=lr,
        temperature=temperature,
    )
    (folder / f"{name}.yaml").write_text(text)
    config = load_train_config(folder / f"{name}.yaml")
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


@pytest.mark.parametrize("algorithm", sorted(RUNS))
def test_it_learns_from_its_rewards(tmp_path: Path, algorithm: str) -> None:
    true, control = outcome(tmp_path, algorithm, False), outcome(tmp_path, algorithm, True)
    assert true.rows["mix"].ci95[0] > 0, true.rows["mix"]  # better than its start, on photographs it never saw
    assert control.rows["mix"].ci95[0] <= 0, control.rows["mix"]  # chance does not improve the mix
    # paired by task and noise: the true run beats its control
    advantage = bootstrap_ci((true.mix - control.mix).double().numpy())
    assert advantage.low > 0, advantage
    for name in ("psnr_rgb", "ssim_rgb"):  # and not at the price of the picture
        assert true.rows[name].verdict != "worse", true.rows[name]
