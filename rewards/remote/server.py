"""Rewards as an HTTP service: FastAPI, JSON with PNG (wire.py), a bearer token on everything but `/health`.

    GET  /health       200 {"status": "ok"}; 503 while one call has been running for longer than `call_s`
    GET  /v1/spec      {"rewards": {name: what it declares}}
    POST /v1/score     see wire.py; 413 a body or a batch too large, 422 not of the form, 429 too many waiting
    GET  /metrics      Prometheus' text format

A picture that is broken, too large or of another size than its LQ costs its row (invalid, with the reason), never the
request, and never scores 0. Calls of one reward run one at a time: metric objects are not thread-safe.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.types import Restoration
from rewards.base import Reward, Scores
from rewards.remote.wire import decode_item, encode_rows, request_items

LOOPBACK = ("127.0.0.1", "localhost", "::1")
INSTALL = "pip install 'rlrestore[serve]'"


@dataclass(frozen=True)
class ServeLimits:
    """What one request may ask for; a training run's client keeps well below."""

    max_items: int = 64
    max_pixels: int = 2048 * 2048  # of one picture
    max_body_mb: int = 256
    max_waiting: int = 16  # requests that are scored or wait for it; more are answered 429
    call_s: float = 120.0  # a call that waits longer for its turn is answered 503


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Counts:
    """What `/metrics` shows."""

    answers: Counter[int] = field(default_factory=Counter)  # by HTTP status
    rows: Counter[tuple[str, bool]] = field(default_factory=Counter)  # by reward and validity
    seconds: dict[str, float] = field(default_factory=dict)  # spent scoring, by reward
    lock: threading.Lock = field(default_factory=threading.Lock)

    def text(self, waiting: int) -> str:
        with self.lock:
            lines = [f'rlrestore_judge_answers_total{{status="{s}"}} {n}' for s, n in sorted(self.answers.items())]
            lines += [
                f'rlrestore_judge_rows_total{{reward="{name}",valid="{str(valid).lower()}"}} {n}'
                for (name, valid), n in sorted(self.rows.items())
            ]
            lines += [
                f'rlrestore_judge_score_seconds_total{{reward="{name}"}} {s:.6f}'
                for name, s in sorted(self.seconds.items())
            ]
        return "\n".join([*lines, f"rlrestore_judge_waiting {waiting}", ""])


class Service:
    """The rewards behind the server; no HTTP in here."""

    def __init__(self, rewards: Mapping[str, Reward], limits: ServeLimits) -> None:
        self.rewards, self.limits, self.counts = dict(rewards), limits, Counts()
        self.locks = {name: threading.Lock() for name in rewards}
        self.room = threading.BoundedSemaphore(limits.max_waiting)
        self.waiting = 0
        self.since: dict[str, float] = {}  # reward -> when the running call began

    def stuck(self) -> list[str]:
        """Rewards whose call has been running for longer than `call_s`."""
        now = time.monotonic()
        return [name for name, start in list(self.since.items()) if now - start > self.limits.call_s]

    def specs(self) -> dict[str, Any]:
        return {
            name: {
                "version": r.spec.version, "higher_is_better": r.spec.higher_is_better, "range": list(r.spec.range),
                "needs": sorted(r.spec.needs), "block": r.spec.block, "scale": r.spec.scale, "licence": r.spec.licence,
            }
            for name, r in self.rewards.items()
        }  # fmt: skip

    def answer(self, text: bytes) -> dict[str, Any]:
        """The answer to the body of a request; Refusal if it cannot be used."""
        try:
            name, rows = request_items(json.loads(text), self.limits.max_items)
        except (ValueError, RecursionError) as error:
            raise Refusal(422, str(error)[:300]) from error
        if name not in self.rewards:
            raise Refusal(404, f"there is no reward {name[:60]!r}; there are {', '.join(self.rewards)}")
        reward = self.rewards[name]
        keys, scores = [row["id"] for row in rows], self._score(name, reward, rows)
        with self.counts.lock:
            self.counts.rows.update((name, valid) for valid in scores.valid_N.tolist())
        return {"reward": name, "version": reward.spec.version, "rows": encode_rows(keys, scores)}

    def _score(self, name: str, reward: Reward, rows: Sequence[Mapping[str, Any]]) -> Scores:
        parts: list[Scores | None] = [None] * len(rows)
        items: list[Restoration] = []
        places: list[int] = []
        for i, row in enumerate(rows):
            try:
                items.append(decode_item(row, self.limits.max_pixels))
                places.append(i)
            except ValueError as error:
                parts[i] = Scores.failed(1, f"data: {error}")
        scored = self._in_turn(name, reward, items) if items else Scores.failed(0, "")
        for k, i in enumerate(places):
            parts[i] = Scores(scored.value_N[k : k + 1], scored.valid_N[k : k + 1], (scored.reason_N[k],))
        return Scores.cat([part for part in parts if part is not None])

    def _in_turn(self, name: str, reward: Reward, items: Sequence[Restoration]) -> Scores:
        if not self.locks[name].acquire(timeout=self.limits.call_s):
            raise Refusal(503, f"{name} is busy for longer than {self.limits.call_s:g} s")
        try:
            self.since[name] = start = time.monotonic()
            return reward.score(items)
        finally:
            self.since.pop(name, None)
            with self.counts.lock:
                self.counts.seconds[name] = self.counts.seconds.get(name, 0.0) + time.monotonic() - start
            self.locks[name].release()


def make_app(service: Service, token: str, hosts: Sequence[str] = LOOPBACK) -> Any:
    """The FastAPI application. ValueError if FastAPI is not installed."""
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.concurrency import run_in_threadpool
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}, which is not installed: {INSTALL}") from error
    if not token:
        raise ValueError("the server needs a token")
    app = FastAPI(title="rlrestore judge", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    wanted, max_body = f"Bearer {token}".encode(), service.limits.max_body_mb * 2**20

    def reply(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Response:
        with service.counts.lock:
            service.counts.answers[status] += 1
        text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
        kind = "text/plain; version=0.0.4" if isinstance(content, str) else "application/json"
        return Response(text, status, dict(headers or {}), media_type=kind)

    def refused(request: Request) -> Response | None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        return None if hmac.compare_digest(given, wanted) else reply(401, {"error": "wrong or missing bearer token"})

    @app.get("/health")
    async def health() -> Response:
        stuck = service.stuck()
        return reply(503, {"status": "stuck", "rewards": stuck}) if stuck else reply(200, {"status": "ok"})

    async def spec(request: Request) -> Response:
        return refused(request) or reply(200, {"rewards": service.specs()})

    async def metrics(request: Request) -> Response:
        return refused(request) or reply(200, service.counts.text(service.waiting))

    async def score(request: Request) -> Response:
        if (answer := refused(request)) is not None:
            return answer
        if not service.room.acquire(blocking=False):
            return reply(429, {"error": "too many requests are waiting"}, {"Retry-After": "1"})
        service.waiting += 1
        try:
            body = await read_body(request, max_body)
            return reply(200, await run_in_threadpool(service.answer, body))
        except Refusal as error:
            return reply(error.status, {"error": str(error)})
        except Exception as error:  # a bug in a reward: the client masks its rows, the log here says where
            logging.getLogger(__name__).exception("a reward failed")
            return reply(500, {"error": f"{type(error).__name__} in the reward"})
        finally:
            service.waiting -= 1
            service.room.release()

    for path, handler, method in (
        ("/v1/spec", spec, "GET"),
        ("/metrics", metrics, "GET"),
        ("/v1/score", score, "POST"),
    ):
        # `Request` is known to this function alone, and FastAPI reads annotations as text: plain routes do not look
        app.router.add_route(path, handler, methods=[method])
    return app


async def read_body(request: Any, max_bytes: int) -> bytes:
    """The whole body; Refusal(413) as soon as it is larger, whatever its header says."""
    said = request.headers.get("content-length", "0")
    if said.isdigit() and int(said) > max_bytes:
        raise Refusal(413, f"a body of {said} bytes, at most {max_bytes}")
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > max_bytes:
            raise Refusal(413, f"a body of more than {max_bytes} bytes")
    return bytes(content)


def serve(service: Service, host: str, port: int, token: str, hosts: Sequence[str]) -> None:
    """Serve until interrupted. ValueError if uvicorn or FastAPI is not installed."""
    app = make_app(service, token, hosts)
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(f"serving needs uvicorn, which is not installed: {INSTALL}") from error
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_keep_alive=30)
