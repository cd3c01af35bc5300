"""Scoring restorations with every term of a mix, each within its time limit.

A term that raises or runs past its limit gives invalid rows with the reason; it never stops its neighbours. A call that
hangs cannot be killed inside a process: its thread is left behind, the reward is built anew, and the process that holds
it should be replaced when `abandoned` grows (the Ray crew does that).
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Mapping, Sequence

from envs.types import Restoration
from rewards.base import Reward, Scores
from rewards.rubric import TermConfig


class Scorer:
    def __init__(self, terms: Mapping[str, TermConfig], build: Callable[[TermConfig], Reward]):
        self.terms, self.build = dict(terms), build
        self.rewards = {name: build(term) for name, term in self.terms.items()}
        self.abandoned = 0  # threads left behind

    def score(self, items: Sequence[Restoration], names: Sequence[str] | None = None) -> dict[str, Scores]:
        """Scores by term name, rows in the order of `items`; all terms, or those named."""
        return {name: self._score_term(name, items) for name in (self.terms if names is None else names)}

    def _score_term(self, name: str, items: Sequence[Restoration]) -> Scores:
        limit_s = self.terms[name].timeout_s
        result: concurrent.futures.Future[Scores] = concurrent.futures.Future()
        thread = threading.Thread(
            target=_run, args=(self.rewards[name], items, result), name=f"reward-{name}", daemon=True
        )
        thread.start()
        try:
            return result.result(timeout=limit_s)
        except concurrent.futures.TimeoutError:
            self.abandoned += 1
            self.rewards[name] = self.build(self.terms[name])
            return Scores.failed(len(items), f"infra: no score within timeout_s={limit_s:g}")
        except Exception as error:
            return Scores.failed(len(items), f"error: {type(error).__name__}: {error}"[:200])


def _run(reward: Reward, items: Sequence[Restoration], result: concurrent.futures.Future[Scores]) -> None:
    try:
        scores = reward.score(items)
        if len(scores.reason_N) != len(items):
            raise ValueError(f"{len(scores.reason_N)} scores for {len(items)} images")
        result.set_result(scores)
    except Exception as error:
        result.set_exception(error)
