"""How good a restorer is before any RL: PSNR, GMSD and no-reference scores of LQ, single samples and their mean.

    python scripts/measure_restorer.py [WEIGHTS_FOLDER] [--folder data/photos_heldout] [--tasks 64]

Held-out photos of the wheels (and of a folder, if given), 128 px crops, 8 steps, 16 samples.
"""

from __future__ import annotations

import argparse
import json

import torch

from envs.photos import PhotosConfig, PhotosEnv
from envs.types import Restoration
from rewards.registry import build_reward
from rlrestore.diffusion.sampling import Chain, sample
from rlrestore.diffusion.schedules import time_schedule
from rlrestore.diffusion.solvers import SOLVERS
from rlrestore.iteration.rollout import to_pixels
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer

METRICS = ("psnr_rgb", "ssim_rgb", "gmsd", "niqe", "nss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", default="packaged", help="folder with weights (default: those that ship)")
    parser.add_argument("--folder", help="more held-out photos, e.g. data/photos_heldout")
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--solver", choices=SOLVERS, default="euler")
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    restorer = EmbeddedRestorer(EmbeddedConfig(weights=options.weights))
    env = PhotosEnv(PhotosConfig(size=options.size, held_out_folder=options.folder, held_out_fraction=0.0))
    rewards = {name: build_reward(name) for name in METRICS}
    chain = Chain(tuple(time_schedule(options.steps).tolist()), solver=options.solver)
    rows = []
    for task in env.held_out(options.tasks):
        condition = restorer.condition(task.lq[None]).repeat(options.samples)
        z_0, _ = sample(restorer, condition, list(range(options.samples)), chain)
        samples = restorer.decode(z_0, condition)
        expected = restorer.decode(torch.zeros_like(z_0[:1]), condition.take(slice(0, 1)))
        images = to_pixels(torch.cat([task.lq[None], expected, samples.mean(0, keepdim=True), samples])) / 255
        items = [Restoration(task, image) for image in images]
        values = torch.stack([rewards[name].score(items).value_N for name in METRICS])
        row = torch.cat([values[:, :3], values[:, 3:].mean(1, keepdim=True)], dim=1)
        rows.append(torch.cat([row.flatten(), samples.std(0).mean()[None]]))
    mean = torch.stack(rows).mean(0)
    table = mean[:-1].reshape(len(METRICS), 4)
    names = ("lq", "mean_network", f"mean_of_{options.samples}", "single_sample")
    result = {
        metric: {name: round(float(value), 4) for name, value in zip(names, row, strict=True)}
        for metric, row in zip(METRICS, table, strict=True)
    }
    print(json.dumps({**result, "spread_of_samples": round(float(mean[-1]), 4), "tasks": options.tasks}, indent=1))


if __name__ == "__main__":
    main()
