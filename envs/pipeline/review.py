"""Pages for one person on a local web server, and the review page: side by side and flicker views, decisions by key, undo.

It listens on loopback, answers only requests for that host, and takes decisions only with the token of the page, so that no
other site can send any. Decisions go to a journal; what was decided stays decided.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from envs.pipeline.process import REVIEW, Outcome
from envs.pipeline.run import latest_decisions
from envs.pipeline.store import BuildFolder

REASONS = (
    "content changed",
    "shifted",
    "blurred",
    "person changed",
    "text changed",
    "invented detail",
    "colour",
    "residue",
    "other",
)
_MAX_BODY = 4096


class PageServer(ThreadingHTTPServer):
    """`serve_forever()` until it is shut down; `address` is what to open. A subclass says what waits, and takes decisions."""

    daemon_threads = True
    page = ""  # a file beside this one

    def __init__(self, folder: BuildFolder, shown_blobs: set[str], port: int) -> None:
        """port 0: any free one."""
        self.folder, self.shown_blobs, self.token = folder, shown_blobs, secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"

    def waiting(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def decide(self, given: Mapping[str, Any]) -> None:
        raise NotImplementedError


class ReviewServer(PageServer):
    """Shows the candidates that await a person."""

    page = "review.html"

    def __init__(self, outcomes: Mapping[str, Outcome], folder: BuildFolder, reviewer: str, port: int = 0) -> None:
        """outcomes: as they came from the pipeline; those that await review are shown."""
        self.items = [item for _, item in sorted(outcomes.items()) if item.status == REVIEW]
        self.reviewer = reviewer
        super().__init__(folder, {name for item in self.items for name in (item.lq, item.gt)}, port)

    def waiting(self) -> list[dict[str, Any]]:
        """What is still to be decided."""
        latest = latest_decisions(self.folder)
        return [
            {
                "id": item.id,
                "types": item.types,
                "prompt": item.prompt,
                "why": item.reason,
                "lq": item.lq,
                "gt": item.gt,
            }
            for item in self.items
            if (item.id, item.gt) not in latest
        ]

    def decide(self, given: Mapping[str, Any]) -> None:
        """Append a decision; ValueError if it is none."""
        name, verdict, reason = given.get("id"), given.get("verdict"), given.get("reason", "")
        item = next((item for item in self.items if item.id == name), None)
        if item is None:
            raise ValueError(f"no photo {name!r} is under review")
        if verdict not in ("accept", "reject", "undo") or (verdict == "reject" and reason not in REASONS):
            raise ValueError(f"verdict {verdict!r} with reason {reason!r} is none")
        seconds = given.get("seconds", 0)
        self.folder.decisions.append({
            "id": item.id, "gt": item.gt, "verdict": verdict, "reason": reason, "reviewer": self.reviewer,
            "seconds": round(float(seconds), 1) if isinstance(seconds, int | float) else 0.0,
        })  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if not self._allowed():
            return
        path = self.path.split("?")[0]
        blob = re.fullmatch(r"/blob/([0-9a-f]{64})", path)
        if path == "/":
            page = resources.files("envs.pipeline").joinpath(self.server.page).read_text(encoding="utf-8")
            self._send(200, page.encode(), "text/html; charset=utf-8")
        elif path == "/items":
            self._send_json(200, {"items": self.server.waiting(), "reasons": REASONS})
        elif blob and blob[1] in self.server.shown_blobs:
            self._send(200, self.server.folder.blobs.get(blob[1]), "image/png")
        else:
            self._send_json(404, {"error": "not found"})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= _MAX_BODY or self.path.split("?")[0] != "/decide":
            self._send_json(400, {"error": "not a decision"})
            return
        try:
            given = json.loads(self.rfile.read(length))
            self.server.decide(given)
        except (ValueError, AttributeError, TypeError) as error:
            self._send_json(400, {"error": str(error)})
            return
        self._send_json(200, {"left": len(self.server.waiting())})

    def _allowed(self) -> bool:
        """The right host (no DNS rebinding) and the page's token (no other site)."""
        port = self.server.server_address[1]
        token = self.headers.get("X-Token") or (self.path.split("token=")[1] if "token=" in self.path else "")
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._send_json(403, {"error": "wrong host"})
            return False
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._send_json(403, {"error": "wrong token"})
            return False
        return True

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self'")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the token would be in it."""
