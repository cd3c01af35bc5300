"""What each reward sees: AUROC on planted faults, correlation with the reference's composite, milliseconds and memory a picture.

    PYTHONPATH=. python scripts/bench_rewards.py                     # all rewards that this machine can build; some minutes
    PYTHONPATH=. python scripts/bench_rewards.py --only nss,structure --sources 12 --out /tmp/bench.json

Pictures are made here: crops of the photographs in the wheels that no weights were trained on, mildly degraded; of each the packaged
restorer's samples and mean, a filter, and one of the samples with each fault of envs/faults.py planted. Every reward runs in a
process of its own (a fork), with one thread.

AUROC of a fault: how often a faulty picture scores worse than the restorer's sound samples of the same LQ (ties count half), as a
group would see it; `any` is the mean over the faults. SRCC: rank correlation with `composite` over the sound pictures of an LQ, mean
over LQs; a reward that ties them all counts 0.
ms: CPU time of one picture, median over LQs of a batch. MB: what building it and scoring add to the process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.faults import FAULTS, plant
from envs.photos import PhotosConfig, PhotosEnv
from envs.rng import generator_for
from envs.types import Restoration
from rewards.composite import composite
from rewards.filters import gaussian_blur
from rewards.judges.metrics import srcc
from rewards.registry import REWARDS, build_reward
from rlrestore.diffusion.sampling import Chain, sample
from rlrestore.diffusion.schedules import time_schedule
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer

SAMPLES, SIZE_PX = 4, 128
PYIQA = ("piqe", "vif", "dists", "lpips", "musiq")  # as `pyiqa:NAME`


def names() -> list[str]:
    """Every kind; pyiqa stands for some of its metrics."""
    return [*(kind for kind in REWARDS if kind != "pyiqa"), *(f"pyiqa:{metric}" for metric in PYIQA)]


def make_pictures(sources: int, seed: int) -> list[dict[str, Any]]:
    """A source: task, sound pictures [V, 3, H, W], and the faulty versions of the first by kind."""
    env = PhotosEnv(PhotosConfig(size=SIZE_PX, recipe="mild", seed=seed))
    restorer = EmbeddedRestorer(EmbeddedConfig())
    chain = Chain(tuple(time_schedule(8).tolist()))
    tasks, made = env.held_out(sources), []
    for i, task in enumerate(tasks):
        condition = restorer.condition(task.lq[None])
        z, _ = sample(restorer, condition.repeat(SAMPLES), [seed + 100 * i + k for k in range(SAMPLES)], chain)
        z = torch.cat([z, torch.zeros_like(z[:1])])
        images = restorer.decode(z, condition.repeat(len(z)))
        sound = torch.cat([images, gaussian_blur(images[-1:], 1.0), task.lq[None], 0.5 * (images[:1] + images[-1:])])
        sound = (sound.clamp(0, 1) * 255).round() / 255
        other = tasks[(i + 1) % len(tasks)].gt
        assert other is not None and task.gt is not None
        faulty = {kind: plant(sound[0], other, generator_for(seed, i, k), kind) for k, kind in enumerate(FAULTS)}
        made.append({"task": task, "sound": sound, "faulty": faulty})
    return made


def measure(name: str, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one reward; {"absent": why} if it cannot be built here."""
    kind, _, metric = name.partition(":")
    before_mb = peak_mb()
    try:
        reward = build_reward(kind, {"metric": metric} if metric else None)
    except ValueError as error:
        return {"absent": " ".join(str(error).split())[:160]}
    sign = 1.0 if reward.spec.higher_is_better else -1.0
    wins: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    ranks, seconds, failed = [], [], 0
    for source in sources:
        task = source["task"]
        pictures = [*source["sound"], *source["faulty"].values()]
        start = time.process_time()
        scores = reward.score([Restoration(task, picture) for picture in pictures])
        seconds.append((time.process_time() - start) / len(pictures))
        failed += int((~scores.valid_N).sum())
        value = sign * scores.value_N.numpy()
        sound, faulty = value[: len(source["sound"])], value[len(source["sound"]) :]
        for fault, score in zip(source["faulty"], faulty, strict=True):
            group = sound[:SAMPLES][np.isfinite(sound[:SAMPLES])]
            if np.isfinite(score) and len(group):
                wins[fault].append(float((group > score).mean() + 0.5 * (group == score).mean()))
        truth = composite(source["sound"], task.gt[None].expand_as(source["sound"])).numpy()
        known = np.isfinite(sound)
        ranks.append(srcc(sound[known], truth[known]) if known.sum() > 2 and np.ptp(sound[known]) > 0 else 0.0)
    auroc = {fault: float(np.mean(won)) if won else float("nan") for fault, won in wins.items()}
    return {
        "any": float(np.nanmean(list(auroc.values()))), **auroc, "srcc": float(np.mean(ranks)), "failed": failed,
        "ms": 1000 * float(np.median(seconds)), "mb": peak_mb() - before_mb, "block": reward.spec.block,
    }  # fmt: skip


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown; rewards that are absent come last, with the reason."""
    columns = ("any", *FAULTS, "srcc")
    lines = [
        "| reward | " + " | ".join(columns) + " | ms | MB |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    present = {name: row for name, row in rows.items() if "absent" not in row}
    for name, row in sorted(present.items(), key=lambda pair: -pair[1]["any"]):
        cells = [f"{row[column]:.2f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['ms']:.1f} | {row['mb']:.0f} |")
    lines += [f"\n`{name}` not measured: {row['absent']}" for name, row in rows.items() if "absent" in row]
    return "\n".join(lines)


def in_a_fork(name: str, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """`measure` in a child of this process, which has the pictures and the imports: what it adds to memory is the reward's."""
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe(duplex=False)
    child = context.Process(target=lambda: other.send(measure(name, sources)))
    child.start()
    other.close()
    try:
        return mine.recv()
    except EOFError:
        return {"absent": "its process died"}
    finally:
        child.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=24)
    parser.add_argument("--only", help="kinds, with commas; pyiqa:METRIC for one of pyiqa's")
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.out and options.out.exists():
        parser.error(f"{options.out} exists already")
    sources, rows = make_pictures(options.sources, options.seed), {}
    for name in options.only.split(",") if options.only else names():
        rows[name] = in_a_fork(name, sources)
        print(f"{name:<24} {rows[name]}", file=sys.stderr, flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
