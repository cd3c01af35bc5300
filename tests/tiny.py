"""The smallest run that is still real: 32-pixel photographs, a 16-channel restorer that does something, two rewards.

A new restorer's last layer is 0, so it restores every photo alike whatever the noise; here it is perturbed, always by
the same numbers, and saved as a folder for `restorer.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from envs.base import Env
from rewards.rubric import Rubric
from rlrestore.build import build_algorithm, build_run, check_parts, load_train_config
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import Crew, Scored
from rlrestore.evaluation.evaluate import MetricRow
from rlrestore.iteration.stages import (
    as_judged,
    assign_credit,
    combine,
    make_chunks,
    recorded_scores,
    rollout_chain,
    update_requests,
)
from rlrestore.loop import train
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer
from rlrestore.rundir import open_run
from rlrestore.types import UpdateReport

YAML = """
run: {{name: tiny, dir: {folder}/runs, seed: 0, steps: 2}}
env: {{kind: photos, size: 32, recipe: mild}}
restorer: {{kind: embedded, weights: {folder}/weights, precision: float32}}
algorithm: {{kind: {algorithm}{options}}}
rewards:
  ssim_rgb: {{weight: 1.0}}
  low_frequency: {{weight: 1.0}}
evaluate: {{tasks: 2, samples: 2, batch: 4, gold: {{psnr_rgb: {{}}}}}}
rollout: {{groups: 4, samples: 4, batch: 4}}
sampling: {{steps: 4, window: 2, window_range: [0, 3]}}
engine: {{kind: torch, lr: 1.0e-3, micro_batch: 4}}
placement: {{kind: local}}
log: {{image_tasks: 2}}
"""
ALGORITHM_OPTIONS = {"grpo": ", updates: 1", "nft": ", beta: 0.1, times: 2"}  # others: their defaults


def save_weights(folder: Path) -> Path:
    """A folder for `restorer.weights`: 16 channels, unshuffle 2, the last layers perturbed deterministically."""
    config = EmbeddedConfig(
        weights=None, precision="float32", unshuffle=2, mean_channels=(16, 16), flow_channels=(16, 32), groups=4
    )
    restorer = EmbeddedRestorer(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for network in (restorer.mean_net, restorer.denoiser):
            for parameter in (network.conv_out.weight, network.conv_out.bias):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True)
    restorer.save(folder)
    return folder


def write_tiny(folder: Path, algorithm: str = "nft") -> Path:
    """A config file in `folder`, whose runs and weights lie there, too."""
    if not (folder / "weights").exists():
        save_weights(folder / "weights")
    path = folder / f"tiny_{algorithm}.yaml"
    path.write_text(YAML.format(folder=folder, algorithm=algorithm, options=ALGORITHM_OPTIONS.get(algorithm, "")))
    return path


def tiny_config(folder: Path, algorithm: str = "nft", overrides: Sequence[str] = ()) -> TrainConfig:
    return load_train_config(write_tiny(folder, algorithm), list(overrides))


def train_tiny(config: TrainConfig) -> tuple[Path, dict[str, MetricRow]]:
    """The whole `train` in this process; (run folder, final table)."""
    env = check_parts(config)
    folder = open_run(config.run, config)
    run = build_run(config, folder, env)
    try:
        return folder.path, train(run)
    finally:
        run.crew.close()
        folder.close()


def iterate(crew: Crew, config: TrainConfig, env: Env, iteration: int):
    """One iteration as the loop has it; (what was sampled and scored, a report a rank)."""
    algorithm = build_algorithm(config.algorithm)
    chain = rollout_chain(config.sampling, config.run.seed, iteration, algorithm)
    tasks = env.draw(iteration, config.rollout.groups)
    chunks = make_chunks(tasks, config.rollout.samples, config.rollout.batch, config.run.seed, iteration)
    scored: list[Scored] = list(crew.roll_out(chunks, chain))
    scores = as_judged(combine(scored, Rubric(list(config.rewards.values()))), recorded_scores(tasks))
    credit = assign_credit(scores, config.credit, config.rollout.groups, config.run.seed, iteration)
    requests = update_requests(
        chunks, credit, crew.ranks, config.engine.micro_batch, algorithm.updates, config.run.seed, iteration
    )
    reports: list[UpdateReport] = crew.update(requests, chain)
    crew.publish()
    return scored, reports
