"""A server on loopback that speaks OpenAI's and Gemini's APIs over real HTTP, with a script of faults and a till.

It charges once for each Idempotency-Key that it answers with success, as a provider does; `charged` counts requests,
`keys` the distinct ones. What it answers is the test's: a function of the photo that was sent.
"""

from __future__ import annotations

import base64
import email.parser
import email.policy
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

SECRET = "sk-test-0123456789"
# (kind: "edit" or "chat", pictures, text, how often this key came) -> answer: PNG bytes, reply text, or a fault
Script = Callable[[str, list[np.ndarray], str, int], "bytes | str | Fault"]


class Fault(Exception):
    def __init__(self, status: int, body: str = "{}", headers: dict[str, str] | None = None, delay_s: float = 0.0):
        super().__init__(body)
        self.status, self.body, self.headers, self.delay_s = status, body, headers or {}, delay_s


class FakeApi(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Script):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.lock = script, threading.Lock()
        self.requests: Counter[str] = Counter()  # by kind
        self.answered: Counter[str] = Counter()  # successes by key
        self.seen: Counter[str] = Counter()  # by key
        self.delay_s = 0.0
        self.tell_model = False  # the script's text of an edit is then "model=M PROMPT"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def gemini_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1beta"


@contextmanager
def serving(script: Script) -> Iterator[FakeApi]:
    server = FakeApi(script)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        gemini = re.fullmatch(r"/v1beta/models/(.+):generateContent", self.path)
        if gemini:
            kind, pictures, text = _gemini(body, gemini[1])
        else:
            kind = {"/v1/images/edits": "edit", "/v1/chat/completions": "chat"}[self.path]
            pictures, text = (_multipart if kind == "edit" else _chat)(self.headers["Content-Type"], body)
        key = self.headers["Idempotency-Key"]
        with self.server.lock:
            self.server.requests[kind] += 1
            self.server.seen[key] += 1
            times = self.server.seen[key]
        if gemini and self.headers.get("x-goog-api-key") != SECRET:
            self._send(400, b'{"error": {"status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]}}')
            return
        if not gemini and self.headers.get("Authorization") != f"Bearer {SECRET}":
            self._send(401, b'{"error": "bad key"}')
            return
        if kind == "edit" and not self.server.tell_model:
            text = text.split(" ", 1)[1]
        time.sleep(self.server.delay_s)
        try:
            answer = self.server.script(kind, pictures, text, times)
            if isinstance(answer, Fault):
                raise answer
        except Fault as fault:
            time.sleep(fault.delay_s)
            self._send(fault.status, fault.body.encode(), fault.headers)
            return
        with self.server.lock:
            self.server.answered[key] += 1
        if gemini:
            reply = _gemini_reply(answer)
        elif isinstance(answer, bytes):
            reply = {
                "data": [{"b64_json": base64.b64encode(answer).decode()}],
                "usage": {"input_tokens": 1000, "output_tokens": 100},
            }
        else:
            reply = {
                "choices": [{"message": {"content": answer}, "finish_reason": "stop"}], "model": "fake-vlm-1",
                "usage": {"prompt_tokens": 500, "completion_tokens": 50},
            }  # fmt: skip
        self._send(200, json.dumps(reply).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # the client was killed

    def log_message(self, *_: object) -> None: ...


def _multipart(kind: str, body: bytes) -> tuple[list[np.ndarray], str]:
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
        f"Content-Type: {kind}\r\n\r\n".encode() + body
    )
    parts = {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
        for part in message.iter_parts()
    }
    return [_pixels(parts["image"])], f"model={parts['model'].decode()} {parts['prompt'].decode()}"


def _chat(kind: str, body: bytes) -> tuple[list[np.ndarray], str]:
    content = json.loads(body)["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [_pixels(base64.b64decode(url.split(",")[1])) for url in urls], content[-1]["text"]


def _gemini(body: bytes, model: str) -> tuple[str, list[np.ndarray], str]:
    given = json.loads(body)
    parts, config = given["contents"][0]["parts"], given["generationConfig"]
    pictures = [_pixels(base64.b64decode(part["inlineData"]["data"])) for part in parts if "inlineData" in part]
    text = parts[-1]["text"]
    if config.get("responseModalities") != ["IMAGE"]:
        return "chat", pictures, text
    width, height = map(int, config["imageConfig"]["aspectRatio"].split(":"))
    assert abs(pictures[0].shape[1] / pictures[0].shape[0] / (width / height) - 1) < 0.02, (
        "sent in a shape it did not ask for"
    )
    return "edit", pictures, f"model={model} {text}"


def _gemini_reply(answer: bytes | str) -> dict:
    if isinstance(answer, bytes):
        parts = [
            {"text": "Here it is."},
            {"inlineData": {"mimeType": "image/png", "data": base64.b64encode(answer).decode()}},
        ]
    else:
        parts = [{"text": answer}]
    return {
        "candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP"}], "modelVersion": "fake-gemini-1",
        "responseId": "r1", "usageMetadata": {"promptTokenCount": 300, "candidatesTokenCount": 1200, "thoughtsTokenCount": 90},
    }  # fmt: skip


def _pixels(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))
