"""`rlrestore view`: serve runs on this machine's loopback and compare their checkpoints on a photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from rlrestore.build import best_device, build_restorer, load_train_config
from rlrestore.commands.restore import load_restorer
from rlrestore.errors import InputError
from rlrestore.quiet import quiet
from rlrestore.reporting.viewer import Gallery, ViewServer, checkpoints_of, find_runs, photos_of
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.restoration import restore_pixels

TILE_PX, OVERLAP_PX = 256, 64


def run_view(source: Path, photos: Path | None, port: int) -> None:
    """Until Ctrl-C."""
    quiet()
    server = open_view(source, photos, port)
    print(f"open         {server.address}\n(only from this machine; Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("done")
    finally:
        server.server_close()


def open_view(source: Path, photos: Path | None, port: int) -> ViewServer:
    """InputError for what cannot be shown; nothing is loaded yet."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: give runs/NAME or a folder of runs")
    if photos is not None and not photos.is_dir():
        raise InputError(f"--photos {photos} is not a folder")
    runs = find_runs(source)
    checkpoints = {name: _loader(folder) for name, folder in checkpoints_of(runs).items()}
    bases = {f"{run.name} base": _base_loader(run) for run in runs if (run / "config.resolved.yaml").is_file()}
    first = next(iter(bases), None)  # base beside the newest checkpoint, then the rest
    weights = ({first: bases[first]} if first else {}) | checkpoints | bases
    try:
        return ViewServer(Gallery(weights, photos_of(runs, photos), _steps(runs[0]), _restore), port)
    except OSError as error:
        raise InputError(f"--port {port} cannot be opened ({error.strerror}): choose another, or 0 for any") from error


def _loader(folder: Path):
    return lambda: load_restorer(folder)


def _base_loader(run: Path):
    def load() -> Restorer:
        return build_restorer(load_train_config(run / "config.resolved.yaml").restorer).to(best_device())

    return load


def _steps(run: Path) -> int:
    """Sampling steps that the run was evaluated with."""
    saved = run / "config.resolved.yaml"
    config = yaml.safe_load(saved.read_text()) if saved.is_file() else {}
    return int((config.get("sampling") or {}).get("steps", 8))


def _restore(restorer: Restorer, rgb_HW3: np.ndarray, seed: int, steps: int) -> np.ndarray:
    return restore_pixels(restorer, rgb_HW3, seed=seed, steps=steps, samples=1, tile=TILE_PX, overlap=OVERLAP_PX)
