"""Solvers of the deterministic steps: the probability-flow ODE between the stochastic steps of a chain, or all along it."""

from __future__ import annotations

import math

from torch import Tensor

from rlrestore.diffusion.kernels import ode_step

SOLVERS = ("euler", "dpmpp_2m")


class OdeSolver:
    """One run down the schedule. `dpmpp_2m` remembers one prediction, so steps come in order; `forget` after other steps."""

    def __init__(self, kind: str):
        if kind not in SOLVERS:
            raise ValueError(f"solver '{kind}' is unknown: choose one of {', '.join(SOLVERS)}")
        self.kind = kind
        self._past: tuple[Tensor, float] | None = None  # x_0 as predicted one step ago, and log-SNR / 2 there

    def step(self, x: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        """x at t_next < t, both `[N, ...]` float32.

        euler     x + (t_next - t) v, first order
        dpmpp_2m  DPM-Solver++(2M) for data prediction (arXiv 2211.01095, algorithm 2) in flow form, lam = log((1 - t) / t):
                  (t' / t) x - (1 - t') (e^-h - 1) (m + (m - m_past) h / (2 h_past)), h = lam' - lam. Second order. The first step,
                  the one after it if it came from pure noise, and the last, where lam is infinite, are Euler's.
        """
        if self.kind == "euler":
            return ode_step(x, v, t, t_next)
        predicted, past = x - t * v, self._past
        self._past = None if t >= 1 else (predicted, _half_log_snr(t))
        if past is None or self._past is None or t_next <= 0:
            return ode_step(x, v, t, t_next)
        here, ahead = _half_log_snr(t), _half_log_snr(t_next)
        towards = predicted + (predicted - past[0]) * ((ahead - here) / (2 * (here - past[1])))
        return (t_next / t) * x - (1 - t_next) * math.expm1(here - ahead) * towards

    def forget(self) -> None:
        self._past = None


def _half_log_snr(t: float) -> float:
    return math.log((1 - t) / t)
