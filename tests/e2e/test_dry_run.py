"""`train --dry-run` says what would happen, and makes nothing happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_stop import USAGE, run_cli
from tests.tiny import write_tiny


def test_it_prints_the_plan_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tiny: 4 tasks x 4 samples = 16 rollouts in chunks of 4. Two ranks: 2 chunks each, 8 rollouts = 2 micro-batches of 4, at the
    2 recorded steps. 16 images of 3 x 32 x 32 bytes are 49,152 bytes. One node takes the ranks, the reward worker the other."""
    config = write_tiny(tmp_path, "grpo")
    before = sorted(tmp_path.rglob("*"))
    overrides = ["placement.kind=colocated", "placement.ranks=2", "placement.rank_cpus=2", "ray.address=auto"]
    assert run_cli("train", config, *overrides, "--dry-run", "--nodes", "2x4c") == 0
    out = capsys.readouterr().out
    for line in (
        "trainer ranks        2  2 CPU; pack",
        "reward workers       1  1 CPU; spread",
        "together             3  5 CPU",
        "node0 (4 CPU): 2 trainer ranks",
        "node1 (4 CPU): 1 reward workers",
        "rollouts         4 tasks x 4 samples = 16, 4 network evaluations each",
        "sampling         4 chunks of 4 over 2 sampler(s): at most 2 each",
        "training         8 rollouts a rank = 2 micro-batches of 4 x 2 points, 1 optimiser step(s)",
        "images           32x32 px, 0.0492 MB of uint8 to the reward workers",
        "memory a rank, without activations",
        "peak ",
        "ray start --address=HEAD:6379",
        f"rlrestore train {config} placement.kind=colocated placement.ranks=2",
        "nothing was started or written",
    ):
        assert line in out, f"{line}\n{out}"
    assert sorted(tmp_path.rglob("*")) == before


def test_nodes_that_are_too_small_are_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path, "grpo")
    overrides = ["placement.kind=colocated", "placement.ranks=2", "placement.gpus=true"]
    assert run_cli("train", config, *overrides, "--dry-run", "--nodes", "2x4c") == USAGE
    assert capsys.readouterr().err.strip() == "error: 2 GPU too few for 2 of 2 trainer ranks"
    assert run_cli("train", config, *overrides, "--dry-run", "--nodes", "many") == USAGE
    assert "error: --nodes 'many': write COUNTxCPUSc[GPUSg]" in capsys.readouterr().err
