"""Learning-rate factors as pure functions of the optimiser step, so that resuming needs only the step."""

from __future__ import annotations

import math


def warmup_factor(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def wsd_factor(step: int, *, steps: int, warmup: int, decay: int) -> float:
    """Warm-up, stable, linear decay to 0 at `steps` (MiniCPM, arXiv 2404.06395)."""
    return warmup_factor(step, warmup) * min(1.0, max(0, steps - step) / decay if decay else 1.0)


def cosine_factor(step: int, *, steps: int, warmup: int) -> float:
    return warmup_factor(step, warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
