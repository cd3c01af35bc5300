"""The Real-ESRGAN degradation (Wang et al. 2021, arXiv 2107.10833): two rounds of blur, resize, noise and JPEG, then a
sinc filter.

`degrade(gt, rng, recipe)` is a pure function: the same image, generator state and recipe give the same bytes. Steps,
numbered as in the code (order from xinntao/Real-ESRGAN `realesrgan_model.py`, ranges from
`options/train_realesrgan_x4plus.yml`):

    1 blur   2 resize   3 Gaussian or Poisson noise   4 JPEG                       first round
    5 blur   6 resize   7 Gaussian or Poisson noise                                second round, by `second_order_prob`
    8 half of the time: resize to 1/scale, sinc, JPEG; otherwise: JPEG, resize to 1/scale, sinc
    9 round to 8 bits, resize back to the size of gt (bicubic), round again        "restoration layout"

The two orders of step 8 are deliberate: other orders give twisted lines (comment in the source). The original crops to
1/4 size and stops before the resize back, which is HYPIR's `resize_back`. No sharpening of gt: a reference stays what
the photo shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from envs.degradations.base import Degraded, round8
from envs.degradations.jpeg import jpeg
from envs.degradations.kernels import blur, gaussian_kernel, plateau_kernel, sinc_kernel
from envs.degradations.noise import gaussian_noise, poisson_noise
from envs.degradations.resize import MODES, resize

Range = tuple[float, float]

SINC_SIZE = 21  # of the final filter
KERNEL_KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


@dataclass(frozen=True)
class Stage:
    """One round: the ranges it draws from. Defaults: the first round of Real-ESRGAN x4plus."""

    blur_prob: float = 1.0
    kernel_size: tuple[int, int] = (7, 21)  # odd, both ends included
    kernel_probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # in the order of KERNEL_KINDS
    sinc_prob: float = 0.1  # a sinc filter instead of these kernels
    sigma_px: Range = (0.2, 3.0)
    beta_gaussian: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    resize_probs: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize_range: Range = (0.15, 1.5)  # of the side length; below 1 for down, above for up
    noise_prob: float = 1.0
    gaussian_prob: float = 0.5  # otherwise Poisson
    noise_sigma_255: Range = (1.0, 30.0)
    poisson_scale: Range = (0.05, 3.0)
    gray_prob: float = 0.4
    jpeg_prob: float = 1.0
    jpeg_quality: Range = (30.0, 95.0)


SECOND_STAGE = Stage(
    blur_prob=0.8,
    sigma_px=(0.2, 1.5),
    resize_probs=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    noise_sigma_255=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)


@dataclass(frozen=True)
class Recipe:
    """All parameters of `degrade`. Defaults: Real-ESRGAN x4plus."""

    first: Stage = field(default_factory=Stage)
    second: Stage = SECOND_STAGE
    second_order_prob: float = 1.0  # of steps 5 to 7; step 8 always runs
    final_sinc_prob: float = 0.8
    scale: int = 4  # LQ passes through 1/scale of the size of gt; 1 keeps the size
    severity: float = 1.0  # in [0, 1]: 0 leaves each range at its mild end, 1 uses all of it

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"recipe.scale must be >= 1, got {self.scale}")
        if not 0.0 <= self.severity <= 1.0:
            raise ValueError(f"recipe.severity must be in [0, 1], got {self.severity}")
        for name, stage in (("first", self.first), ("second", self.second)):
            for part in ("kernel_probs", "resize_probs"):
                if abs(sum(getattr(stage, part)) - 1.0) > 1e-6:
                    raise ValueError(f"recipe.{name}.{part} must sum to 1, got {getattr(stage, part)}")

    def apply(self, gt: Tensor, rng: np.random.Generator) -> Degraded:
        return degrade(gt, rng, self)


def degrade(gt: Tensor, rng: np.random.Generator, recipe: Recipe) -> Degraded:
    """Degrade [3, H, W] float32 in [0, 1] by `recipe`; all randomness comes from `rng`."""
    height, width = gt.shape[-2:]
    low = (max(1, height // recipe.scale), max(1, width // recipe.scale))
    record = {"scale": float(recipe.scale), "severity": float(recipe.severity)}
    first, second = _at_severity(recipe.first, recipe.severity), _at_severity(recipe.second, recipe.severity)

    image = _blur(gt, rng, first, "blur1", record)
    image = _resize(image, (height, width), rng, first, "resize1", record)
    image = _noise(image, rng, first, "noise1", record)
    image = _jpeg(image, rng, first, "jpeg1", record)

    if rng.random() < recipe.second_order_prob:
        image = _blur(image, rng, second, "blur2", record)
        image = _resize(image, low, rng, second, "resize2", record)
        image = _noise(image, rng, second, "noise2", record)

    if rng.random() < 0.5:
        image = _low_sinc(image, low, rng, recipe, record)
        image = _jpeg(image, rng, second, "jpeg2", record)
    else:
        image = _jpeg(image, rng, second, "jpeg2", record)
        image = _low_sinc(image, low, rng, recipe, record)

    lq = round8(resize(round8(image), height, width, "bicubic"))
    return Degraded(lq, _types(record), record)


def _at_severity(stage: Stage, severity: float) -> Stage:
    """The stage with each range shrunk towards its mild end: small sigma and noise, quality high, resize factor 1."""
    if severity == 1.0:
        return stage

    def between(mild: float, strong: float) -> float:
        return mild + severity * (strong - mild)

    def from_low(ends: Range) -> Range:
        return ends[0], between(*ends)

    return replace(
        stage,
        sinc_prob=severity * stage.sinc_prob,
        sigma_px=from_low(stage.sigma_px),
        resize_range=(between(1.0, stage.resize_range[0]), between(1.0, stage.resize_range[1])),
        noise_sigma_255=from_low(stage.noise_sigma_255),
        poisson_scale=from_low(stage.poisson_scale),
        jpeg_quality=(between(stage.jpeg_quality[1], stage.jpeg_quality[0]), stage.jpeg_quality[1]),
    )


def _beta(ends: Range, rng: np.random.Generator) -> float:
    """Half of the time below 1, half above, as BasicSR draws it."""
    return rng.uniform(ends[0], 1.0) if rng.random() < 0.5 else rng.uniform(1.0, ends[1])


def _draw_kernel(rng: np.random.Generator, stage: Stage, name: str, record: dict[str, float]) -> Tensor:
    low, high = stage.kernel_size
    size = int(low + 2 * rng.integers(0, (high - low) // 2 + 1))
    record[f"{name}_size_px"] = float(size)
    if rng.random() < stage.sinc_prob:
        omega = rng.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi)
        record[f"{name}_omega"] = omega
        return sinc_kernel(size, omega)
    kind_index = int(np.searchsorted(np.cumsum(stage.kernel_probs)[:-1], rng.random(), side="right"))
    kind = KERNEL_KINDS[kind_index]
    sigma_x = sigma_y = rng.uniform(*stage.sigma_px)
    theta = 0.0
    if kind.endswith("aniso"):
        sigma_y, theta = rng.uniform(*stage.sigma_px), rng.uniform(-math.pi, math.pi)
    record[f"{name}_kind"], record[f"{name}_theta"] = float(kind_index), theta
    record[f"{name}_sigma_x_px"], record[f"{name}_sigma_y_px"] = sigma_x, sigma_y
    if kind.startswith("plateau"):
        record[f"{name}_beta"] = beta = _beta(stage.beta_plateau, rng)
        return plateau_kernel(size, sigma_x, sigma_y, theta, beta)
    if kind.startswith("generalized"):
        record[f"{name}_beta"] = beta = _beta(stage.beta_gaussian, rng)
        return gaussian_kernel(size, sigma_x, sigma_y, theta, beta)
    return gaussian_kernel(size, sigma_x, sigma_y, theta)


def _blur(image: Tensor, rng: np.random.Generator, stage: Stage, name: str, record: dict[str, float]) -> Tensor:
    if rng.random() >= stage.blur_prob:
        return image
    return blur(image, _draw_kernel(rng, stage, name, record)).clamp_(0, 1)


def _resize(
    image: Tensor, base: tuple[int, int], rng: np.random.Generator, stage: Stage, name: str, record: dict[str, float]
) -> Tensor:
    """Resize to base * factor; `base` is the size of gt in step 2 and 1/scale of it in step 6."""
    up, down, _ = stage.resize_probs
    draw = rng.random()
    low, high = stage.resize_range
    factor = rng.uniform(1.0, high) if draw < up else rng.uniform(low, 1.0) if draw < up + down else 1.0
    mode = MODES[int(rng.integers(len(MODES)))]
    record[f"{name}_factor"] = factor
    record[f"{name}_mode"] = float(MODES.index(mode))
    return resize(image, max(1, round(base[0] * factor)), max(1, round(base[1] * factor)), mode).clamp(0, 1)


def _noise(image: Tensor, rng: np.random.Generator, stage: Stage, name: str, record: dict[str, float]) -> Tensor:
    if rng.random() >= stage.noise_prob:
        return image
    gray = bool(rng.random() < stage.gray_prob)
    record[f"{name}_gray"] = float(gray)
    if rng.random() < stage.gaussian_prob:
        record[f"{name}_sigma_255"] = sigma_255 = rng.uniform(*stage.noise_sigma_255)
        return gaussian_noise(image, sigma_255, gray, rng)
    record[f"{name}_poisson_scale"] = scale = rng.uniform(*stage.poisson_scale)
    return poisson_noise(image, scale, gray, rng)


def _jpeg(image: Tensor, rng: np.random.Generator, stage: Stage, name: str, record: dict[str, float]) -> Tensor:
    if rng.random() >= stage.jpeg_prob:
        return image
    quality = round(rng.uniform(*stage.jpeg_quality))
    record[f"{name}_quality"] = float(quality)
    return jpeg(image, quality)


def _low_sinc(
    image: Tensor, low: tuple[int, int], rng: np.random.Generator, recipe: Recipe, record: dict[str, float]
) -> Tensor:
    """Resize to 1/scale in a random mode, then the final sinc filter with its probability (none at severity 0)."""
    mode = MODES[int(rng.integers(len(MODES)))]
    record["resize3_mode"] = float(MODES.index(mode))
    image = resize(image, *low, mode).clamp(0, 1)
    if rng.random() >= recipe.severity * recipe.final_sinc_prob:
        return image
    record["sinc_omega"] = omega = rng.uniform(math.pi / 3, math.pi)
    return blur(image, sinc_kernel(SINC_SIZE, omega)).clamp_(0, 1)


def _types(record: dict[str, float]) -> tuple[str, ...]:
    applied = {
        "blur": ("blur1_size_px", "blur2_size_px", "sinc_omega"),
        "noise": ("noise1_gray", "noise2_gray"),
        "compression": ("jpeg1_quality", "jpeg2_quality"),
    }
    found = [name for name, keys in applied.items() if any(key in record for key in keys)]
    shrunk = record["scale"] > 1 or any(record.get(f"resize{i}_factor", 1.0) < 1.0 for i in (1, 2))
    return tuple(found + ["sr"] * shrunk)
