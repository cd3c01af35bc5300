"""Fit the two no-reference quality models of `rewards/data` on a folder of clean photographs.

    PYTHONPATH=. python scripts/fit_niqe.py data/photos            # 15 minutes on one core

Writes `niqe_pristine.safetensors` (mean and covariance of NIQE's 36 features over sharp patches of half-size crops),
`nss.safetensors` (a small network on 108 statistics, see below) and `natural_models.json` (sources, numbers, measured
accuracy).

nss: every crop gets `--versions` random chains of distortions (blur, noise, JPEG, over-sharpening, resampling, grids,
correlated noise, blends, and the degradations of `envs`). Their label is a full-reference distance to the clean crop,
which is 0 for the crop itself:

    label = sqrt( mean over full, half and quarter size of (1 - mean gradient magnitude similarity) )

Four networks, of which nss is the mean, learn to order the versions of one crop (a label gap decides the pair) and to
give their label differences, from statistics of one picture alone. Accuracy is measured on the photographs of the
scikit-image and scikit-learn wheels that no part of the project trains on (astronaut, chelsea, coffee, china), and also
on data/photos_heldout where it exists.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from envs.degradations import DEGRADATIONS
from envs.degradations.realesrgan import degrade
from envs.images import image_files
from envs.rng import generator_for
from rewards.filters import gaussian_blur, gaussian_taps, luma_yiq, separable
from rewards.naturalness import PATCH_PX, STRIDE_PX, gaussian_distance, mlp
from rewards.nss import patch_features, pyramid_statistics
from rewards.reference import gradient_magnitude

OUT = Path(__file__).resolve().parents[1] / "rewards" / "data"
CROP_PX = 128
SHARP_SHARE = 0.75  # of the crop's sharpest patch (Mittal et al. 2013, section II-D)
Distortion = Callable[[Tensor], Tensor]  # [N, 3, H, W] in [0, 1] -> the same


# --- photographs and distortions


def photo(path: Path) -> Tensor:
    """[3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255


def round8(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def crops(image: Tensor, count: int, shrink: int, rng: random.Random) -> list[Tensor]:
    """Random crops `[3, 128, 128]` of the photo at 1/shrink size, flat ones (std below 0.04) redrawn 30 times."""
    if shrink > 1:
        image = F.interpolate(image[None], scale_factor=1 / shrink, mode="bilinear", antialias=True)[0]
    height, width = image.shape[1:]
    if min(height, width) < CROP_PX:
        return []
    out = []
    for _ in range(count):
        for _attempt in range(30):
            y, x = rng.randint(0, height - CROP_PX), rng.randint(0, width - CROP_PX)
            crop = image[:, y : y + CROP_PX, x : x + CROP_PX]
            if crop.mean(0).std() > 0.04:
                break
        out.append(round8(crop))
    return out


def jpeg(x: Tensor, quality: int) -> Tensor:
    pictures = []
    for picture in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", quality=quality)
        pictures.append(torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1))
    return torch.stack(pictures).float() / 255


def unsharp(x: Tensor, amount: float, sigma_px: float = 1.5) -> Tensor:
    return round8(x + amount * (x - gaussian_blur(x, sigma_px)))


def noise(x: Tensor, std_255: float, g: torch.Generator, grey: bool = False, correlation_px: float = 0.0) -> Tensor:
    n = torch.randn(x[:, : 1 if grey else 3].shape, generator=g)
    if correlation_px:
        n = gaussian_blur(n, correlation_px)
        n = n / n.std()
    return round8(x + std_255 / 255 * n)


def resample(x: Tensor, factor: float, mode: str) -> Tensor:
    small = F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True).clamp(0, 1)
    return round8(F.interpolate(small, x.shape[-2:], mode=mode))


def median3(x: Tensor) -> Tensor:
    windows = F.pad(x, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    return windows.flatten(4).median(-1).values


def grid(x: Tensor, period_px: int, std_255: float, g: torch.Generator) -> Tensor:
    tile = torch.randn(1, 3, period_px, period_px, generator=g) * std_255 / 255
    return round8(x + tile.repeat(1, 1, x.shape[2] // period_px, x.shape[3] // period_px))


def motion(x: Tensor, length_px: int, vertical: bool) -> Tensor:
    k, r = 2 * length_px + 1, length_px
    planes = F.pad(x.flatten(0, 1)[:, None], (r, r, r, r), mode="replicate")
    box = F.avg_pool2d(planes, (k, 1) if vertical else (1, k), 1)
    box = box[..., :, r : r + x.shape[3]] if vertical else box[..., r : r + x.shape[2], :]
    return round8(box.view_as(x))


def real_degradation(x: Tensor, seed: int, severity: float, recipe: str = "mild") -> Tensor:
    """Each picture degraded by a recipe of envs, with its own generator."""
    scaled = replace(DEGRADATIONS[recipe], severity=severity)
    return torch.stack([degrade(picture, generator_for(seed, i), scaled).lq for i, picture in enumerate(x)])


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def random_step(rng: random.Random, g: torch.Generator) -> Distortion:
    """One distortion of drawn kind and strength."""
    strength, period, levels = log_uniform(rng, 1, 30), rng.choice([2, 4, 8, 16]), rng.choice([8, 12, 16, 24, 32])
    grey, correlation_px = rng.random() < 0.4, rng.choice([0.0, 0.0, rng.uniform(0.4, 1.5)])
    blur_px, amount, radius_px = log_uniform(rng, 0.3, 8), rng.uniform(0.3, 5), rng.uniform(0.7, 3)
    seed, severity, recipe = rng.randrange(2**31), rng.uniform(0.2, 1.0), rng.choice(["mild", "mild", "realesrgan"])
    factor, mode = rng.uniform(1.3, 4), rng.choice(["bicubic", "bilinear", "nearest"])
    length_px, vertical, quality = rng.randint(1, 4), rng.random() < 0.5, rng.randint(15, 92)
    kinds: dict[str, tuple[float, Distortion]] = {
        "blur": (3.0, lambda x: round8(gaussian_blur(x, blur_px))),
        "grid": (1.0, lambda x: grid(x, period, strength / 2, g)),
        "jpeg": (2.0, lambda x: jpeg(x, quality)),
        "median": (1.0, median3),
        "motion": (0.5, lambda x: motion(x, length_px, vertical)),
        "noise": (3.0, lambda x: noise(x, strength, g, grey, correlation_px)),
        "posterise": (0.3, lambda x: (x * levels).round() / levels),
        "real": (4.0, lambda x: real_degradation(x, seed, severity, recipe)),
        "resample": (1.0, lambda x: resample(x, factor, mode)),
        "sharpen": (2.5, lambda x: unsharp(x, amount, radius_px)),
    }
    kind = rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
    return kinds[kind][1]


def random_distortion(rng: random.Random, g: torch.Generator) -> Distortion:
    """A chain of one to three random steps, a quarter of the time blended with the clean picture.

    Chains matter: trained on single distortions, the network took a heavily blurred, lightly grained LQ for good.
    """
    steps = [random_step(rng, g) for _ in range(rng.choices([1, 2, 3], [0.35, 0.4, 0.25])[0])]
    kept = rng.random() if rng.random() < 0.25 else 0.0

    def distort(x: Tensor) -> Tensor:
        y = x
        for step in steps:
            y = step(y)
        return round8(kept * x + (1 - kept) * y)

    return distort


def probes(x: Tensor) -> dict[str, Tensor]:
    """The fixed versions that accuracy is reported on; every one of them is worse than `x`."""
    g = torch.Generator().manual_seed(0)
    out = {f"noise {s}": noise(x, s, g) for s in (5, 10, 15, 25)}
    out |= {f"blur {s} px": round8(gaussian_blur(x, s)) for s in (0.7, 1.0, 2.0, 3.0)}
    out |= {f"JPEG {q}": jpeg(x, q) for q in (20, 40, 60)}
    out |= {f"unsharp {a}": unsharp(x, a) for a in (1, 2, 3, 4)}
    out["blur 1 + noise 5"] = noise(round8(gaussian_blur(x, 1)), 5, g)
    out["blur 2 + noise 10"] = noise(round8(gaussian_blur(x, 2)), 10, g)
    out["blur 1 + noise 10 + JPEG 40"] = jpeg(noise(round8(gaussian_blur(x, 1)), 10, g), 40)
    out["blur 2 + unsharp 4"] = unsharp(round8(gaussian_blur(x, 2)), 4, 2.0)
    out["blur 2 + grain 5"] = noise(round8(gaussian_blur(x, 2)), 5, g, grey=True, correlation_px=0.7)
    out["real (mild)"] = real_degradation(x, 1, 1.0)
    return out


def tricks(lq: Tensor) -> dict[str, Tensor]:
    """What a restorer could do to an LQ to please a naive index without restoring anything."""
    g = torch.Generator().manual_seed(0)
    out = {f"blur {s:g}": round8(gaussian_blur(lq, s)) for s in (1.0, 3.0, 5.0, 8.0)}
    out |= {f"grain {s}": noise(lq, s, g, grey=True, correlation_px=0.7) for s in (2, 4, 8)}
    out |= {f"blur {s:g} + grain 2": noise(out[f"blur {s:g}"], 2, g, grey=True, correlation_px=0.7) for s in (3.0, 5.0)}
    out |= {f"unsharp {a}": unsharp(lq, a) for a in (1, 3)}
    return out | {"contrast 1.3": round8((lq - 0.5) * 1.3 + 0.5), "median": median3(median3(lq))}


def label(x: Tensor, clean: Tensor) -> Tensor:
    """Distance to the clean picture `[N]`.

    See the module docstring (gradient similarity of Xue et al. 2014, mean-pooled).
    """
    a, b, t = 255 * luma_yiq(x), 255 * luma_yiq(clean), 170.0
    loss = torch.zeros(len(x))
    for _ in range(3):
        g_a, g_b = gradient_magnitude(a), gradient_magnitude(b)
        loss += (1 - (2 * g_a * g_b + t) / (g_a**2 + g_b**2 + t)).flatten(1).mean(1) / 3
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss.clamp_min(0).sqrt()


# --- the two models


def fit_pristine(clean: Tensor) -> dict[str, Tensor]:
    """Mean and covariance over the patches that are at least 0.75 as sharp as their crop's sharpest one."""
    features, sharpness = [], []
    taps = gaussian_taps(7 / 6, 3)
    for batch in clean.split(8):
        luma = 255 * luma_yiq(batch)
        features.append(patch_features(luma, PATCH_PX, STRIDE_PX))
        var = separable((luma - 128) ** 2, taps, padded=True) - (separable(luma, taps, padded=True) - 128) ** 2
        sharpness.append(F.avg_pool2d(var.clamp_min(0).sqrt(), PATCH_PX, STRIDE_PX).flatten(1))
    sharp = torch.cat(sharpness)
    kept = torch.cat(features)[sharp >= SHARP_SHARE * sharp.max(1, keepdim=True).values]
    return {"mean": kept.mean(0), "cov": torch.cov(kept.double().T).float(), "patches": torch.tensor([len(kept)])}


def training_set(clean: Tensor, versions: int, seed: int, block: int = 80) -> tuple[Tensor, Tensor]:
    """`distorted` of all crops in random order, block by block (a block has its own seed), with progress."""
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
    parts = []
    for start in range(0, len(clean), block):
        parts.append(distorted(clean[order[start : start + block]], versions, seed * 1000 + start))
        print(f"distorted {min(start + block, len(clean))} of {len(clean)} crops", flush=True)
    return torch.cat([s for s, _ in parts]), torch.cat([t for _, t in parts])


def distorted(clean: Tensor, versions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Statistics `[N, V + 1, 108]` and labels `[N, V + 1]` of N crops and their V distorted versions.

    Version 0 is the crop.
    """
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    statistics, labels = [], []
    for batch in clean.split(4):
        pictures = [batch] + [round8(random_distortion(rng, g)(batch)) for _ in range(versions)]
        statistics.append(torch.stack([pyramid_statistics(p) for p in pictures], 1))
        labels.append(torch.stack([label(p, batch) for p in pictures], 1))
    return torch.cat(statistics), torch.cat(labels)


def pair_loss(score_NV: Tensor, label_NV: Tensor, gap: float = 0.02) -> Tensor:
    """Within-crop regression of label differences plus a logistic loss on the order of pairs more than `gap` apart."""
    error = score_NV - label_NV
    regression = (error - error.mean(1, keepdim=True)).square().mean() + 0.1 * error.mean(1).square().mean()
    s, t = score_NV[:, :, None] - score_NV[:, None], label_NV[:, :, None] - label_NV[:, None]
    order = F.softplus(-20 * s * t.sign())[t.abs() > gap].mean()
    return 30 * regression + order


def fit_nss(statistics: Tensor, labels: Tensor, steps: int, seed: int) -> dict[str, Tensor]:
    """Train one 108-32-16-1 network (AdamW, one cycle, feature noise and dropout against content).

    Scores in units of 0.1 label.
    """
    torch.manual_seed(seed)
    flat = statistics.flatten(0, 1)
    w = {"mean": flat.mean(0), "std": flat.std(0).clamp_min(1e-6)}
    sizes = (flat.shape[1], 32, 16, 1)
    net = {}
    for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes), start=1):
        net[f"w{k}"] = (torch.randn(n_out, n_in) / math.sqrt(n_in)).requires_grad_()
        net[f"b{k}"] = torch.zeros(n_out, requires_grad=True)
    optimizer = torch.optim.AdamW(net.values(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(statistics), (32,))
        x = statistics[rows]
        x = x + 0.05 * w["std"] * torch.randn_like(x)
        x = torch.where(torch.rand_like(x) < 0.03, w["mean"], x)  # a statistic less: no single one may decide
        score = mlp(x.flatten(0, 1), {**w, **net}).view(rows.numel(), -1)
        loss = pair_loss(score, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    out = {**w, **{k: v.detach() for k, v in net.items()}}
    out["w3"], out["b3"] = out["w3"] * 10, out["b3"] * 10
    return {k: v.contiguous() for k, v in out.items()}


def averaged(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One network that gives the mean of several: hidden layers side by side, blocks between them."""
    return {
        "mean": members[0]["mean"],
        "std": members[0]["std"],
        "w1": torch.cat([w["w1"] for w in members]),
        "b1": torch.cat([w["b1"] for w in members]),
        "w2": torch.block_diag(*[w["w2"] for w in members]),
        "b2": torch.cat([w["b2"] for w in members]),
        "w3": torch.cat([w["w3"] for w in members], dim=1) / len(members),
        "b3": torch.stack([w["b3"] for w in members]).mean(0),
    }


# --- accuracy


def niqe_of(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [
            gaussian_distance(patch_features(255 * luma_yiq(b), PATCH_PX, STRIDE_PX), w["mean"], w["cov"])
            for b in x.split(8)
        ]
    )


def nss_of(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return torch.cat([mlp(pyramid_statistics(b), w) for b in x.split(8)])


def accuracy(score: Callable[[Tensor], Tensor], clean: Tensor) -> dict[str, float]:
    """Share of crops whose clean version scores below (better than) each probe."""
    best = score(clean)
    shares = {name: float((score(x) > best).float().mean()) for name, x in probes(clean).items()}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def trick_gains(score: Callable[[Tensor], Tensor], clean: Tensor) -> dict[str, dict[str, float]]:
    """Mean change of score and label by each trick on a mild LQ, below 0 is better; "restored" is the clean picture."""
    lq = real_degradation(clean, 7, 1.0)
    start, start_label = score(lq).mean(), label(lq, clean).mean()
    versions = {**tricks(lq), "half restored": round8((lq + clean) / 2), "restored": clean}
    return {
        name: {"score": float(score(x).mean() - start), "label": float(label(x, clean).mean() - start_label)}
        for name, x in versions.items()
    }


def pairwise_order(score_NV: Tensor, label_NV: Tensor, gap: float = 0.05) -> float:
    """Share of version pairs of one crop (label gap above `gap`) that the score puts in the label's order."""
    s, t = score_NV[:, :, None] - score_NV[:, None], label_NV[:, :, None] - label_NV[:, None]
    return float(((s * t) > 0)[t.abs() > gap].float().mean())


def wheel_photos() -> list[Tensor]:
    from skimage import data
    from sklearn.datasets import load_sample_image

    pictures = [data.astronaut(), data.chelsea(), data.coffee(), load_sample_image("china.jpg")]
    return [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 for p in pictures]


def sampled(photos: Sequence[Tensor], full: int, half: int, seed: int) -> Tensor:
    """`full` crops of every photo at its own size and `half` at half size, `[N, 3, 128, 128]`."""
    rng = random.Random(seed)
    return torch.stack(
        [c for p in photos for n, shrink in ((full, 1), (half, 2)) if n for c in crops(p, n, shrink, rng)]
    )


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Under a temporary name until it is whole."""
    temporary = path.with_name("." + path.name + ".tmp")
    save(temporary)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of clean photographs (train on these only)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--crops", type=int, default=3, help="crops a photo at full and again at half size")
    parser.add_argument("--versions", type=int, default=20, help="distorted versions a crop")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of nss")
    parser.add_argument("--members", type=int, default=4, help="networks whose mean is nss")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = image_files(arguments.photos)
    if not paths:
        raise SystemExit(f"{arguments.photos} holds no photographs; fetch some with scripts/fetch_photos.py")

    if min(arguments.crops, arguments.versions, arguments.members) < 1:
        raise SystemExit("--crops, --versions and --members must be at least 1")
    train, halves = [], []
    for index, path in enumerate(paths):  # one photo in memory at a time
        picture, seed = photo(path), arguments.seed * 10_007 + index
        if min(picture.shape[1:]) >= CROP_PX:
            train.append(sampled([picture], arguments.crops, 0, seed))
        if min(picture.shape[1:]) >= 2 * CROP_PX:
            halves.append(sampled([picture], 0, arguments.crops, seed))
            train.append(halves[-1])
    if not halves:
        raise SystemExit(f"no photograph of {arguments.photos} has {2 * CROP_PX} px on its short side")
    clean = torch.cat(train)
    pristine = fit_pristine(torch.cat(halves))
    statistics, labels = training_set(clean, arguments.versions, arguments.seed)
    # several small networks agree on the photo and differ on tricks: their mean is harder to please
    nss = averaged([fit_nss(statistics, labels, arguments.steps, arguments.seed + k) for k in range(arguments.members)])

    held = {"wheels": sampled(wheel_photos(), 12, 8, 1)}
    others = arguments.photos.parent / "photos_heldout"
    if others.is_dir():
        pictures = [photo(p) for p in image_files(others)]
        held["photos_heldout"] = sampled([p for p in pictures if min(p.shape[1:]) >= 2 * CROP_PX], 2, 2, 2)
    report: dict[str, object] = {
        "photos": [p.name for p in paths],
        "crops": len(clean),
        "versions": arguments.versions,
        "steps": arguments.steps,
        "members": arguments.members,
        "seed": arguments.seed,
        "patches_niqe": int(pristine["patches"]),
        "torch": torch.__version__,
        "held_out": {},
    }
    for name, x in held.items():
        held_statistics, held_labels = distorted(x, 10, 12345)
        scores = mlp(held_statistics.flatten(0, 1), nss).view(held_labels.shape)
        report["held_out"][name] = {  # type: ignore[index]
            "crops": len(x),
            "niqe": accuracy(lambda x: niqe_of(x, pristine), x),
            "nss": accuracy(lambda x: nss_of(x, nss), x),
            "niqe tricks": trick_gains(lambda x: niqe_of(x, pristine), x),
            "nss tricks": trick_gains(lambda x: nss_of(x, nss), x),
            "nss pair order": pairwise_order(scores, held_labels),
            "nss std within a crop": float(scores.std(1).mean()),
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(
        arguments.out / "niqe_pristine.safetensors", lambda p: save_file({k: pristine[k] for k in ("mean", "cov")}, p)
    )
    write(arguments.out / "nss.safetensors", lambda p: save_file(nss, p))
    write(
        arguments.out / "natural_models.json",
        lambda p: p.write_text(json.dumps(report, indent=1) + "\n", "utf-8") and None,
    )
    print(json.dumps(report["held_out"], indent=1))


if __name__ == "__main__":
    main()
