"""More hands for the training split of scripts/make_arena.py: cheap filters and mixtures, each at a random strength.

Pure functions of ([3, H, W] pictures in [0, 1], generator). They stand in for restorers that nobody has met: what they leave and what
they lose is spread as widely as a minute of code allows. None of them is a hand that the test split keeps unseen (`nlm`, `wiener`, and
the ncnn restorers).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from envs.degradations.jpeg import jpeg
from rewards.filters import binomial_pass, gaussian_blur, luma_yiq

DCT_PX = 8
MODES = ("bilinear", "bicubic")


def blurred(x: Tensor, sigma_px: float) -> Tensor:
    return gaussian_blur(x[None], sigma_px)[0]


def sharpened(x: Tensor, amount: float, sigma_px: float) -> Tensor:
    return x + amount * (x - blurred(x, sigma_px))


def median(x: Tensor, side_px: int) -> Tensor:
    """Of a square window of odd side, replicate padding."""
    padded = F.pad(x[None], (side_px // 2,) * 4, mode="replicate")[0]
    return padded.unfold(1, side_px, 1).unfold(2, side_px, 1).flatten(3).median(3).values


def box_mean(x: Tensor, radius_px: int) -> Tensor:
    """Mean of a square window, replicate padding."""
    side = 2 * radius_px + 1
    return F.avg_pool2d(F.pad(x[None], (radius_px,) * 4, mode="replicate"), side, 1)[0]


def guided(x: Tensor, radius_px: int, epsilon: float) -> Tensor:
    """The guided filter (He et al. 2010) of each plane by itself."""
    mean = box_mean(x, radius_px)
    gain = (box_mean(x * x, radius_px) - mean * mean).clamp_min(0)
    gain = gain / (gain + epsilon)
    return box_mean(gain, radius_px) * x + box_mean((1 - gain) * mean, radius_px)


def diffused(x: Tensor, passes: int, edge: float) -> Tensor:
    """Anisotropic diffusion (Perona and Malik 1990): what differs from a neighbour by more than `edge` stays."""
    for _ in range(passes):
        padded = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
        height, width = x.shape[-2:]
        around = [padded[:, y : y + height, z : z + width] - x for y, z in ((0, 1), (2, 1), (1, 0), (1, 2))]
        x = x + 0.2 * torch.stack([d * torch.exp(-((d / edge) ** 2)) for d in around]).sum(0)
    return x


def _dct_basis() -> Tensor:
    """[64, 1, 8, 8] orthonormal."""
    k, n = torch.arange(DCT_PX).view(-1, 1), torch.arange(DCT_PX).view(1, -1)
    rows = torch.cos(math.pi * (2 * n + 1) * k / (2 * DCT_PX)) * (2 / DCT_PX) ** 0.5
    rows[0] /= 2**0.5
    return torch.einsum("ay,bx->abyx", rows, rows).reshape(DCT_PX**2, 1, DCT_PX, DCT_PX)


def thresholded_dct(x: Tensor, threshold: float, stride_px: int = 2) -> Tensor:
    """Hard threshold in overlapping 8x8 blocks (Yu and Sapiro 2011)."""
    basis = _dct_basis()
    padded = F.pad(x[:, None], (DCT_PX - 2,) * 4, mode="reflect")
    blocks = F.conv2d(padded, basis, stride=stride_px)
    kept = (blocks.abs() > threshold).float()
    kept[:, 0] = 1
    total = F.conv_transpose2d(blocks * kept, basis, stride=stride_px)
    count = F.conv_transpose2d(torch.ones_like(blocks[:1, :1]), torch.ones_like(basis[:1]), stride=stride_px).clamp_min(
        1
    )
    out, edge = total / count, DCT_PX - 2
    return out[:, 0, edge : edge + x.shape[-2], edge : edge + x.shape[-1]]


def shrunk_wavelet(x: Tensor, threshold: float) -> Tensor:
    """Soft threshold of the two finest bands of the a-trous wavelet."""
    out, low = torch.zeros_like(x), x[None]
    for level in range(2):
        below = binomial_pass(low, 2**level)
        band = (low - below)[0]
        out = out + band.sign() * (band.abs() - threshold / 2**level).clamp_min(0)
        low = below
    return out + low[0]


def through_size(x: Tensor, scale: float, mode: str) -> Tensor:
    """Down to `scale` of the size and up again."""
    size = [max(8, round(side * scale)) for side in x.shape[-2:]]
    small = F.interpolate(x[None], size, mode="bicubic", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode=mode)[0]


def back_projected(x: Tensor, sigma_px: float, passes: int) -> Tensor:
    """Van Cittert's deconvolution: x + (l - blur(x)), again and again; it lifts noise as well."""
    out = x
    for _ in range(passes):
        out = out + 0.5 * (x - blurred(out, sigma_px))
    return out


def shocked(x: Tensor, amount: float) -> Tensor:
    """Flat areas and hard edges, as over-confident networks draw them: smoothed by edges, then sharpened within the local range."""
    flat = guided(diffused(x, 8, 0.08), 2, 2e-3)
    sharp = sharpened(flat, amount, 1.0)
    low = -F.max_pool2d(-flat[None], 3, 1, 1)[0]
    return sharp.clamp(low, F.max_pool2d(flat[None], 3, 1, 1)[0])


def smooth_chroma(x: Tensor, sigma_px: float) -> Tensor:
    luma = luma_yiq(x[None])[0]
    return luma + blurred(x - luma, sigma_px)


def more_hands(
    lq: Tensor,
    gt: Tensor,
    mean: Tensor,
    one: Tensor,
    again: Callable[[Tensor], Tensor],
    count: int,
    rng: np.random.Generator,
) -> list[tuple[str, Tensor]]:
    """`count` different ones of the hands below. `one` is a sample of the restorer, `again` its mean network."""

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def base(*among: Tensor) -> Tensor:
        return among[int(rng.integers(len(among)))]

    def mixture() -> Tensor:
        shares = rng.dirichlet([0.7] * 4)
        return sum(
            (float(s) * x for s, x in zip(shares, (lq, mean, one, blurred(lq, 1.0)), strict=True)),
            0 * lq,
        )

    def altered() -> Tensor:
        grain = between(0, 0.05) * torch.from_numpy(rng.standard_normal(lq.shape).astype(np.float32))
        return again((blurred(lq, between(0.3, 1.2)) if rng.random() < 0.5 else lq + grain).clamp(0, 1))

    makers: dict[str, Callable[[], Tensor]] = {
        "altered": altered,
        "back_projected": lambda: back_projected(base(lq, mean, guided(lq, 2, 2e-3)), between(0.5, 1.2), int(rng.integers(2, 7))),
        "box": lambda: box_mean(base(lq, one), int(rng.integers(1, 3))),
        "chroma": lambda: smooth_chroma(base(lq, one), between(1, 4)),
        "dct": lambda: thresholded_dct(base(lq, lq, one), between(0.03, 0.4)),
        "diffused": lambda: diffused(base(lq, lq, one), int(rng.integers(3, 20)), between(0.02, 0.15)),
        "exaggerated": lambda: mean + between(1.1, 1.8) * (one - mean),
        "gauss": lambda: blurred(base(lq, one), between(0.4, 1.2)),
        "guided": lambda: guided(base(lq, lq, one), int(rng.integers(1, 5)), 10 ** between(-4, -2)),
        "jpeg": lambda: jpeg(base(lq, one, mean, gt), int(rng.integers(20, 90))),
        "median5": lambda: median(base(lq, one), 5),
        "mixture": mixture,
        "near": lambda: (lambda s: s * gt + (1 - s) * base(mean, one, lq))(between(0.1, 0.9)),
        "returned": lambda: mean + between(-0.4, 0.7) * (lq - mean),
        "shocked": lambda: shocked(base(lq, mean, one), between(0.5, 4)),
        "through_size": lambda: through_size(base(lq, one, mean, gt), between(0.35, 0.85), MODES[int(rng.integers(2))]),
        "unsharp": lambda: sharpened(
            base(lq, one, blurred(lq, 0.7), thresholded_dct(lq, 0.15)), between(0.3, 2.5), between(0.6, 1.5)
        ),
        "wavelet": lambda: shrunk_wavelet(base(lq, lq, one), between(0.01, 0.12)),
    }  # fmt: skip
    chosen = rng.choice(sorted(makers), count, replace=False)
    return [(str(name), makers[str(name)]().clamp(0, 1)) for name in chosen]
