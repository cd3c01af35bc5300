"""Blur kernels of Real-ESRGAN (Wang et al. 2021, section 3) and their convolution.

Kernels are [k, k] float32, k odd, non-negative or (sinc) signed, and sum to 1, so a constant image stays as it is.
Formulas as in BasicSR `basicsr/data/degradations.py`: q = [u v] Sigma^-1 [u v]^T, Sigma = R(theta) diag(sx^2, sy^2)
R(theta)^T.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def _quadratic_form(size: int, sigma_x: float, sigma_y: float, theta: float) -> Tensor:
    """q on the pixel grid, [size, size]; axis u runs along columns."""
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(theta), math.sin(theta)
    along, across = u * cos + v * sin, v * cos - u * sin
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, beta: float = 1.0) -> Tensor:
    """Generalised Gaussian exp(-q^beta / 2), sum 1; beta = 1 is the Gaussian, sigma_x = sigma_y the isotropic one."""
    kernel = torch.exp(-0.5 * _quadratic_form(size, sigma_x, sigma_y, theta) ** beta)
    return kernel / kernel.sum()


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Tensor:
    """Plateau-shaped kernel 1 / (1 + q^beta), sum 1."""
    kernel = 1.0 / (1.0 + _quadratic_form(size, sigma_x, sigma_y, theta) ** beta)
    return kernel / kernel.sum()


def sinc_kernel(size: int, omega: float) -> Tensor:
    """Circular low-pass filter with cutoff `omega` in (0, pi] rad/px: w J1(w rho) / (2 pi rho), centre w^2 / (4 pi),
    sum 1.
    """
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    rho = torch.hypot(axis[:, None], axis[None, :])
    rho[size // 2, size // 2] = 1.0  # any positive value: the centre is replaced by its limit below
    kernel = omega * torch.special.bessel_j1(omega * rho) / (2 * math.pi * rho)
    kernel[size // 2, size // 2] = omega**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve [3, H, W] with one [k, k] kernel, borders reflected; the result has the same size and may leave [0, 1]
    (sinc).

    By FFT: on one thread its 0.6 ms for 3x128x128 does not grow with k, where a direct 21x21 convolution takes 3 to 7
    ms. Borders are replicated instead where the image is too small to reflect k // 2 pixels.
    """
    height, width = image.shape[-2:]
    pad = kernel.shape[-1] // 2
    mode = "reflect" if pad < min(height, width) else "replicate"
    padded = F.pad(image[None], (pad, pad, pad, pad), mode=mode)[0]
    size = (_fast_length(height + 2 * pad), _fast_length(width + 2 * pad))
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel, s=size)
    full = torch.fft.irfft2(spectrum, s=size)
    return full[:, 2 * pad : 2 * pad + height, 2 * pad : 2 * pad + width].contiguous()


@lru_cache(maxsize=4096)
def _fast_length(n: int) -> int:
    """The smallest 2^a 3^b 5^c >= n that 16 divides (any for n < 16): the FFT is fastest on these (144: 0.6 of the
    time of 150).
    """
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and (n % 16 == 0 or n < 16):
            return n
        n += 1
