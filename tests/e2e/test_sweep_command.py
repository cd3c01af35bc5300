"""`rlrestore sweep` with real training: it goes on where it was cut off and repeats nothing that has finished."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

import rlrestore.commands.sweep as command
from rlrestore.reporting.log import read_metrics
from rlrestore.sweeps.sweep import load_sweep
from tests.tiny import write_tiny

SWEEP = """
sweep: {name: tiny_sweep, dir: DIR, config: tiny_nft.yaml, seeds: [0], quality: low_frequency, fidelity: psnr_rgb}
set: {run.steps: 1, checkpoint.every: 1}
space: {blocks.fidelity: [1, 2], engine.lr: [1.0e-3, 2.0e-3]}
"""


@pytest.fixture
def sweep_file(tmp_path):
    write_tiny(tmp_path)
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("DIR", str(tmp_path / "runs")))
    return path


def stamps(sweep):
    return {t.name: (t.folder / "result.json").stat().st_mtime_ns for t in sweep.trials if t.state() == "done"}


def test_a_sweep_that_was_interrupted_runs_only_what_is_missing(sweep_file, monkeypatch, capsys):
    sweep, real, ran = load_sweep(sweep_file), command.run_trial, []

    def interrupted(train, overrides, listeners):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(overrides)
        real(train, overrides, listeners)

    monkeypatch.setattr(command, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run_sweep(sweep_file, ["parallel=0"], dry_run=False)
    before = stamps(sweep)
    assert len(before) == 2
    monkeypatch.setattr(command, "run_trial", real)
    command.run_sweep(sweep_file, ["parallel=0"], dry_run=False)
    after = stamps(sweep)
    assert len(after) == 4 and before.items() <= after.items()
    output = capsys.readouterr().out
    assert "4 trials of 1 iterations, 2 of them finished" in output and "[4/4]" in output
    assert (sweep.folder / "report.html").is_file() and (sweep.folder / "chosen.yaml").is_file()
    # nothing is left to do: the report alone is written again
    monkeypatch.setattr(command, "run_trial", None)
    command.run_sweep(sweep_file, [], dry_run=False)


@pytest.mark.slow  # Ray, and two starts of Python
def test_on_ray_tune_a_killed_sweep_goes_on(sweep_file):
    sweep = load_sweep(sweep_file)
    driver = subprocess.Popen(
        [sys.executable, "-m", "rlrestore", "sweep", str(sweep_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 500
    while not stamps(sweep) and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.2)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = stamps(sweep)
    assert 1 <= len(before) < 4, driver.stdout.read()
    for trial in sweep.trials:  # the trial that was cut off dies with its raylet, a moment later
        _wait_for_lock(trial.folder / ".lock", deadline)
    done = subprocess.run([sys.executable, "-m", "rlrestore", "sweep", str(sweep_file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = stamps(sweep)
    assert len(after) == 4 and before.items() <= after.items()
    for trial in sweep.trials:
        assert [record["step"] for record in read_metrics(trial.folder / "metrics.jsonl")] == [0, 1]


@pytest.mark.slow
def test_asha_stops_trials_and_does_not_run_them_again(sweep_file):
    """Rungs after 1, 2 and 4 iterations with factor 2: of 4 trials that run one by one, the worse ones end early."""
    sweep_file.write_text(sweep_file.read_text().replace("run.steps: 1", "run.steps: 4, evaluate.every: 1"))
    options = ["method=asha", "points=4", "grace=1"]
    arguments = [sys.executable, "-m", "rlrestore", "sweep", str(sweep_file), *options]
    text = sweep_file.read_text().replace(
        "engine.lr: [1.0e-3, 2.0e-3]", "engine.lr: {low: 1.0e-4, high: 1.0e-1, log: true}"
    )
    sweep_file.write_text(text)
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    states = [trial.state() for trial in load_sweep(sweep_file, options).trials]
    assert set(states) <= {"done", "stopped early"} and "done" in states and "stopped early" in states, states
    again = subprocess.run([*arguments, "--dry-run"], capture_output=True, text=True)
    assert "4 of them finished" in again.stdout


def _wait_for_lock(path, deadline):
    if not path.exists():
        return
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                assert time.monotonic() < deadline, f"{path} is still held"
                time.sleep(0.2)
