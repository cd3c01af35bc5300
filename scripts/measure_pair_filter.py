"""How often the metric filter of `rlrestore data build` rejects candidates with a planted fault, and good ones.

    python scripts/measure_pair_filter.py

36 crops of 256 px of the wheels' photographs are degraded by four recipes; the "editor" answers with the clean crop (good),
half of the way there, or a fault. Printed: the share that the filter rejects at its default bounds, and which checks did it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from envs.degradations import DEGRADATIONS
from envs.degradations.jpeg import from_uint8_hwc, to_uint8_hwc
from envs.images import load_rgb
from envs.photos import wheel_photos
from envs.pipeline.align import align
from envs.pipeline.config import FilterSection
from envs.pipeline.filters import measure, reasons
from envs.rng import generator_for

SIDE, PER_PHOTO = 256, 4
TEXTURES = (
    "brick",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "motorcycle_right",
)  # no scenes, or one scene twice
RECIPES = ("mild", "realesrgan", "haze", "lowlight")
KINDS = ("good", "half", "shift 4 px", "shift 12 px", "blurred", "copy", "scene", "patch", "text", "frame", "colour")


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
    out = gt.copy()
    match kind:
        case "half":
            return ((gt.astype(int) + lq) // 2).astype(np.uint8)
        case "shift 4 px":
            return np.roll(gt, (3, -3), (0, 1))
        case "shift 12 px":
            return np.roll(gt, (8, 9), (0, 1))
        case "blurred":
            return gaussian_filter(gt, (2.5, 2.5, 0))
        case "copy":
            return lq
        case "scene":
            return other
        case "patch":  # a tenth of the picture shows something else
            y, x = rng.integers(0, SIDE - 80, 2)
            out[y : y + 80, x : x + 80] = other[y : y + 80, x : x + 80]
        case "text":
            image = Image.fromarray(gt)
            ImageDraw.Draw(image).text((40, 120), "WRONG TEXT", fill=(255, 255, 255), font_size=32)
            return np.array(image)
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
            print(f"{recipe:12}{kind:14}{rejected:3} of {len(clean)}  {few}")


if __name__ == "__main__":
    main()
