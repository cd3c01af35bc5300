"""6 steps equal 3, kill -9, resume and 3 more: bit for bit in everything but the clock.

The killed run is the real command in a process of its own; the straight run and the continuation are the same command
in this process. All have one thread (conftest): how a sum is split over threads decides its rounding.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs.photos import PhotosEnv
from rlrestore.checkpoint import find_latest, load_tensors
from rlrestore.cli import app
from rlrestore.reporting.log import CLOCK_PREFIXES, comparable, read_metrics
from tests.tiny import write_tiny

OPTIONS = ["run.steps=6", "checkpoint.every=3", "evaluate.every=2", "evaluate.tasks=2"]
REMEMBERS = [
    "credit.baseline=history",
    "credit.history=8",
    "curriculum.candidates=2",
    "gates={consistency: {form: multiply, limit: 0.02, acts_on: [ssim_rgb]}, low_frequency: {form: hinge}}",
    "constraints={gmsd: {step: 1.0}}",
]  # a loop with a memory of its own
LIMIT_S = 600
USAGE = 64


def options_of(algorithm: str) -> list[str]:
    return OPTIONS + REMEMBERS if algorithm == "grpo" else OPTIONS


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def kill_when(ready: Callable[[], bool], command: list[str], log: Path) -> None:
    """Start a command and SIGKILL it as soon as `ready`; it must not have ended before."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT_S
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert process.returncode == -signal.SIGKILL, log.read_text()[-2000:]


def train_command(config: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "rlrestore", "train", str(config), *options]


@contextlib.contextmanager
def recorded_draws(draws: dict[int, list[str]]):
    """Ids of the tasks that are drawn in this process, by iteration."""
    draw = PhotosEnv.draw

    def recording(self: PhotosEnv, step: int, n: int) -> list[Any]:
        tasks = draw(self, step, n)
        ids = [task.id for task in tasks]
        before = draws.get(step, [])  # the start looks at the first task, and the speed probe at the first iteration's
        assert all(a == b for a, b in zip(before, ids, strict=False))
        draws[step] = max(before, ids, key=len)
        return tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhotosEnv, "draw", recording)
        yield


def checkpoint_files(run: Path, step: int = 6) -> dict[str, bytes]:
    """What must be equal of a checkpoint: all files but the manifest, which holds times."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in ("MANIFEST.json", "loop.json")}


def tensorboard_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if not tag.startswith(CLOCK_PREFIXES)
    }


def assert_same_log(one: Path, other: Path) -> None:
    records = [[comparable(record) for record in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    assert [record["step"] for record in records[0]] == [0, 1, 2, 3, 4, 5, 6]  # 0: the base, held out
    assert records[0] == records[1]
    scalars = tensorboard_scalars(one)
    assert [step for step, _ in scalars["reward/mix/mean"]] == [1, 2, 3, 4, 5, 6]  # each step once
    assert scalars == tensorboard_scalars(other)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]
    last = "samples/step_000006/eval_lq_base_tuned_gt.png"
    assert (one / last).read_bytes() == (other / last).read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[int, list[str]]]]:
    """The uninterrupted run of an algorithm: its folder (with its config and weights beside it) and its draws."""
    done: dict[str, tuple[Path, dict[int, list[str]]]] = {}

    def run(algorithm: str) -> tuple[Path, dict[int, list[str]]]:
        if algorithm not in done:
            folder, draws = tmp_path_factory.mktemp(algorithm), {}
            with recorded_draws(draws):
                assert run_cli("train", write_tiny(folder, algorithm), *options_of(algorithm), "run.name=straight") == 0
            done[algorithm] = folder / "runs" / "straight", draws
        return done[algorithm]

    return run


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_a_killed_run_continues_bit_for_bit(straight: Callable[[str], Any], algorithm: str) -> None:
    run, draws = straight(algorithm)
    folder, killed = run.parent.parent, run.parent / "killed"
    config, options = folder / f"tiny_{algorithm}.yaml", [*options_of(algorithm), "run.name=killed"]
    checkpoint = killed / "checkpoints" / "step_000003" / "MANIFEST.json"

    def ready() -> bool:
        """nft: right after the checkpoint; grpo: when the next step is logged, which must then be undone."""
        if algorithm == "nft" or not checkpoint.exists():
            return checkpoint.exists()
        return '"step": 4' in (killed / "metrics.jsonl").read_text()

    kill_when(ready, train_command(config, options), folder / "killed.log")
    assert find_latest(killed)[0] == checkpoint.parent
    assert not (killed / "result.json").exists()
    after: dict[int, list[str]] = {}
    with recorded_draws(after):
        assert run_cli("train", config, *options) == 0
    assert all(draws[step] == after[step] for step in (3, 4, 5))
    assert all(draws[step][: len(ids)] == ids for step, ids in after.items())  # the start draws less of step 0
    files = checkpoint_files(run)
    kept = {"ema.safetensors", "base.safetensors", "engine/parameters.safetensors", "engine/optimiser.safetensors"}
    assert kept | ({"old.safetensors"} if algorithm == "nft" else set()) <= files.keys()
    assert files == checkpoint_files(killed)
    assert_same_log(run, killed)
    moved = load_tensors(run / "checkpoints" / "step_000006" / "ema.safetensors")
    base = load_tensors(run / "checkpoints" / "step_000006" / "base.safetensors")
    assert any(not torch.equal(moved[name], base[name]) for name in base)  # else equality would show nothing


def test_a_damaged_checkpoint_is_passed_over(
    straight: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of the newest checkpoint flips: the run says so, goes back to the one before and ends where it ended."""
    run, _ = straight("nft")
    damaged = run.parent / "damaged"
    shutil.copytree(run, damaged)
    flip_a_bit(damaged / "checkpoints" / "step_000006" / "ema.safetensors")
    capsys.readouterr()
    assert run_cli("train", run.parent.parent / "tiny_nft.yaml", *OPTIONS, "run.name=damaged") == 0
    said = capsys.readouterr().err
    assert "checkpoint step_000006 is not used" in said and "ema.safetensors" in said and "sha256" in said
    assert checkpoint_files(damaged) == checkpoint_files(run)
    assert_same_log(run, damaged)


def test_without_a_good_checkpoint_nothing_is_lost(
    straight: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """All checkpoints damaged: starting anew by itself would delete what a person might still mend."""
    run, _ = straight("nft")
    ruined = run.parent / "ruined"
    shutil.copytree(run, ruined)
    for step in (3, 6):
        flip_a_bit(ruined / "checkpoints" / f"step_{step:06d}" / "ema.safetensors")
    before = sorted(ruined.rglob("*"))
    capsys.readouterr()
    assert run_cli("train", run.parent.parent / "tiny_nft.yaml", *OPTIONS, "run.name=ruined") == USAGE
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: no checkpoint of ") and "run.overwrite=true" in last
    assert sorted(ruined.rglob("*")) == before


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("override", ["engine.lr=5e-4", "algorithm.times=3", "rewards.ssim_rgb.weight=2", "run.seed=1"])
def test_a_changed_config_is_refused(
    straight: Callable[[str], Any], capsys: pytest.CaptureFixture[str], override: str
) -> None:
    run, _ = straight("nft")
    before = checkpoint_files(run)
    capsys.readouterr()
    config = run.parent.parent / "tiny_nft.yaml"
    assert run_cli("train", config, *OPTIONS, "run.name=straight", "run.steps=8", override) == USAGE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and override.split("=")[0] in lines[0] and "run.overwrite=true" in lines[0]
    assert checkpoint_files(run) == before


def test_a_finished_run_says_so_and_stays(straight: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = straight("nft")
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run_cli("train", run.parent.parent / "tiny_nft.yaml", *OPTIONS, "run.name=straight") == 0
    assert "is complete" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_colocated_deepspeed_continues_bit_for_bit(tmp_path: Path) -> None:
    """Two ranks with ZeRO-2 on Ray; the driver is killed, and Ray ends with it."""
    config = write_tiny(tmp_path, "nft")
    options = [
        *OPTIONS,
        "engine.kind=deepspeed",
        "placement.kind=colocated",
        "placement.ranks=2",
        "placement.threads=1",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run, killed = tmp_path / "runs" / "straight", tmp_path / "runs" / "killed"
    subprocess.run(train_command(config, [*options, "run.name=straight"]), check=True, env=environment, timeout=LIMIT_S)
    checkpoint = killed / "checkpoints" / "step_000003" / "MANIFEST.json"
    command = train_command(config, [*options, "run.name=killed"])
    kill_when(checkpoint.exists, command, tmp_path / "killed.log")
    subprocess.run(command, check=True, env=environment, timeout=LIMIT_S)
    ours, theirs = checkpoint_files(run), checkpoint_files(killed)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".pt"):  # DeepSpeed's own files: pickles of tensors, equal in content
            assert_equal(*(load_pickled(each / "checkpoints" / "step_000006" / name) for each in (run, killed)), name)
        else:
            assert ours[name] == theirs[name], name
    assert_same_log(run, killed)


def load_pickled(path: Path) -> Any:
    from rlrestore.engine.deepspeed_engine import TRUSTED_GLOBALS

    with torch.serialization.safe_globals(TRUSTED_GLOBALS):
        return torch.load(path, weights_only=True)


def assert_equal(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(one, str | int | float | bool | type(None)):
        assert one == other, where
