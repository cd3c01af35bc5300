"""The categories of GGT-100K as recipes: haze, rain, snow, lowlight, oldphoto, mix; and `ggt`, which draws one of them.

A photo of these categories has more than one fault, so each effect is followed by what a camera and a codec do: the
weather comes before the sensor (`camera`: blur, noise, JPEG of the mild Real-ESRGAN recipe), the sensor before the codec.
`mix` is the camera alone, with all of Real-ESRGAN's first-order ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from envs.degradations.base import Degraded, round8
from envs.degradations.capture import low_light, old_photo
from envs.degradations.realesrgan import Recipe, Stage
from envs.degradations.weather import haze, rain, snow

Effect = Callable[[Tensor, np.random.Generator, float], tuple[Tensor, dict[str, float]]]

EFFECTS: dict[str, Effect] = {"haze": haze, "lowlight": low_light, "oldphoto": old_photo, "rain": rain, "snow": snow}
CATEGORIES = (*sorted(EFFECTS), "mix")

_LIGHT = Stage(
    blur_prob=0.3,
    sigma_px=(0.2, 1.2),
    resize_probs=(0.0, 0.3, 0.7),
    resize_range=(0.6, 1.0),
    noise_prob=0.5,
    noise_sigma_255=(1.0, 8.0),
    poisson_scale=(0.05, 1.0),
    jpeg_prob=0.0,
    jpeg_quality=(60.0, 95.0),
)
CAMERA = Recipe(
    first=_LIGHT, second=replace(_LIGHT, jpeg_prob=0.8), second_order_prob=0.0, final_sinc_prob=0.0, scale=1
)
MIX = Recipe(second_order_prob=0.5, scale=1)


@dataclass(frozen=True)
class Category:
    """One category, or any of them with equal probability ("ggt")."""

    name: str
    scale: int = 1
    severity: float = 1.0  # of the effect and of the camera

    def __post_init__(self) -> None:
        if self.name not in (*CATEGORIES, "ggt"):
            raise ValueError(f"a category is one of {', '.join((*CATEGORIES, 'ggt'))}, got {self.name!r}")
        if not 0.0 <= self.severity <= 1.0:
            raise ValueError(f"recipe.severity must be in [0, 1], got {self.severity}")

    def apply(self, gt: Tensor, rng: np.random.Generator) -> Degraded:
        """The record has the effect's parameters and the camera's, and `category`: a place in CATEGORIES."""
        name = self.name if self.name != "ggt" else CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        record = {"category": float(CATEGORIES.index(name))}
        if name == "mix":
            done = replace(MIX, scale=self.scale, severity=self.severity).apply(gt, rng)
            return Degraded(done.lq, ("mix", *done.types), {**done.record, **record})
        image, drawn = EFFECTS[name](gt, rng, self.severity)
        done = replace(CAMERA, scale=self.scale, severity=self.severity).apply(round8(image), rng)
        return Degraded(done.lq, (name, *done.types), {**done.record, **drawn, **record})
