"""POST to an HTTP API: rate limit, time-out, back-off, and errors that say what to do with the request.

A key is read from the environment when a request is sent; it is in no message, record or file.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import requests

MAX_BODY = 2**28  # bytes of an answer
LONGEST_WAIT_S = 60.0
OPENAI_KEY, GEMINI_KEY = "Authorization", "x-goog-api-key"  # the header that carries the key
REFUSAL_CODES = ("content_policy_violation", "moderation_blocked", "content_filter", "safety")


class Refused(Exception):
    """The model will not do it. Kept as data, never asked again."""


class Unanswered(Exception):
    """No usable answer after all retries; the same request may be tried in a later run."""


class Rejected(Exception):
    """The server says that this request is wrong (4xx)."""


class WrongKeyError(RuntimeError):
    """The server does not accept the key: nothing else will work either."""


class RateLimit:
    """At most so many requests a minute over all threads, evenly spaced; a 429 holds everybody back."""

    def __init__(self, per_minute: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._gap_s, self._next_s = 60.0 / per_minute, 0.0
        self._lock, self._sleep = threading.Lock(), sleep

    def wait(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next_s)
            self._next_s = start + self._gap_s
        self._sleep(max(0.0, start - time.monotonic()))

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next_s = max(self._next_s, time.monotonic() + seconds)


class Api:
    """One server. `post` may be called from several threads."""

    def __init__(
        self, url: str, api_key_env: str, per_minute: float, timeout_s: float, retries: int,
        sleep: Callable[[float], None] = time.sleep, key_header: str = OPENAI_KEY,
    ) -> None:  # fmt: skip
        self.url, self._key_env, self._key_header = url.rstrip("/"), api_key_env, key_header
        self._timeout_s, self._retries = timeout_s, retries
        self._limit, self._sleep = RateLimit(per_minute, sleep), sleep

    def post(self, path: str, idempotency_key: str, **body: Any) -> dict[str, Any]:
        """The answer's JSON object. `body` is what `requests.post` takes (json, or data and files).

        Refused, Rejected, WrongKeyError: final. Unanswered: after `retries` more tries of 429, 5xx and time-outs.
        """
        reason = ""
        for attempt in range(self._retries + 1):
            self._limit.wait()
            wait_s = min(LONGEST_WAIT_S, 0.5 * 2**attempt)
            try:
                with requests.post(
                    f"{self.url}/{path}", headers=self._headers(idempotency_key), timeout=self._timeout_s,
                    allow_redirects=False, stream=True, **body,
                ) as response:  # fmt: skip
                    content = self._redacted(response.raw.read(MAX_BODY + 1, decode_content=True))
            except (requests.RequestException, OSError) as error:
                reason = f"{type(error).__name__} after at most {self._timeout_s:g} s"
            else:
                if response.status_code == 200:
                    return _object(content)
                reason = self._failure(response.status_code, content)
                if response.status_code == 429:
                    wait_s = min(LONGEST_WAIT_S, _retry_after(response.headers.get("Retry-After"), content, wait_s))
                    self._limit.hold(wait_s)
            if attempt < self._retries:
                self._sleep(wait_s)
        raise Unanswered(f"{self.url}/{path}: {reason}, tried {self._retries + 1} times")

    def _headers(self, idempotency_key: str) -> dict[str, str]:
        headers = {"Idempotency-Key": idempotency_key}
        if self._key_env:
            key = os.environ.get(self._key_env)
            if not key:
                raise WrongKeyError(f"environment variable {self._key_env} is not set: export it and run again")
            headers[self._key_header] = f"Bearer {key}" if self._key_header == OPENAI_KEY else key
        return headers

    def _failure(self, status: int, content: bytes) -> str:
        """The reason for a retry; what is final is raised."""
        text = content[:300].decode("utf-8", "replace")
        if status in (401, 403) or (status == 400 and b"API_KEY_INVALID" in content):  # the latter is Gemini's
            raise WrongKeyError(f"{self.url} answers {status}: the key in ${self._key_env or '(none)'} is not accepted")
        if any(code in text for code in REFUSAL_CODES):
            raise Refused(text)
        if 400 <= status < 500 and status not in (408, 409, 425, 429):
            raise Rejected(f"{self.url} answers {status}: {text}")
        return f"status {status}"

    def _redacted(self, content: bytes) -> bytes:
        """What a server says without the key, which some echo: answers are kept and shown."""
        key = os.environ.get(self._key_env or "", "").encode()
        return content.replace(key, b"[key]") if key else content


def _object(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_BODY:
        raise Rejected(f"the answer has more than {MAX_BODY:,} bytes")
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):  # it may have been charged: not asked again
        raise Rejected("the answer is no JSON object")
    return answer


def _retry_after(header: str | None, content: bytes, default: float) -> float:
    """Seconds to wait by the header, or by the `retryDelay: "7s"` that Gemini puts into the body."""
    told = re.search(rb'"retryDelay":\s*"([0-9.]+)s"', content)
    try:
        return max(0.0, float(header or (told[1] if told else b"")))
    except ValueError:
        return default
