"""Where the stochastic steps lie: schedules by hand."""

from __future__ import annotations

import pytest

from rlrestore.config.sections import SamplingConfig
from rlrestore.iteration.windows import thinned, window_steps


def starts(count: int, **keys: object) -> list[int]:
    config = SamplingConfig(**keys)  # type: ignore[arg-type]
    return [window_steps(config, 0, iteration)[0] for iteration in range(count)]


def test_a_fixed_and_a_drawn_window() -> None:
    assert set(starts(20, window=3, window_range=(1, 4))) == {1}
    drawn = starts(60, window=2, window_range=(0, 4))
    assert set(drawn) == {0, 1, 2} and len(set(drawn[:5])) > 1
    assert window_steps(SamplingConfig(window=2), 7, 5) == window_steps(SamplingConfig(window=2), 7, 5)


def test_it_slides_and_rolls_back() -> None:
    assert starts(8, window=2, window_range=(0, 4), window_every=2) == [0, 0, 1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize(
    # 8 steps, 4 iterations. decay: 4 (1 - s/8) = 4 3.5 3 2.5, whole parts; exp_decay: 4 exp(-.1 max(0, s - 4)), rounded up
    ("schedule", "dwells"),
    [("decay", [4, 3, 3, 2]), ("exp_decay", [4, 4, 4, 4])],
)
def test_later_starts_last_shorter(schedule: str, dwells: list[int]) -> None:
    expected = [start for start, dwell in enumerate(dwells) for _ in range(dwell)]
    given = {"window": 1, "window_range": (0, 4), "window_every": 4, "window_schedule": schedule}
    assert starts(2 * len(expected), **given) == expected * 2


def test_exp_decay_past_the_middle() -> None:
    """20 steps, start 15, 10 iterations: ceil(10 exp(-.5)) = ceil(6.07) = 7; start 16: ceil(10 exp(-.6)) = ceil(5.49) = 6."""
    found = starts(26, steps=20, window=1, window_range=(15, 17), window_every=10, window_schedule="exp_decay")
    assert found == [15] * 7 + [16] * 6 + [15] * 7 + [16] * 6


def test_a_compressed_tail() -> None:
    times = tuple(1 - step / 10 for step in range(11))
    # window [2, 3]: 6 steps are left after it, 0.4 of them are ceil(2.4) = 3, every second one
    assert thinned(times, (2, 3), 0.4) == (*times[:5], times[6], times[8], times[10])
    assert thinned(times, (2, 3), 1.0) == times
    assert thinned(times, (8,), 0.1) == times  # one step is left and one is taken
