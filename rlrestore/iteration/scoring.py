"""Scoring restorations with every term of a mix, each within its time limit.

A term that raises or runs past its limit gives invalid rows with the reason; it never stops its neighbours. Terms that wait
for another machine (`Reward.waits`) are asked first and waited for last, so that they cost no time of the others. A call that
hangs cannot be killed inside a process: its thread is left behind, the reward is built anew, and the process that holds
it should be replaced when `abandoned` grows (the Ray crew does that). A reward that cannot be built again (its server is
down) gives invalid rows until it can.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from envs.types import Restoration
from rewards.base import Reward, Scores
from rewards.rubric import TermConfig


@dataclass(frozen=True)
class _Call:
    result: concurrent.futures.Future[Scores]
    until: float  # time.monotonic


class Scorer:
    def __init__(self, terms: Mapping[str, TermConfig], build: Callable[[TermConfig], Reward], replaces: bool = False):
        """`replaces` a lost process: what cannot be built costs rows, not the run."""
        self.terms, self.build = dict(terms), build
        self.rewards: dict[str, Reward | None] = {
            name: self._built_again(name) if replaces else build(term) for name, term in self.terms.items()
        }
        self.abandoned = 0  # threads left behind

    def score(self, items: Sequence[Restoration], names: Sequence[str] | None = None) -> dict[str, Scores]:
        """Scores by term name, rows in the order of `items`; all terms, or those named."""
        wanted = list(self.terms if names is None else names)
        remote = {name for name in wanted if getattr(self.rewards[name], "waits", False)}
        calls = {name: self._start(name, items) for name in wanted if name in remote}
        here = {name: self._finish(name, self._start(name, items), items) for name in wanted if name not in remote}
        found = here | {name: self._finish(name, call, items) for name, call in calls.items()}
        return {name: found[name] for name in wanted}

    def _start(self, name: str, items: Sequence[Restoration]) -> _Call:
        result: concurrent.futures.Future[Scores] = concurrent.futures.Future()
        until = time.monotonic() + self.terms[name].timeout_s
        threading.Thread(target=self._run, args=(name, items, result), name=f"reward-{name}", daemon=True).start()
        return _Call(result, until)

    def _finish(self, name: str, call: _Call, items: Sequence[Restoration]) -> Scores:
        try:
            return call.result.result(timeout=max(0.0, call.until - time.monotonic()))
        except concurrent.futures.TimeoutError:
            self.abandoned += 1
            self.rewards[name] = self._built_again(name)
            return Scores.failed(len(items), f"infra: no score within timeout_s={self.terms[name].timeout_s:g}")
        except Exception as error:
            return Scores.failed(len(items), f"error: {type(error).__name__}: {error}"[:200])

    def _built_again(self, name: str) -> Reward | None:
        """None if that is not possible now; the next call tries again, within its limit."""
        try:
            return self.build(self.terms[name])
        except ValueError:
            return None

    def _run(self, name: str, items: Sequence[Restoration], result: concurrent.futures.Future[Scores]) -> None:
        try:
            reward = self.rewards[name]
            if reward is None:
                reward = self.rewards[name] = self.build(self.terms[name])
            scores = reward.score(items)
            if len(scores.reason_N) != len(items):
                raise ValueError(f"{len(scores.reason_N)} scores for {len(items)} images")
            result.set_result(scores)
        except Exception as error:
            result.set_exception(error)
