"""How often the metric filter of `rlrestore data build` rejects candidates with a planted fault, and good ones.

    python scripts/measure_pair_filter.py

18 crops of 256 px of the wheels' photographs are degraded by four recipes; the "editor" answers with the clean crop (good),
half of the way there, or a fault. Printed: the share that the filter rejects at its default bounds, and which checks did it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter

from envs.degradations import DEGRADATIONS
from envs.degradations.jpeg import from_uint8_hwc, to_uint8_hwc
from envs.faults import plant
from envs.images import load_rgb
from envs.photos import wheel_photos
from envs.pipeline.align import align
from envs.pipeline.config import FilterSection
from envs.pipeline.filters import measure, reasons
from envs.rng import generator_for

SIDE, PER_PHOTO = 256, 2
TEXTURES = (
    "brick",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "motorcycle_right",
)  # no scenes, or one scene twice
RECIPES = ("mild", "realesrgan", "haze", "lowlight")
BLURS = {"blurred 1.2 px": 1.2, "blurred 2 px": 2.0, "blurred 3 px": 3.0}
KINDS = (
    "good", "half", "shift 4 px", "shift 12 px", *BLURS, "LQ blurred", "copy", "scene", "patch", "erase", "clone", "warp", "text",
    "frame", "colour",
)  # fmt: skip


def crops() -> list[np.ndarray]:
    found = []
    for photo in (photo for side in wheel_photos() for photo in side if photo.name not in TEXTURES):
        pixels = load_rgb(photo.path)
        for k in range(PER_PHOTO):
            rng = generator_for(5, k)
            y, x = (int(rng.integers(side - SIDE + 1)) for side in pixels.shape[:2])
            found.append(pixels[y : y + SIDE, x : x + SIDE].copy())
    return found


def answer(kind: str, gt: np.ndarray, lq: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What an editor with this fault returns."""
    if kind in BLURS:
        return gaussian_filter(gt, (BLURS[kind], BLURS[kind], 0))
    out = gt.copy()
    match kind:
        case "half":
            return ((gt.astype(int) + lq) // 2).astype(np.uint8)
        case "shift 4 px":
            return np.roll(gt, (3, -3), (0, 1))
        case "shift 12 px":
            return np.roll(gt, (8, 9), (0, 1))
        case "LQ blurred":
            return gaussian_filter(lq, (1.5, 1.5, 0))
        case "copy":
            return lq
        case "scene":
            return other
        case "patch" | "erase" | "clone" | "warp" | "text":  # some place of a tenth to a third of the side
            return to_uint8_hwc(plant(from_uint8_hwc(gt), from_uint8_hwc(other), rng, kind))
        case "frame":
            out[:8] = out[-8:] = 0
        case "colour":
            return np.clip(gt.astype(int) + np.array([14, 0, -14]), 0, 255).astype(np.uint8)
    return out


def main() -> None:
    clean = crops()
    print(f"{'recipe':12}{'candidate':14}rejected  by")
    for recipe in RECIPES:
        low = [
            to_uint8_hwc(replace(DEGRADATIONS[recipe], scale=1).apply(from_uint8_hwc(gt), generator_for(9, n)).lq)
            for n, gt in enumerate(clean)
        ]
        for kind in KINDS:
            by: Counter[str] = Counter()
            rejected = 0
            for n, (gt, lq) in enumerate(zip(clean, low, strict=True)):
                candidate = answer(kind, gt, lq, clean[(n + 7) % len(clean)], np.random.default_rng(n))
                types = recipe if recipe in ("haze", "lowlight") else "mix"
                found = reasons(measure(align(lq, candidate, 0.02)), FilterSection(), types)
                rejected += bool(found)
                by.update(reason.split()[0] for reason in found)
            few = ", ".join(f"{name} {n}" for name, n in by.most_common(3))
            print(f"{recipe:12}{kind:16}{rejected:3} of {len(clean)}  {few}", flush=True)


if __name__ == "__main__":
    main()
