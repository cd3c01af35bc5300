"""Time grids in flow coordinates: t = sigma in [0, 1], 1 is noise, 0 is the clean image.

The shift k multiplies the odds of noise, t/(1-t) = k u/(1-u), and is the static shift of SD3-type schedulers.
The list returned here is the one that is sampled, replayed and exported: never recompute a time from an index.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(u: Tensor, shift: float) -> Tensor:
    """t = k u / (1 + (k-1) u), elementwise, in the dtype of `u`; 0 and 1 are fixed points."""
    _check_shift(shift)
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """u = t / (k - (k-1) t), the inverse of `shift_time`."""
    _check_shift(shift)
    return t / (shift - (shift - 1) * t)


def time_schedule(steps: int, shift: float = 1.0, t_max: float = 1.0) -> Tensor:
    """[steps+1] float32 times from exactly `t_max` down to exactly 0, uniform in u before the shift.

    `t_max` is a time after the shift (0.936 for SD-style variance-preserving models, which never reach pure noise).
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got steps={steps}")
    if not 0 < t_max <= 1:
        raise ValueError(f"t_max must lie in (0, 1], got {t_max}; 1 is pure noise")
    u_max = float(unshift_time(torch.tensor(t_max, dtype=torch.float64), shift))
    fraction = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    t = shift_time(u_max * fraction, shift)
    t[0] = t_max  # the round trip through u may be off by one bit, and t == t_max is compared by callers
    return t.to(torch.float32)


def _check_shift(shift: float) -> None:
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}; 1 is no shift, SD3-type models use 3")
