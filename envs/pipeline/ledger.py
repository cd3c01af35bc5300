"""The account of paid calls: each request is paid for once, and a budget stops the run before it is passed.

Before a call an `intent` is on disk, after it a `result` with its cost; an answer that is there is never asked for again.
A process that was killed in between leaves an intent without a result: that request is sent again, with the same
Idempotency-Key, by which a server that knows it can tell that it was paid. What was lost MAX_LOST times is given up.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from envs.pipeline.config import ApiSection, BudgetSection
from envs.pipeline.http import Refused, Rejected
from envs.pipeline.store import Blobs, Journal

# A kill takes all requests with it that are under way, and the next one may find the same again: after a few losses of chance the
# data set must be the same. So many in a row are no chance: this request kills the process, and each time costs.
MAX_LOST = 8


class BudgetError(RuntimeError):
    """The next call would pass the budget. Everything so far is kept; the same command continues with a larger one."""


@dataclass(frozen=True)
class Answer:
    """What a call gave."""

    payload: bytes
    tokens_in: int = 0
    tokens_out: int = 0
    request_id: str = ""
    model: str = ""


class Ledger:
    """Memory and purse of a build; safe in several threads."""

    def __init__(self, journal: Journal, blobs: Blobs, budget: BudgetSection) -> None:
        self._journal, self._blobs, self._budget = journal, blobs, budget
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._final: dict[str, dict] = {}
        self._lost: dict[str, int] = defaultdict(int)
        self._started_s, self._reserved = time.monotonic(), 0.0
        self.cost, self.requests, self.tokens_in, self.tokens_out = 0.0, 0, 0, 0
        for record in journal.records:
            self._note(record)

    def call(self, key: str, what: str, prices: ApiSection, send: Callable[[str], Answer]) -> bytes:
        """The payload of this request, from the journal if it was answered before.

        key: digest of the whole request. what: for people. send: does it, given the key. Raises BudgetError, and what
        `send` raises (Refused and Rejected for ever, Unanswered until a later run).
        """
        with self._lock:
            lock = self._locks[key]
        with lock:
            known = self._final.get(key)
            if known is not None:
                return self._known(known)
            if self._lost[key] >= MAX_LOST:
                raise Rejected(f"this request was sent {MAX_LOST} times and lost with the process each time")
            estimate = self._reserve(prices)
            try:
                self._record({"key": key, "event": "intent", "what": what, "model": prices.model})
                start = time.monotonic()
                try:
                    answer = send(key)
                except (Refused, Rejected) as error:
                    self._record({"key": key, "event": type(error).__name__.lower(), "reason": str(error)})
                    raise
                except Exception as error:
                    self._record({"key": key, "event": "failed", "reason": f"{type(error).__name__}: {error}"})
                    raise
                cost = (
                    prices.price_request
                    + (answer.tokens_in * prices.price_in + answer.tokens_out * prices.price_out) / 1e6
                )
                self._record({
                    "key": key, "event": "result", "blob": self._blobs.put(answer.payload), "cost": cost,
                    "tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out, "request_id": answer.request_id,
                    "model": answer.model or prices.model, "seconds": round(time.monotonic() - start, 3),
                })  # fmt: skip
            finally:
                with self._lock:
                    self._reserved -= estimate
            return answer.payload

    def _known(self, record: dict) -> bytes:
        if record["event"] == "result":
            return self._blobs.get(record["blob"])
        raise {"refused": Refused, "rejected": Rejected}[record["event"]](record["reason"])

    def _reserve(self, prices: ApiSection) -> float:
        """BudgetError if this call could pass a limit, counting those that are under way."""
        with self._lock:
            mean = self.cost / self.requests if self.requests else 0.0
            estimate = max(prices.price_request, mean if prices.price_in or prices.price_out else 0.0)
            budget, seconds = self._budget, time.monotonic() - self._started_s
            for name, spent, limit in (
                ("cost", self.cost + self._reserved + estimate, budget.cost),
                ("requests", self.requests + 1, budget.requests),
                ("seconds", seconds, budget.seconds),
            ):
                if limit is not None and spent > limit:
                    raise BudgetError(
                        f"budget.{name}={limit:g} is used up ({self.requests} requests, cost {self.cost:.4g}): raise it and "
                        "run the same command to go on"
                    )
            self._reserved += estimate
            self.requests += 1
            return estimate

    def _record(self, record: dict) -> None:
        self._journal.append(record)
        with self._lock:
            self._note(record, live=True)

    def _note(self, record: dict, live: bool = False) -> None:
        key, event = record["key"], record["event"]
        if event == "intent":
            self._lost[key] += 1
            self.requests += 0 if live else 1
        elif event == "failed":
            self._lost[key] = 0
        else:
            self._final[key] = record
            self.cost += record.get("cost", 0.0)
            self.tokens_in += record.get("tokens_in", 0)
            self.tokens_out += record.get("tokens_out", 0)
