"""Counter-based random generators: the same (seed, counters) give the same numbers on every machine and after every
resume.

Nothing here keeps state, so a sampler that is a pure function of (seed, step, position) resumes from the step alone.
"""

from __future__ import annotations

import numpy as np

_WORD = 2**64


def generator_for(seed: int, *counters: int) -> np.random.Generator:
    """A Philox 4x64 generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") for one place in a
    run.

    seed: the run's seed; counters: up to three non-negative numbers, e.g. (step, position). Distinct arguments give
    disjoint streams: the counters fill the upper three words of the 256-bit Philox counter, draws advance the lowest
    one.
    """
    if len(counters) > 3:
        raise ValueError(f"generator_for takes at most 3 counters, got {len(counters)}: combine them into fewer")
    if not all(0 <= value < _WORD for value in (seed, *counters)):
        raise ValueError(f"seed and counters must be in [0, 2^64), got {(seed, *counters)}")
    words = np.array([0, *counters, *(0,) * (3 - len(counters))], dtype=np.uint64)
    key = np.array([seed, len(counters)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=words, key=key))
