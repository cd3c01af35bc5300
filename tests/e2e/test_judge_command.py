"""`rlrestore judge`: bench on a synthetic LL-Bench, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rewards.judges.leaderboard import leaderboard
from rewards.judges.report import Judgement
from rlrestore.cli import app
from tests.llbench_folder import write_bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("ll") / "bench", sources=6, outputs=4)


def test_bench_ranks_metrics_and_restorers(bench: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    arguments = ["judge", "bench", str(bench), "--output", str(target), "--metric", "niqe", "--metric", "low_frequency"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((target / "bench.json").read_text())
    assert result["metrics"]["niqe"]["quality"]["srcc"] > 0.3  # worse outputs are noisier; chance is 0
    # the checkered square has another mean than what it covers: low frequencies drift
    assert result["metrics"]["low_frequency"]["hallucination"]["auroc"] > 0.8
    assert {row["name"] for row in result["restorers"]} == {f"model{k}" for k in range(4)}
    assert "furthest from people" in (target / "bench.html").read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 64  # the folder exists


@pytest.mark.parametrize("metric", ["psnr_rgb", "no_such_metric"])
def test_bench_refuses(metric: str, bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["judge", "bench", str(bench), "--output", str(out), "--metric", metric])
    assert done.exit_code == 64 and not out.exists()


def test_leaderboard_is_bradley_terry() -> None:
    nan = np.full(3, np.nan)
    one = Judgement("s", "t", ("a", "b", "c"), nan, np.array([3.0, 2.0, 1.0]), nan, np.array([1.0, 0.0, np.nan]))
    rows = leaderboard([one])
    # a > b > c once each, half a win of prior: 0.7563, 0, -0.7563
    assert [row.name for row in rows] == ["a", "b", "c"] and rows[0].score == pytest.approx(0.7563, abs=1e-4)
    assert rows[0].hallucination_rate == 1 and rows[1].comparisons == 2 and rows[0].low == rows[0].high
