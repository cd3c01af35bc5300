"""Wall time of iterations by stage, and how much of it the bare networks would need (loop efficiency)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlrestore.crew import StageTimes
from rlrestore.types import ProbeReport, plan_updates


class Clock:
    """efficiency = bare seconds of an iteration's forwards and backwards / its wall time."""

    def __init__(self, times: StageTimes, seconds_before: float = 0.0):
        self.times, self.seconds_before = times, seconds_before
        self.started = time.perf_counter()
        self.stage_seconds: dict[str, float] = {}
        self.iterations_s = self.bare_s = self.bare_iteration_s = 0.0

    def start(self) -> None:
        self.times.seconds.clear()
        self.iteration_start = time.perf_counter()

    def stop(self, images: int) -> dict[str, float]:
        """Close an iteration that made `images` rollouts; what to log of it."""
        wall = time.perf_counter() - self.iteration_start
        self.iterations_s += wall
        self.bare_s += self.bare_iteration_s
        for stage, seconds in self.times.seconds.items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds
        return {
            **{f"time/{stage}_s": seconds for stage, seconds in self.times.seconds.items()},
            "time/iteration_s": wall,
            "throughput/images_per_s": images / wall,
            "throughput/loop_efficiency": self.bare_iteration_s / wall,
        }

    def efficiency(self) -> float:
        """Over all iterations of this process."""
        return self.bare_s / self.iterations_s if self.iterations_s else 0.0

    def total_s(self) -> float:
        """Since the start of the run, earlier processes included."""
        return self.seconds_before + time.perf_counter() - self.started


def bare_seconds(
    reports: Sequence[ProbeReport],
    groups: int,
    chunk_rows: list[int],
    samplers: int,
    ranks: int,
    micro_batch: int,
    points: int,
) -> float:
    """Seconds of one iteration's network arithmetic, spread evenly over samplers, then over ranks; slowest process."""
    encode_s = max(report.encode_task_s for report in reports) * groups / samplers
    sample_s = encode_s + max(report.sample_chunk_s for report in reports) * len(chunk_rows) / samplers
    micro_batches = sum(len(update) for update in plan_updates(chunk_rows, micro_batch, 1))
    return sample_s + max(report.train_micro_s for report in reports) * micro_batches * points / ranks
