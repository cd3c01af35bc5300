"""Every change of coordinates between foreign models and ours, in one place: VP states, predictions, token layouts.

Ours: z_t = (1 - t) z_0 + t eps, v = eps - z_0. A variance-preserving (DDPM) model speaks y = alpha x0 + sigma eps with
alpha^2 + sigma^2 = 1; with r = sqrt((1-t)^2 + t^2) the two are one state in two units:

    t = sigma / (alpha + sigma),   z_t = y / (alpha + sigma) = r y,   alpha = (1 - t) / r,   sigma = t / r

so that an Euler step of ours is a DDIM step (eta 0, arXiv 2010.02502) of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction")  # diffusers' names


class VariancePreserving:
    """A discrete VP schedule in flow coordinates. `alphas_cumprod` [T] falls; index T - 1 is the noisiest step."""

    def __init__(self, alphas_cumprod: Tensor, prediction: str):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction_type '{prediction}' is unknown: choose one of {', '.join(PREDICTIONS)}")
        self.prediction = prediction
        alphas = alphas_cumprod.to(torch.float64)
        sigma, alpha = (1 - alphas).sqrt(), alphas.sqrt()
        self.t_of_index = sigma / (alpha + sigma)  # [T] float64, rising

    @property
    def t_max(self) -> float:
        """The noisiest time that the model knows: below 1 unless its schedule has zero terminal SNR."""
        return float(self.t_of_index[-1].float())

    def index(self, t_B: Tensor) -> Tensor:
        """[B] float32 timesteps for times [B], interpolated between table entries; below the first one it is 0.

        A float32 time near the noisy end is known to about 1e-3 of an index: what is that close to a whole one is meant
        to be it, and the UNet was trained on whole ones.
        """
        table = self.t_of_index.to(t_B.device)
        t = t_B.to(torch.float64).clamp(table[0], table[-1])
        upper = torch.searchsorted(table, t).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        index = upper - 1 + (t - low) / (high - low)
        return torch.where((index - index.round()).abs() < 0.01, index.round(), index).float()

    def trailing_times(self, steps: int) -> list[float]:
        """The times of diffusers' `timestep_spacing="trailing"`, and 0 at the end."""
        count = len(self.t_of_index)
        indices = (torch.arange(count, 0, -count / steps, dtype=torch.float64).round() - 1).long()
        return [*self.t_of_index[indices[:steps]].float().tolist(), 0.0]

    @staticmethod
    def state(z_t: Tensor, t_B: Tensor) -> Tensor:
        """y of z_t."""
        return z_t / _radius(z_t, t_B)

    @staticmethod
    def from_state(y: Tensor, t_B: Tensor) -> Tensor:
        """z_t of y."""
        return y * _radius(y, t_B)

    def velocity(self, prediction: Tensor, z_t: Tensor, t_B: Tensor) -> Tensor:
        """v = eps - x0 of a prediction at z_t. An error in epsilon is multiplied by 1 / alpha r = 1 / (1 - t)."""
        t, radius = _column(z_t, t_B), _radius(z_t, t_B)
        alpha, sigma, y = (1 - t) / radius, t / radius, z_t / radius
        if self.prediction == "epsilon":
            return prediction - (y - sigma * prediction) / alpha
        if self.prediction == "v_prediction":
            return (sigma * y + alpha * prediction) - (alpha * y - sigma * prediction)
        return (y - alpha * prediction) / sigma - prediction


def pack(z: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, h/2 w/2, 4c] tokens of 2 x 2 cells: the order of FLUX, Qwen-Image and (patchified) FLUX.2."""
    batch, channels, height, width = z.shape
    cells = z.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for a latent of `height` x `width` cells."""
    batch, _, channels = tokens.shape
    cells = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, channels // 4, height, width)


def _column(like: Tensor, t_B: Tensor) -> Tensor:
    return t_B.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _radius(like: Tensor, t_B: Tensor) -> Tensor:
    t = _column(like, t_B)
    return ((1 - t).square() + t.square()).sqrt()
