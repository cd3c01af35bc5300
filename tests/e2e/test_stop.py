"""A run that is asked to end saves, says so with its own exit code, and ends later where it would have ended anyway."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import pytest

from envs.photos import PhotosEnv
from rlrestore.cli import app
from rlrestore.config.files import ConfigError
from rlrestore.stopping import Stop, StopRequested
from tests.tiny import write_tiny

USAGE, STOPPED = 64, 85
OPTIONS = ["run.steps=4", "checkpoint.every=4", "evaluate.tasks=1"]


def run_cli(*arguments: object) -> int:
    try:
        app([str(argument) for argument in arguments], standalone_mode=False)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def weights(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step_{step:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def at_draw(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Do something in the middle of an iteration, once: when its tasks are drawn."""
    draw, seen = PhotosEnv.draw, itertools.count()

    def drawing(self: PhotosEnv, at: int, n: int):
        if at == step and next(seen) == 0:
            action()
        return draw(self, at, n)

    monkeypatch.setattr(PhotosEnv, "draw", drawing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    config, runs = write_tiny(tmp_path, "grpo"), tmp_path / "runs"
    before = signal.getsignal(number)
    assert run_cli("train", config, *OPTIONS, "run.name=straight") == 0
    with monkeypatch.context() as patch:
        at_draw(patch, 1, lambda: os.kill(os.getpid(), number))
        assert run_cli("train", config, *OPTIONS, "run.name=asked") == STOPPED
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"stopped: {number.name}: saved after iteration 2 of 4; the same command continues"
    assert [path.name for path in (runs / "asked" / "checkpoints").iterdir()] == ["step_000002"]
    assert json.loads((runs / "asked" / "run.json").read_text())["exit"].startswith("stopped: ")
    assert signal.getsignal(number) is before, "the handler belongs to the run"
    assert run_cli("train", config, *OPTIONS, "run.name=asked") == 0
    assert weights(runs / "asked", 4) == weights(runs / "straight", 4) != {}


def test_the_wall_clock_limit_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock that advances by 1,000 s whenever the tasks of iterations 1, 2, ... are drawn. Of 3,600 s, 2,600 are left after
    the second iteration, which is enough for two, and 1,600 after the third, which is not."""
    config = write_tiny(tmp_path, "grpo")
    clock = [0.0]
    draw = PhotosEnv.draw

    def drawing(self: PhotosEnv, at: int, n: int):
        clock[0] += 1000.0 * (at >= 1)
        return draw(self, at, n)

    with monkeypatch.context() as patch:
        patch.setattr(PhotosEnv, "draw", drawing)
        patch.setattr("rlrestore.commands.train.Stop", lambda hours: Stop(hours, lambda: clock[0]))
        assert run_cli("train", config, *OPTIONS, "run.steps=9", "run.max_hours=1") == STOPPED
    assert "stopped: run.max_hours=1: saved after iteration 3 of 9; the same command" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs/tiny/checkpoints").iterdir()] == ["step_000003"]
    assert run_cli("train", config, *OPTIONS) == 0, "the limit changes no arithmetic: it may change from start to start"


def test_a_limit_shorter_than_one_iteration_is_the_users_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It must not end with the code that makes a launcher try again: it would do so for ever."""
    config = write_tiny(tmp_path, "grpo")
    assert run_cli("train", config, "run.max_hours=1e-5") == USAGE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: run.max_hours=1e-05 (0 s) is too short: the start took ")
    assert run_cli("train", config, "run.max_hours=-1") == USAGE
    assert "run.max_hours=-1.0 must be 0 (no limit) or positive" in capsys.readouterr().err


def test_finetune_stops_as_train_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "finetune.yaml"
    config.write_text(
        f"run: {{name: cold, dir: {tmp_path}/runs, steps: 6}}\n"
        "env: {kind: photos, size: 32, recipe: mild}\n"
        "restorer: {kind: embedded, weights: null, precision: float32, unshuffle: 2, mean_channels: [16, 16], "
        "flow_channels: [16, 32], groups: 4}\n"
        "optimiser: {batch: 2, decay: 2, data_workers: 0}\n"
        "evaluate: {tasks: 1, samples: 2, steps: 2}\n"
    )
    with monkeypatch.context() as patch:
        at_draw(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_cli("finetune", config) == STOPPED
    assert run_cli("finetune", config) == 0
    assert run_cli("finetune", config, "run.name=straight") == 0
    assert weights(tmp_path / "runs/cold", 6) == weights(tmp_path / "runs/straight", 6) != {}


# -- the clock by itself ---------------------------------------------------------------------------------------------


def test_two_iterations_must_fit_into_what_is_left() -> None:
    """Limit 100 s, start 10 s, iterations of 20 s: after 3 of them 30 s are left, and one more may need its 20 s and a bit."""
    now = iter([0.0, 10.0, 10.0, 30.0, 30.0, 50.0, 50.0, 70.0, 70.0]).__next__
    stop = Stop(100 / 3600, now)
    stop.hold(5.0)  # reads the clock for left_s and for the lap
    assert stop.due() is None and stop.due() is None
    assert stop.due() == "run.max_hours=0.0277778"


def test_before_the_first_iteration_a_signal_ends_it_at_once() -> None:
    stop = Stop()
    with stop.listening(), pytest.raises(StopRequested, match="SIGTERM before the first iteration"):
        os.kill(os.getpid(), signal.SIGTERM)
    stop = Stop(1.0, iter([0.0, 3590.0, 3590.0]).__next__)
    with pytest.raises(ConfigError, match=r"run\.max_hours=1 \(3600 s\) is too short: the start took 3590 s"):
        stop.hold(11.0)
