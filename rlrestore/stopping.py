"""When a run ends before its last step, in order: asked by a signal, or at its own wall-clock limit. It saves first.

Until the first iteration a signal ends the run at once, since there is nothing to save. From then on it waits for the end of the
iteration: all processes are between two stages there, and the checkpoint is the one that an unhurried run would have written.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rlrestore.config.files import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what batch systems send before they kill
MARGIN = (
    2.0  # iterations (with their evaluation and checkpoint) that must fit into what is left: one runs, one is slack
)


class StopRequested(Exception):
    """The run was asked to end and did; the same command continues it."""


class Stop:
    """Whether to end after this iteration. `max_hours` counts from here, the start of the process; 0 is no limit."""

    def __init__(self, max_hours: float = 0.0, now: Callable[[], float] = time.monotonic):
        self.max_hours, self.now = max_hours, now
        self.started = self.lap_started = now()
        self.longest_s = 0.0  # iteration, from end to end
        self.signal: str | None = None
        self.holding = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive signals; in a thread, where Python cannot, only the limit counts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hold(self, iteration_s: float) -> None:
        """The first iteration begins, whose networks alone need `iteration_s`. ConfigError if the limit ends before it does."""
        if self.max_hours and self.left_s() < iteration_s:
            raise ConfigError(
                f"run.max_hours={self.max_hours:g} ({self.max_hours * 3600:.0f} s) is too short: the start took "
                f"{self.now() - self.started:.0f} s and one iteration needs at least {iteration_s:.3g} s more, so no run would ever "
                "get further. Raise it, or 0 for no limit"
            )
        self.holding = True
        self.lap_started = self.now()

    def due(self) -> str | None:
        """Asked once an iteration, at its end: why to stop here, or None."""
        now = self.now()
        self.longest_s = max(self.longest_s, now - self.lap_started)
        self.lap_started = now
        if self.signal:
            return self.signal
        if self.max_hours and self.left_s() < MARGIN * self.longest_s:
            return f"run.max_hours={self.max_hours:g}"
        return None

    def left_s(self) -> float:
        return self.max_hours * 3600 - (self.now() - self.started)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self.holding:
            raise StopRequested(f"{self.signal} before the first iteration with nothing to save")
