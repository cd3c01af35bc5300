"""Colour fixes: the large-scale colour of a result is replaced by the LQ's, on decoded pixels in float32.

`Sampler` applies the fix before the rewards see a result, `direct` inside its gradient, `restoration` at the end, all with
these functions; the drift that a fix hides is measured before it. Where the colour of the LQ is what is wrong with it
(`COLOUR_TYPES`: haze, low light, ...) a task is left as it is.

wavelet: y - low(y) + low(lq), low of five a-trous passes (StableSR, SeeSR); adain: mean and std of each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from envs.types import Task
from rewards.filters import atrous_low_pass
from rewards.penalties.tone import COLOUR_TYPES

REACH_PX = 31  # of five passes: 1 + 2 + 4 + 8 + 16


def wavelet(image_B3HW: Tensor, lq_B3HW: Tensor) -> Tensor:
    return image_B3HW + atrous_low_pass(lq_B3HW - image_B3HW)  # the filter is linear: one instead of two


def adain(image_B3HW: Tensor, lq_B3HW: Tensor) -> Tensor:
    mean, std = _moments(image_B3HW)
    mean_lq, std_lq = _moments(lq_B3HW)
    return (image_B3HW - mean) / std * std_lq + mean_lq


FIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "adain": adain,
    "none": lambda image, lq: image,
    "wavelet": wavelet,
}


def check_fix(kind: str, key: str) -> None:
    if kind not in FIXES:
        raise ValueError(f"{key} '{kind}' is unknown: choose one of {', '.join(FIXES)}")


def colour_fix_for(kind: str, types: Collection[str]) -> str:
    """`kind`, or none where the colour of the LQ is what is wrong with it."""
    return "none" if COLOUR_TYPES & set(types) else kind


def fixed(kind: str, image_B3HW: Tensor, lq_B3HW: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1], as both inputs."""
    return image_B3HW if kind == "none" else FIXES[kind](image_B3HW, lq_B3HW).clamp(0, 1)


def fixed_for_tasks(kind: str, image_B3HW: Tensor, tasks_B: Sequence[Task]) -> Tensor:
    """The same, each row by the LQ of its task, and only where colour is no part of what is to be restored."""
    rows = [row for row, task in enumerate(tasks_B) if colour_fix_for(kind, task.types) != "none"]
    if not rows:
        return image_B3HW
    lq = stack_lq([tasks_B[row] for row in rows], image_B3HW)
    result = image_B3HW.clone()
    result[rows] = fixed(kind, image_B3HW[rows], lq)
    return result


def fixed_in_bands(kind: str, image_3HW: Tensor, lq_3HW: Tensor, band: int = 512) -> Iterable[tuple[int, Tensor]]:
    """(first row, [3, rows, W]) of the fixed picture, equal to `fixed` of the whole, with the temporaries of one band.

    `lq` may be uint8; a band of it is made float when its turn comes.
    """
    if kind == "adain":
        stats = _moments(image_3HW[None]), _moments_uint8(lq_3HW)
    height = image_3HW.shape[1]
    for top in range(0, height, band):
        first, last = max(0, top - REACH_PX), min(height, top + band + REACH_PX)
        image, lq = image_3HW[None, :, first:last], _unit(lq_3HW[:, first:last])[None]
        if kind == "adain":
            (mean, std), (mean_lq, std_lq) = stats
            result = ((image - mean) / std * std_lq + mean_lq).clamp(0, 1)
        else:
            result = fixed(kind, image, lq)
        yield top, result[0, :, top - first : top - first + min(band, height - top)]


def colour_drift_B(image_B3HW: Tensor, lq_B3HW: Tensor) -> Tensor:
    """Distance of the mean colours in the (a, b) plane of CIELAB (D65), in its units: 2 is just visible on a flat patch."""
    return (mean_ab(image_B3HW) - mean_ab(lq_B3HW)).norm(dim=1)


def mean_ab(srgb_B3HW: Tensor) -> Tensor:
    """[B, 2] of sRGB in [0, 1] (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(srgb_B3HW <= 0.04045, srgb_B3HW / 12.92, ((srgb_B3HW + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    ).to(linear)
    white = to_xyz.sum(1)  # of (1, 1, 1)
    xyz = torch.einsum("xc,bchw->bxhw", to_xyz / white[:, None], linear)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-12) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1).mean(dim=(2, 3))


def stack_lq(tasks_B: Sequence[Task], like: Tensor) -> Tensor:
    return torch.stack([task.lq for task in tasks_B]).to(like.device, torch.float32)


def _moments(image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel, [B, 3, 1, 1]; 1e-5 keeps a flat channel's std from 0."""
    mean = image_B3HW.mean(dim=(2, 3), keepdim=True)
    return mean, (image_B3HW.var(dim=(2, 3), keepdim=True) + 1e-5).sqrt()


def _moments_uint8(lq_3HW: Tensor) -> tuple[Tensor, Tensor]:
    """One channel at a time: a photo of 12 megapixels is not made float as a whole."""
    each = [_moments(_unit(channel)[None, None]) for channel in lq_3HW]
    return torch.cat([mean for mean, _ in each], dim=1), torch.cat([std for _, std in each], dim=1)


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
