"""`rlrestore judge serve` as a user starts it, and what it refuses before it listens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from rlrestore.commands.judge_serve import allowed_hosts, run_judge_serve, served_terms
from rlrestore.config.files import ConfigError
from rlrestore.errors import InputError

LIMITS = {"max_items": 8, "max_pixels": 10_000, "max_body_mb": 1, "max_waiting": 2}


def test_serves_on_loopback_with_a_token_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("rewards: {lows: {kind: low_frequency}}\n")
    command = [sys.executable, "-m", "rlrestore", "judge", "serve", str(tmp_path / "serve.yaml"), "--port", "18427"]
    environment = {k: v for k, v in os.environ.items() if k != "RLRESTORE_JUDGE_TOKEN"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    watchdog = threading.Timer(120, server.kill)
    watchdog.start()
    try:
        assert server.stdout is not None
        said = ""
        while "listening" not in said:
            line = server.stdout.readline()
            assert line, said
            said += line
        token = re.search(r"export RLRESTORE_JUDGE_TOKEN=(\S+)", said)
        assert token and "lows" in said and "lower is better" in said
        spec, health = f"{'http://127.0.0.1:18427'}/v1/spec", "http://127.0.0.1:18427/health"
        for _ in range(100):
            try:
                assert requests.get(health, timeout=5).json() == {"status": "ok"}
                break
            except requests.ConnectionError:
                threading.Event().wait(0.1)
        told = requests.get(spec, headers={"Authorization": f"Bearer {token[1]}"}, timeout=5).json()
        assert told["rewards"]["lows"]["needs"] == ["lq"]
        assert requests.get(spec, timeout=5).status_code == 401
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        watchdog.cancel()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("rewards: {nsss: {}}", ConfigError, "Did you mean: 'nss'"),
        ("evaluate: {}", InputError, "has no rewards"),
        ("rewards: {ll_score: {params: {checkpoint: nowhere}}}", ConfigError, "does not exist"),
    ],
)
def test_refuses_what_it_cannot_serve(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(error, match=message):
        run_judge_serve(tmp_path / "serve.yaml", "127.0.0.1", 0, "UNSET", [], LIMITS)
    with pytest.raises(InputError, match="holds no judge"):
        served_terms(tmp_path)


def test_beyond_loopback_it_wants_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "serve.yaml").write_text("rewards: {nss: {}}")
    for value, message in ((None, "is not set"), ("short", "has 5 characters, wanted at least 16")):
        monkeypatch.delenv("SOME_TOKEN", raising=False)
        if value:
            monkeypatch.setenv("SOME_TOKEN", value)
        with pytest.raises(InputError, match=message):
            run_judge_serve(tmp_path / "serve.yaml", "0.0.0.0", 0, "SOME_TOKEN", [], LIMITS)
    with pytest.raises(InputError, match="--max-items is 0"):
        run_judge_serve(tmp_path / "serve.yaml", "127.0.0.1", 0, "SOME_TOKEN", [], {**LIMITS, "max_items": 0})
    assert "judge.example" in allowed_hosts("0.0.0.0", ["judge.example"])
    assert set(served_terms(Path("rewards/embedded_judge/weights"))) == {"judge", "judge_hallucination"}
