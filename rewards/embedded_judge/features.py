"""What the embedded judge's network sees: fixed local measurements on 8 px cells, of a restoration beside its evidence.

x is the restoration, l the LQ, m the expected clean picture and s its spread (`estimator`); y is the clean picture itself, which nobody
has: what is expected of it under m and s stands for it. Per cell:

    octaves    within 2x2 pixels of full, half and quarter size: the energies of x, m, l, x - m and x - l, how far x - m follows m
               (sharpening) and how far it follows l - m (noise that was kept)
    drifts     of colour against l and m; how large and how far off (x - m) / s is
    composite  the parts of `rewards.composite` between x and m, x and l, and x and y
    grain      how noise-like x and x - m are: diagonal against all fine energy, likeness of neighbours, one direction or all
    errors     log mean squares of x - m, x - y, x - l and s; the network sums them over the picture as well
    fits       the LQ as a filtered x, and x as filtered m and filtered LQ, by least squares over the picture: filters and what is left

Differentiable in x, the same under turns and mirrors of all pictures. Nothing here is learned.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.filters import gaussian_blur, gaussian_taps, luma_yiq, separable
from rewards.reference import gradient_magnitude

CELL_PX, OCTAVES = 8, 3
_FIRST = 7 * OCTAVES + 14 + 17 + 7
ERRORS = slice(_FIRST, _FIRST + 4)  # channels that are natural logs of mean squares
LOCAL = ERRORS.stop + 1  # channels that differ from cell to cell; the rest are the same in all of them
CHANNELS = LOCAL + 16
ENERGY_FLOOR = 1e-6  # of [0, 1] squared: a quarter of a grey level
TEXTURE_FLOOR = 1e-5  # as in `rewards.composite`
MIN_PX = 4 * CELL_PX
# What a band, or a squared gradient, keeps of white noise of variance 1: sums of squared taps.
BANDS = ((0.7, 0.51), (1.4, 0.073))  # sigma in px of the low pass under the band, as in `rewards.composite`
FIT_PX, FIT_RIDGE = (0.7, 1.4, 2.8), 1e-7  # cuts between the bands that fits may weight; of a mean square
GRAIN_PX = 1.4  # sigma of the low pass under what counts as grain
GRADIENT_OF_NOISE = 4 / 3  # two Prewitt kernels of six taps of 1/3


def cell_features(x_N3HW: Tensor, lq_N3HW: Tensor, mean_N3HW: Tensor, log_spread_N3HW: Tensor) -> Tensor:
    """[N, CHANNELS, ceil(H / 8), ceil(W / 8)] float32, about unit-sized; the evidence may be one for all N. ValueError below 32 px."""
    height, width = x_N3HW.shape[-2:]
    if min(height, width) < MIN_PX:
        raise ValueError(f"the embedded judge needs images of at least {MIN_PX} px, got {height}x{width}")
    edge = (0, -width % CELL_PX, 0, -height % CELL_PX)
    x, lq, m, log_s = (F.pad(z, edge, mode="replicate") for z in (x_N3HW, lq_N3HW, mean_N3HW, log_spread_N3HW))
    x_luma, lq_luma, m_luma = luma_yiq(x), luma_yiq(lq), luma_yiq(m)
    noise = (2 * log_s).exp().mean(1, keepdim=True)  # what cannot be known is mostly luma: the channels move together
    beside = [z.expand_as(x_luma) for z in (lq_luma, m_luma)]
    maps = [
        *_octaves(x_luma, *beside),
        _cells(x, lq, m, log_s),
        *_structure(x_luma, lq_luma, m_luma, noise),
        *_gradients(x_luma, lq_luma, m_luma, noise),
        *_texture(x_luma, lq_luma, m_luma, noise),
        *_grain(x_luma, m_luma),
        *_errors(x, lq, m, noise),
        *_fits(x_luma, lq_luma, m_luma),
    ]
    return torch.cat(maps, dim=1)


def _pooled(x: Tensor) -> Tensor:
    """A map of any size that divides the picture's, on the cells."""
    return F.avg_pool2d(x, CELL_PX)


def _octaves(x: Tensor, lq: Tensor, m: Tensor) -> list[Tensor]:
    """Seven maps an octave, from within-2x2 (co)variances averaged over the cell."""
    out = []
    for octave in range(OCTAVES):
        planes = torch.cat([x, m, lq], dim=1)
        low = F.avg_pool2d(planes, 2)
        products = torch.cat([planes * planes, planes * planes.roll(1, dims=1)], dim=1)  # xx mm ll, xl mx lm
        cov = F.avg_pool2d(products, 2) - torch.cat([low * low, low * low.roll(1, dims=1)], dim=1)
        xx, mm, ll, xl, xm, ml = F.avg_pool2d(cov, CELL_PX // 2 ** (octave + 1)).split(1, dim=1)
        change, kept = (xx + mm - 2 * xm).clamp_min(0), (xx + ll - 2 * xl).clamp_min(0)
        removed = (ll + mm - 2 * ml).clamp_min(0)
        with_m = (xm - mm) / ((change + ENERGY_FLOOR) * (mm + ENERGY_FLOOR)).sqrt()
        with_noise = (xl - xm - ml + mm) / ((change + ENERGY_FLOOR) * (removed + ENERGY_FLOOR)).sqrt()
        logs = [((energy.clamp_min(0) + ENERGY_FLOOR).log() + 8) / 3 for energy in (xx, mm, ll, change, kept)]
        out += [*logs, with_m, with_noise]
        x, m, lq = low.split(1, dim=1)
    return out


def _cells(x: Tensor, lq: Tensor, m: Tensor, log_s: Tensor) -> Tensor:
    """Fourteen maps: drifts against l and m (3 each, tens of percent), surprise (mean 3, log mean square, largest), its chroma
    part, log s, and the brightness of m."""
    surprise = ((x - m) * (-log_s).exp()).clamp(-8, 8)
    chroma = surprise - surprise.mean(1, keepdim=True)
    mean = F.avg_pool2d(torch.cat([10 * (x - lq), 10 * (x - m), surprise], dim=1), CELL_PX)
    square = F.avg_pool2d(torch.cat([surprise, chroma], dim=1).square(), CELL_PX)
    size, colour = (square.split(3, dim=1)[k].mean(1, keepdim=True) for k in range(2))
    peak = F.max_pool2d(surprise.abs().mean(1, keepdim=True), CELL_PX) / 2
    known = F.avg_pool2d(torch.cat([(log_s + 3).mean(1, keepdim=True), m.mean(1, keepdim=True)], dim=1), CELL_PX)
    context = known.expand(len(x), -1, -1, -1)
    return torch.cat([mean, (size + 1e-3).log(), (colour + 1e-3).log(), peak, context], dim=1)


def _structure(x: Tensor, lq: Tensor, m: Tensor, noise: Tensor) -> list[Tensor]:
    """Three maps: SSIM of x with m, with y and with l. y = m + noise, so its windows vary more and covary with x as m does."""
    c1, c2, taps = 0.01**2, 0.03**2, gaussian_taps(1.5, 5)
    known = separable(torch.cat([m, lq, m * m, lq * lq, noise], dim=1), taps, padded=True)
    mu_m, mu_l, mm, ll, n = known.split(1, dim=1)
    mu_x, xx, xm, xl = separable(torch.cat([x, x * x, x * m, x * lq], dim=1), taps, padded=True).split(1, dim=1)
    var_x, var_m, var_l = xx - mu_x**2, mm - mu_m**2, ll - mu_l**2

    def ssim(mu: Tensor, var: Tensor, cov: Tensor) -> Tensor:
        return 2 * _pooled((2 * mu_x * mu + c1) * (2 * cov + c2) / ((mu_x**2 + mu**2 + c1) * (var_x + var + c2)))

    cov_m = xm - mu_x * mu_m
    return [ssim(mu_m, var_m, cov_m), ssim(mu_m, var_m + n, cov_m), ssim(mu_l, var_l, xl - mu_x * mu_l)]


def _gradients(x: Tensor, lq: Tensor, m: Tensor, noise: Tensor) -> list[Tensor]:
    """Six maps: gradient similarity of x with m, and with y, over three scales; and with l, over the first; their mean of y's."""
    out, t = [], 170.0 / 255**2
    for scale in range(3):
        g_x, g_m = gradient_magnitude(x), gradient_magnitude(m)
        g_y = (g_m**2 + GRADIENT_OF_NOISE * noise).sqrt()
        others = [g_m, g_y] if scale else [g_m, g_y, gradient_magnitude(lq)]
        out += [4 * F.avg_pool2d((2 * g_x * g + t) / (g_x**2 + g**2 + t), CELL_PX // 2**scale) - 3 for g in others]
        x, m, noise = F.avg_pool2d(x, 2), F.avg_pool2d(m, 2), F.avg_pool2d(noise, 2) / 4
    return out


def _texture(x: Tensor, lq: Tensor, m: Tensor, noise: Tensor) -> list[Tensor]:
    """Seven maps: in two bands log ratio of the energies of x and m, x and y (and its size); of x and l in the first."""
    out = []
    for sigma_px, kept in BANDS:
        low_x, low_m = gaussian_blur(x, sigma_px), gaussian_blur(m, sigma_px)
        e_x, e_m = _pooled((x - low_x).square()), _pooled((m - low_m).square())
        e_y = e_m + kept * _pooled(noise)
        log_x = (e_x + TEXTURE_FLOOR).log()
        against_y = log_x - (e_y + TEXTURE_FLOOR).log()
        out += [log_x - (e_m + TEXTURE_FLOOR).log(), against_y, against_y.abs()]
        if sigma_px == BANDS[0][0]:
            e_l = _pooled((lq - gaussian_blur(lq, sigma_px)).square())
            out.append(log_x - (e_l + TEXTURE_FLOOR).log())
        x, m = low_x, low_m
    return out


def _grain(x: Tensor, m: Tensor) -> list[Tensor]:
    """Seven maps: of x and of d = x - m the share of diagonal energy in 2x2 pixels, the likeness of neighbours, and how far the
    gradient has one direction; and the peakedness of d."""
    out = []
    high_x = x - gaussian_blur(x, GRAIN_PX)
    high_d = high_x - (m - gaussian_blur(m, GRAIN_PX))
    for z, high in ((x, high_x), (x - m, high_d)):
        a, b, c, e = z[..., ::2, ::2], z[..., ::2, 1::2], z[..., 1::2, ::2], z[..., 1::2, 1::2]
        fine = torch.cat([a - b - c + e, a + b - c - e, a - b + c - e], dim=1).square()
        diagonal, *rest = F.avg_pool2d(fine, CELL_PX // 2).split(1, dim=1)
        out.append(((diagonal + ENERGY_FLOOR) / (diagonal + rest[0] + rest[1] + 3 * ENERGY_FLOOR)).log() + 1.5)
        around = F.pad(high, (1, 1, 1, 1), mode="replicate")
        right, left = around[..., 1:-1, 2:], around[..., 1:-1, :-2]
        below, above = around[..., 2:, 1:-1], around[..., :-2, 1:-1]
        dx, dy = right - left, below - above
        products = [high * high, high * (right + left + below + above), dx * dx, dy * dy, dx * dy]
        energy, near, xx, yy, xy = _pooled(torch.cat(products, dim=1)).split(1, dim=1)
        out.append(near / (4 * (energy + ENERGY_FLOOR)) * 3)
        out.append(((xx - yy) ** 2 + 4 * xy**2 + ENERGY_FLOOR**2).sqrt() / (xx + yy + ENERGY_FLOOR))
    fourth = _pooled(high_d.square().square()) + ENERGY_FLOOR**2
    return [*out, fourth.log() - 2 * (energy + ENERGY_FLOOR).log() - 1]


def _bands(x: Tensor) -> Tensor:
    """[N, 4, H, W]: the picture cut by frequency; the lowest one around its mean."""
    low = [x, *(gaussian_blur(x, sigma_px) for sigma_px in FIT_PX)]
    return torch.cat(
        [*(fine - coarse for fine, coarse in pairwise(low)), low[-1] - low[-1].mean((2, 3), keepdim=True)], dim=1
    )


def _fitted(target: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over the whole picture: coefficients [N, K] and what is left of the target [N, 1, H, W]."""
    flat, wanted = basis.flatten(2), (target - target.mean((2, 3), keepdim=True)).flatten(2)
    wanted = wanted.expand(len(flat), -1, -1)
    gram = flat @ flat.transpose(1, 2) / flat.shape[2]
    ridge = FIT_RIDGE * torch.eye(gram.shape[1], dtype=torch.float64, device=gram.device)
    right = flat @ wanted.transpose(1, 2) / flat.shape[2]
    coefficients = torch.linalg.solve(gram.double() + ridge, right.double()).float()
    left = wanted - coefficients.transpose(1, 2) @ flat
    return coefficients[..., 0], left.reshape(len(flat), 1, *target.shape[-2:])


def _fits(x: Tensor, lq: Tensor, m: Tensor) -> list[Tensor]:
    """Seventeen maps, all but the first the same in every cell. Could x have become the LQ? The LQ as a filtered x: what is left,
    by cell and in all against the same from m, the likeness of its neighbours, and the filter. What is x made of? x as filtered m and
    filtered LQ: the two filters and what is left.
    """
    cells = [side // CELL_PX for side in x.shape[-2:]]
    x_bands, lq_bands, m_bands = _bands(x), _bands(lq), _bands(m)
    filters, left = _fitted(lq, x_bands)
    _, left_m = _fitted(lq, m_bands)
    energy, energy_m = _pooled(left.square()) + ENERGY_FLOOR, _pooled(left_m.square()) + ENERGY_FLOOR
    total, total_m = energy.mean((2, 3)), energy_m.mean((2, 3))
    near = (left[..., 1:] * left[..., :-1]).mean((2, 3)) + (left[..., 1:, :] * left[..., :-1, :]).mean((2, 3))
    made_of, rest = _fitted(x, torch.cat([m_bands, lq_bands], dim=1).expand(len(x), -1, -1, -1))
    rest_log = ((rest.square().mean((2, 3)) + ENERGY_FLOOR).log() + 8) / 3
    total_log, against_m = (total.log() + 8) / 3, 5 * (total.log() - total_m.log())
    whole = [total_log, against_m, near / total, filters.clamp(-4, 4), made_of.clamp(-4, 4), rest_log]
    return [3 * (energy.log() - energy_m.log()), torch.cat(whole, dim=1)[:, :, None, None].expand(-1, -1, *cells)]


def _errors(x: Tensor, lq: Tensor, m: Tensor, noise: Tensor) -> list[Tensor]:
    """Four maps: log mean squares over the three channels."""
    off, known = _pooled((x - m).square()).mean(1, keepdim=True), _pooled(noise)
    from_lq = _pooled((x - lq).square()).mean(1, keepdim=True)
    return [(z + ENERGY_FLOOR).log() for z in (off, off + known, from_lq, known.expand_as(off))]
