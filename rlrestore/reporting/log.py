"""What a run leaves to look at: TensorBoard under `tb/`, the same scalars in `metrics.jsonl`, pictures in `samples/`.

`metrics.jsonl` has one JSON object a call of `scalars`: {"step": int, "time": seconds, tag: number, ...}. What depends
on the clock is only in "time" and in tags that start with time/ or throughput/; all else must be equal, bit for bit,
between a straight run and a resumed one (`comparable`). Only one process writes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary

from rlrestore.reporting.pictures import to_pil
from rlrestore.reporting.sinks import Sink

CLOCK_PREFIXES = ("time/", "throughput/")


class RunLog:
    """Opens or continues the log of a run. `purge_step=k` on resume: everything logged at steps >= k is dropped.

    `sinks` get the same scalars, pictures and texts; the log closes them.
    """

    def __init__(self, run_dir: Path | str, purge_step: int | None = None, sinks: Sequence[Sink] = ()) -> None:
        self.run_dir, self._sinks = Path(run_dir), tuple(sinks)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.run_dir / "metrics.jsonl"
        _repair(self.metrics_path, purge_step)
        self._metrics = self.metrics_path.open("a", buffering=1)
        self._board = SummaryWriter(str(self.run_dir / "tb"), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point a tag. AssertionError names a tag that is not finite."""
        numbers = {tag: float(value) for tag, value in values.items()}
        for tag, value in numbers.items():
            if not math.isfinite(value):
                raise AssertionError(f"{tag} is {value} at step {step}: leave out what is not a finite number")
        self._metrics.write(json.dumps({"step": step, "time": time.time(), **numbers}) + "\n")
        for tag, value in numbers.items():
            self._board.add_scalar(tag, value, step)
        for sink in self._sinks:
            sink.scalars(step, numbers)

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Any number of values, to TensorBoard alone; none are not logged."""
        if len(values):
            self._board.add_histogram(tag, values, step)

    def image(self, step: int, tag: str, picture: Tensor) -> Path:
        """[3, H, W] in [0, 1] to TensorBoard and to samples/step_<step>/<tag>.png, whose path is returned."""
        path = self.run_dir / "samples" / f"step_{step:06d}" / (tag.replace("/", "_") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_8bit = to_pil(picture)
        picture_8bit.save(path)
        self._board.add_image(tag, picture.detach().float().clamp(0, 1).cpu(), step)
        for sink in self._sinks:
            sink.image(step, tag, path)
        return path

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._board.add_text(tag, markdown, step)
        for sink in self._sinks:
            sink.text(step, tag, markdown)

    def hparams(self, params: Mapping[str, bool | int | float | str], metric_tags: Sequence[str]) -> None:
        """A row of TensorBoard's HParams table, once at the start; `metric_tags` are scalars that the run logs anyway.

        Written into the run's own event file: `SummaryWriter.add_hparams` opens another one, after which TensorBoard reads no
        more of the first.
        """
        experiment, start, _ = summary.hparams(dict(params), dict.fromkeys(metric_tags, 0.0))
        writer = self._board._get_file_writer()
        writer.add_summary(experiment)
        writer.add_summary(start)

    def custom_layout(self, layout: Mapping[str, Mapping[str, list]]) -> None:
        """{group: {chart: ["Multiline", [tag or regex, ...]] or ["Margin", [mean, low, high]]}}, once at the start."""
        self._board.add_custom_scalars(layout)

    def flush(self) -> None:
        """Makes all that was logged durable; before a checkpoint, so that a resume finds the steps that led to it."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        self._board.flush()

    def close(self) -> None:
        if not self._metrics.closed:
            self.flush()
            self._metrics.close()
            self._board.close()
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """metrics.jsonl as one record a step, in order; calls at the same step are merged (later ones win)."""
    by_step: dict[int, dict[str, float]] = {}
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        by_step.setdefault(record["step"], {}).update(record)
    return [by_step[step] for step in sorted(by_step)]


def comparable(record: Mapping[str, float]) -> dict[str, float]:
    """The part of a record that must not depend on the clock."""
    return {tag: v for tag, v in record.items() if tag != "time" and not tag.startswith(CLOCK_PREFIXES)}


def _repair(path: Path, purge_step: int | None) -> None:
    """Drops steps >= purge_step and a last line that a kill cut short; replaces the file atomically, if at all."""
    if not path.exists():
        return
    old = path.read_text()
    whole = old[: old.rfind("\n") + 1]
    lines = whole.splitlines(keepends=True)
    if purge_step is not None:
        lines = [line for line in lines if json.loads(line)["step"] < purge_step]
    new = "".join(lines)
    if new == old:
        return
    tmp = path.with_name(f".tmp-{path.name}")
    with tmp.open("w") as stream:
        stream.write(new)
        stream.flush()
        os.fsync(stream.fileno())
    tmp.replace(path)
