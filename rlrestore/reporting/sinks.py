"""Other places for the scalars and pictures of a run (`log.sinks`), beside TensorBoard and metrics.jsonl, which are always there.

A sink takes steps in rising order. On resume, steps that are run again reach it a second time: both services keep the first point
of a step or ignore it, and the numbers are equal but for the clock.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlrestore.config.files import ConfigError


class Sink(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, tag: str, path: Path) -> None:
        """`path` is a PNG that stays where it is."""

    def text(self, step: int, tag: str, markdown: str) -> None: ...

    def close(self) -> None: ...


class WandbSink:
    """Weights & Biases; WANDB_MODE=offline keeps everything under the run directory."""

    def __init__(self, project: str, run_id: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=project, id=run_id, name=run_dir.name, dir=str(run_dir), config=dict(config), resume="allow"
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, tag: str, path: Path) -> None:
        self._run.log({tag: self._wandb.Image(str(path))}, step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._run.log({tag: self._wandb.Html(f"<pre>{_escaped(markdown)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """Hugging Face's local tracker; `trackio show` opens it. Its runs have names, not ids: the name carries the id."""

    def __init__(self, project: str, run_id: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project=project, name=f"{run_dir.name}-{run_id}", config=dict(config), resume="allow")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def image(self, step: int, tag: str, path: Path) -> None:
        self._trackio.log({tag: self._trackio.Image(str(path))}, step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Trackio shows no text of its own: it stays in TensorBoard."""

    def close(self) -> None:
        self._trackio.finish()


SINKS: dict[str, Callable[[str, str, Path, Mapping[str, Any]], Sink]] = {"trackio": TrackioSink, "wandb": WandbSink}


def check_sinks(names: Sequence[str]) -> None:
    """ConfigError for a name that is none, or whose package is not installed."""
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"log.sinks names '{name}': choose of {', '.join(sorted(SINKS))}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.sinks names {name}, which is not installed: pip install {name}, or log.sinks=[]")


def open_sinks(names: Sequence[str], project: str, run_id: str, run_dir: Path, config: Mapping[str, Any]) -> list[Sink]:
    return [SINKS[name](project, run_id, run_dir, config) for name in names]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
