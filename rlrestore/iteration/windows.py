"""Which steps of a rollout are stochastic: a run of `window` steps inside `window_range`, the same for all of an iteration.

Its start is drawn an iteration (Flow-GRPO-Fast, arXiv 2505.05470), or slides from the noisy end on and back to it (MixGRPO, arXiv
2507.21802). A start s lasts, with every = `window_every` and N = `sampling.steps`,

    constant    every
    decay       int(every (1 - s/N)), at least 1
    exp_decay   ceil(every exp(-0.1 max(0, s - N/2)))

iterations. (The authors' exp_decay counts from step 13 of 25.) Pure functions of (config, seed, iteration).
"""

from __future__ import annotations

import math

from rlrestore.config.sections import SamplingConfig
from rlrestore.seeds import derive_seed

WINDOW_SCHEDULES = ("constant", "decay", "exp_decay")


def window_steps(config: SamplingConfig, seed: int, iteration: int) -> tuple[int, ...]:
    low, high = config.window_range
    starts = range(low, high - config.window + 1)
    if config.window_every:
        start = _sliding_start(config, starts, iteration)
    else:
        start = starts[derive_seed(seed, "window", iteration) % len(starts)]
    return tuple(range(start, start + config.window))


def thinned(times: tuple[float, ...], window: tuple[int, ...], tail: float) -> tuple[float, ...]:
    """The same times up to the end of the window, then `tail` of the steps that are left, evenly chosen: MixGRPO-Flash."""
    end = window[-1] + 1
    left = len(times) - 1 - end
    kept = math.ceil(tail * left)
    return times[: end + 1] + tuple(times[end + round(step * left / kept)] for step in range(1, kept + 1))


def _dwell(config: SamplingConfig, start: int) -> int:
    every, steps = config.window_every, config.steps
    return {
        "constant": every,
        "decay": max(1, int(every * (1 - start / steps))),
        "exp_decay": math.ceil(every * math.exp(-0.1 * max(0.0, start - steps / 2))),
    }[config.window_schedule]


def _sliding_start(config: SamplingConfig, starts: range, iteration: int) -> int:
    dwells = [_dwell(config, start) for start in starts]
    left = iteration % sum(dwells)
    for start, dwell in zip(starts, dwells, strict=True):
        if left < dwell:
            return start
        left -= dwell
    raise AssertionError("the remainder of a division by a sum is below it")
