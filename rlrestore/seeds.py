"""Counter-based seeds: every draw is a function of (run seed, what it is for, counters), so a resume needs only a step.

Uses SplitMix64 over the counters; results are 63-bit, which both torch and numpy generators take.
"""

from __future__ import annotations

MASK = (1 << 64) - 1


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    state = seed & MASK
    for value in (*purpose.encode(), *counters):
        state = _mix((state + 0x9E3779B97F4A7C15 + (value & MASK)) & MASK)
    return state >> 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
