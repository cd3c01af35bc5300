"""Which degradation types license which change, and the tone map that makes a licensed change of colour free.

Colour may change for the types in `COLOUR_TYPES` (haze, low light, ...): there the LQ is first fitted to the result by an affine
map per channel, so that a change of tone is free and a repainted region is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.types import Restoration

LICENCE = "own code"
COLOUR_TYPES = frozenset({"haze", "hdr", "lowlight", "oldphoto", "underwater"})
OCCLUSION_TYPES = frozenset({"flare", "rain", "raindrop", "reflection", "snow"})
GRID_TYPES = frozenset({"haze"})  # the veil varies over the picture, so its tone map may too
GRID_CELL_PX, GRID_MAX = 128, 4  # one node per 128 px: a finer grid could fit any low-pass image


def affine_fit(source_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """`a * source + b`, least squares per image and channel with a >= 0 (a negative is not a tone change).

    Same shape.
    """
    s, t = source_NCHW.flatten(2), target_NCHW.flatten(2)
    s_mean, t_mean = s.mean(2, keepdim=True), t.mean(2, keepdim=True)
    var = ((s - s_mean) ** 2).mean(2, keepdim=True)
    cov = ((s - s_mean) * (t - t_mean)).mean(2, keepdim=True)
    gain = (cov / (var + 1e-8)).clamp_min(0)
    return (t_mean + gain * (s - s_mean)).view_as(source_NCHW)


def grid_nodes(height_px: int, width_px: int) -> int:
    """Nodes per side of the tone map's grid; 1 is a global map."""
    return max(1, min(GRID_MAX, min(height_px, width_px) // GRID_CELL_PX))


def affine_grid_fit(source_CHW: Tensor, target_CHW: Tensor) -> Tensor:
    """As `affine_fit` for one image, with gain and offset interpolated bilinearly on a grid of `grid_nodes`.

    Ridge 1e-4. The fit is solved on every 8th pixel: both inputs are low-pass bands of sigma 13 px. [C, H, W] in, the
    same shape out.
    """
    _c, h, w = source_CHW.shape
    g = grid_nodes(h, w)
    if g == 1:
        return affine_fit(source_CHW[None], target_CHW[None])[0]
    hats = F.interpolate(torch.eye(g * g).view(1, g * g, g, g), (h, w), mode="bilinear", align_corners=True)[0]
    coarse, full = hats[:, ::8, ::8].reshape(g * g, -1).T, hats.reshape(g * g, -1).T  # [pixels, nodes]
    fitted = []
    for source, target in zip(source_CHW, target_CHW, strict=True):
        s, t = source[::8, ::8].reshape(-1, 1), target[::8, ::8].reshape(-1)
        design = torch.cat([coarse * s, coarse], dim=1).double()
        # the ridge pulls towards the identity (gain 1, offset 0), not towards black
        prior = torch.cat([torch.ones(g * g), torch.zeros(g * g)]).double()
        normal = design.T @ design / len(t) + 1e-4 * torch.eye(2 * g * g, dtype=torch.float64)
        coef = prior + torch.linalg.solve(normal, design.T @ (t.double() - design @ prior) / len(t))
        gain, offset = coef.float().split(g * g)
        fitted.append((source.reshape(-1) * (full @ gain) + full @ offset).view(h, w))
    return torch.stack(fitted)


def tone_matched(items: Sequence[Restoration], lq_N3HW: Tensor, x_N3HW: Tensor) -> Tensor:
    """The low-passed LQ, fitted to the low-passed result where the task's types license a change of colour.

    `[N, 3, H, W]`.
    """
    licensed = [i for i, item in enumerate(items) if COLOUR_TYPES & set(item.task.types)]
    if not licensed:
        return lq_N3HW
    matched = lq_N3HW.clone()
    for i in licensed:
        if GRID_TYPES & set(items[i].task.types):
            matched[i] = affine_grid_fit(lq_N3HW[i], x_N3HW[i])
        else:
            matched[i] = affine_fit(lq_N3HW[i : i + 1], x_N3HW[i : i + 1])[0]
    return matched
