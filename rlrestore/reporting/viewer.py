"""`rlrestore view`: a local page that restores a photo with any checkpoint of any run, live, two at a time behind a slider.

It listens on loopback, answers only requests for that host, and only with the token of the page: no other site can make it work or read
what it shows. Runs, checkpoints and photos are those that were there at the start, chosen by name from a list; no request
names a path.
"""

from __future__ import annotations

import hmac
import io
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from envs.images import image_files, load_rgb
from rlrestore.checkpoint import CheckpointError
from rlrestore.errors import InputError
from rlrestore.reporting.report import page_text
from rlrestore.restorers.base import Restorer

LONG_EDGE_PX = 512  # photos are scaled down to it: this is for looking, `rlrestore restore` is for all pixels
LOADED = 2  # restorers that are kept
KEPT = 64  # restored pictures that are kept
MAX_STEPS = 64
Restore = Callable[[Restorer, np.ndarray, int, int], np.ndarray]  # (restorer, [H, W, 3], seed, steps) -> [H, W, 3]


class Gallery:
    """What can be chosen, and the work: one restoration at a time."""

    def __init__(
        self, weights: dict[str, Callable[[], Restorer]], photos: dict[str, Path], steps: int, restore: Restore
    ) -> None:
        """`weights`: name -> how to load; the first two are shown first. `photos`: name -> file."""
        self.weights, self.photos, self.steps, self._restore = weights, photos, steps, restore
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Restorer] = OrderedDict()
        self._pictures: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()

    def listing(self) -> dict[str, Any]:
        return {"weights": list(self.weights), "photos": list(self.photos), "steps": self.steps}

    def photo(self, name: str) -> bytes:
        """PNG, scaled down. KeyError for a name that is none."""
        return _png(load_rgb(self.photos[name], LONG_EDGE_PX))

    def restored(self, name: str, which: str, seed: int, steps: int) -> bytes:
        """PNG. KeyError for names that are none, ValueError for numbers out of range."""
        if not 0 <= seed < 2**31 or not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"seed must be 0 or positive and steps 1 to {MAX_STEPS}")
        photo, load = self.photos[name], self.weights[which]
        key = (name, which, seed, steps)
        with self._lock:
            if key not in self._pictures:
                pixels = self._restore(self._restorer(which, load), load_rgb(photo, LONG_EDGE_PX), seed, steps)
                _keep(self._pictures, key, _png(pixels), KEPT)
            return self._pictures[key]

    def _restorer(self, which: str, load: Callable[[], Restorer]) -> Restorer:
        if which not in self._loaded:
            _keep(self._loaded, which, load(), LOADED)
        self._loaded.move_to_end(which)
        return self._loaded[which]


class ViewServer(ThreadingHTTPServer):
    """`serve_forever()` until it is shut down; `address` is what to open."""

    daemon_threads = True

    def __init__(self, gallery: Gallery, port: int = 0) -> None:
        """port 0: any free one."""
        self.gallery, self.token = gallery, secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if not self._allowed(query.get("token", "")):
            return
        gallery = self.server.gallery
        try:
            if parts.path == "/":
                self._send(200, page_text("view.html", {}).encode(), "text/html; charset=utf-8")
            elif parts.path == "/listing":
                self._send(200, json.dumps(gallery.listing()).encode(), "application/json")
            elif parts.path == "/photo":
                self._send(200, gallery.photo(query["photo"]), "image/png")
            elif parts.path == "/restored":
                seed, steps = int(query.get("seed", 0)), int(query.get("steps", gallery.steps))
                self._send(200, gallery.restored(query["photo"], query["weights"], seed, steps), "image/png")
            else:
                self._error(404, "not found")
        except KeyError as error:
            self._error(404, f"no such name: {error}")
        except (CheckpointError, ValueError) as error:  # InputError is a ValueError
            self._error(400, str(error))

    def _allowed(self, token: str) -> bool:
        """The right host (no DNS rebinding) and the page's token (no other site)."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._error(403, "wrong host")
            return False
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._error(403, "wrong token")
            return False
        return True

    def _error(self, status: int, text: str) -> None:
        self._send(status, json.dumps({"error": text}).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(
            "Content-Security-Policy",
            "default-src 'self' 'unsafe-inline'; img-src 'self' blob:; frame-ancestors 'none'",
        )
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the token would be in it."""


def find_runs(folder: Path) -> list[Path]:
    """`folder` if it is a run with checkpoints, else the runs right below it, and below those (a sweep's)."""
    runs = [folder] if _steps(folder) else sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/checkpoints")
                                                  if _steps(path.parent))  # fmt: skip
    if not runs:
        raise InputError(
            f"{folder} has no complete checkpoint, nor has a run below it: give runs/NAME or a folder of runs"
        )
    return runs


def _steps(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob("checkpoints/step_*/MANIFEST.json"))


def checkpoints_of(runs: Sequence[Path]) -> dict[str, Path]:
    """ "NAME step N" -> checkpoint folder; newest of each run first."""
    return {f"{run.name} step {int(step.name[5:])}": step for run in runs for step in reversed(_steps(run))}


def photos_of(runs: Sequence[Path], folder: Path | None) -> dict[str, Path]:
    """The given folder's photos, then the held-out LQs of the first run that has a panel."""
    found = {str(path.relative_to(folder)): path for path in image_files(folder)} if folder else {}
    for run in runs:
        if (run / "panel" / "panel.json").is_file():
            tasks = json.loads((run / "panel" / "panel.json").read_text())["tasks"]
            shown = sorted((task for task in tasks if task["pictures"]), key=lambda task: task["index"])
            return found | {f"held out: {task['id']}": run / "panel" / task["pictures"]["lq"] for task in shown}
    if not found:
        raise InputError("none of the runs has held-out photos yet (panel/): give photos with --photos FOLDER")
    return found


def _png(pixels_HW3: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stream, "PNG")
    return stream.getvalue()


def _keep(cache: OrderedDict, key: Any, value: Any, most: int) -> None:
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)
