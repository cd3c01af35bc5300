"""Two servers on loopback: our own app under uvicorn, and one that answers what a test tells it to (faults)."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn

from rewards.base import Reward
from rewards.remote.server import ServeLimits, Service, make_app

TOKEN = "a-token-of-the-tests"
Answer = tuple[int, bytes]  # status, body


@contextmanager
def our_server(rewards: Mapping[str, Reward], limits: ServeLimits | None = None) -> Iterator[tuple[str, Service]]:
    """(url, service) of rewards behind the real app."""
    service = Service(rewards, limits or ServeLimits())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(service, TOKEN), "127.0.0.1", port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(10)


class Scripted(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Callable[[str, Any, int], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.asked, self.lock = script, 0, threading.Lock()
        self.headers: dict[str, str] = {}  # of every answer
        self.bodies: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def scripted(script: Callable[[str, Any, int], Answer]) -> Iterator[Scripted]:
    """`script(path, body, how many came before)` answers every request."""
    server = Scripted(script)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body: Any) -> None:
        with self.server.lock:
            before, self.server.asked = self.server.asked, self.server.asked + 1
            self.server.bodies.append(body)
        status, content = self.server.script(self.path, body, before)
        try:
            self.send_response(status)
            for name, value in self.server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client has gone

    def log_message(self, *_: object) -> None: ...
