"""Asking a server over HTTP within a deadline: back-off, and failures that say whose fault they are.

A key is read from the environment when a request is sent; it is in no message and no record.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import requests
from requests.auth import AuthBase

MAX_ANSWER = 2**26  # bytes
LONGEST_WAIT_S = 8.0  # between two tries, unless the server asks for more
TEXT_SHOWN = 200


class AskError(RuntimeError):
    """No usable answer; the text begins with `infra:` (nobody's row is to blame)."""


@dataclass(frozen=True)
class Patience:
    connect_s: float = 5.0  # until the connection stands
    read_s: float = 60.0  # until one answer is complete
    attempts: int = 4  # of one request, the first included
    backoff_s: float = 0.5  # before the second try, doubled with each

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.connect_s, self.read_s) <= 0 or self.backoff_s < 0:
            raise ValueError(f"attempts >= 1, connect_s > 0, read_s > 0 and backoff_s >= 0 are wanted, got {self}")


class _Bearer(AuthBase):
    """Set as `auth`, so that no ~/.netrc replaces it."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, request: Any) -> Any:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class Asker:
    """One server. `ask` may be called from several threads.

    After a request that failed in all its tries, the next ones try once only, until one succeeds: a server that is down
    costs one deadline, not one a batch.
    """

    def __init__(self, url: str, key_env: str, patience: Patience, sleep: Callable[[float], None] = time.sleep) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url {url!r} must begin with http:// or https://")
        self.url, self.key_env, self.patience, self.sleep = url.rstrip("/"), key_env, patience, sleep
        self.down = False

    def ask(self, path: str, body: Mapping[str, Any] | None, until: float) -> dict[str, Any]:
        """The answer's JSON object; GET if `body` is None. AskError past `until` (time.monotonic) or after all tries."""
        attempts = 1 if self.down else self.patience.attempts
        reason = "no time was left to ask"
        for attempt in range(attempts):
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            wait_s = min(LONGEST_WAIT_S, self.patience.backoff_s * 2**attempt)
            try:
                status, content, asked_s = self._once(path, body, until)
            except (requests.RequestException, OSError) as error:
                reason = f"{type(error).__name__} at {self.url}"
            else:
                if status == 200:
                    answer = _object(content)
                    if answer is not None:
                        self.down = False
                        return answer
                    reason = f"{self.url}/{path} answers with no JSON object: {self._shown(content)!r}"
                elif status in (408, 425, 429) or status >= 500:
                    reason, wait_s = f"{self.url}/{path} answers {status}", max(wait_s, asked_s)
                else:  # it will say the same again
                    raise AskError(f"infra: {self.url}/{path} answers {status}: {self._shown(content)}")
            if attempt + 1 < attempts:
                if time.monotonic() + wait_s >= until:
                    reason += f"; no time for another try in {wait_s:g} s"
                    break
                self.sleep(wait_s)
        self.down = True
        raise AskError(f"infra: {reason} ({attempts} tries at the most)")

    def _once(self, path: str, body: Mapping[str, Any] | None, until: float) -> tuple[int, bytes, float]:
        """(status, body, seconds that the server asks to wait). The deadline holds for the whole answer."""
        patience = self.patience
        end = min(until, time.monotonic() + patience.read_s)
        timeout = (min(patience.connect_s, _left(end)), _left(end))
        auth = _Bearer(os.environ.get(self.key_env, "") if self.key_env else "")
        with requests.request(
            "GET" if body is None else "POST", f"{self.url}/{path}", json=body, auth=auth, timeout=timeout,
            allow_redirects=False, stream=True,
        ) as response:  # fmt: skip
            content = bytearray()
            for piece in response.iter_content(2**16):
                content += piece
                if len(content) > MAX_ANSWER:
                    raise requests.RequestException(f"an answer of more than {MAX_ANSWER} bytes")
                if time.monotonic() > end:
                    raise requests.Timeout("the answer does not end")
            return response.status_code, bytes(content), _seconds(response.headers.get("Retry-After"))

    def _shown(self, content: bytes) -> str:
        text = " ".join(content[: 4 * TEXT_SHOWN].decode("utf-8", "replace").split())[:TEXT_SHOWN]
        key = os.environ.get(self.key_env, "") if self.key_env else ""
        return text.replace(key, "[key]") if key else text


def _left(end: float) -> float:
    return max(0.001, end - time.monotonic())


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return 0.0
