"""A tiny Kontext with LoRA through whole runs on Ray: both placements, ZeRO-2 and ZeRO-3, whole weights as well.

The program that a user starts, with its checkpoints, evaluation and export; minutes on a loaded machine, hence slow.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlrestore.reporting.log import read_metrics
from tests.tiny import train_tiny
from tests.tiny_pipelines import family_config

IDENTITY = 1e-5
DEEPSPEED = ["engine.kind=deepspeed", "engine.partition_threshold=0"]
BATCHES = ["rollout.batch=2", "engine.micro_batch=2", "placement.threads=1", "run.steps=2"]
CASES = {
    "colocated_zero2": ["placement.kind=colocated", "placement.ranks=2", *DEEPSPEED, "engine.zero=2"],
    "colocated_zero3": ["placement.kind=colocated", "placement.ranks=2", *DEEPSPEED, "engine.zero=3"],
    "separate": ["placement.kind=separate", "placement.ranks=1"],
    "separate_zero3": ["placement.kind=separate", "placement.ranks=2", *DEEPSPEED, "engine.zero=3"],
    "separate_whole_bf16": [
        "placement.kind=separate", "placement.ranks=1", *DEEPSPEED, "engine.zero=2", "engine.precision=bfloat16",
        "restorer.lora_rank=0", "restorer.precision=bfloat16", "engine.trainable=['attn']",
    ],
}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_a_whole_run(case: str, tmp_path: Path) -> None:
    config = family_config(tmp_path, "flux_kontext", "grpo", [*BATCHES, *CASES[case]])
    run, table = train_tiny(config)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "policy/ratio_deviation_max_on_policy" in row]
    assert len(rows) == 2
    assert max(row["policy/ratio_deviation_max_on_policy"] for row in rows) < IDENTITY
    assert all(row["train/grad_norm"] > 0 and row["sync/unchanged"] == 0 for row in rows)
    assert table["ssim_rgb"].base != table["ssim_rgb"].tuned
    (checkpoint,) = [folder for folder in (run / "checkpoints").iterdir() if folder.name.startswith("step_")]
    saved = load_file(checkpoint / "restorer" / "weights.safetensors")
    assert saved and all(value.numel() and value.abs().sum() > 0 for name, value in saved.items() if ".lora_B." in name)


def test_an_update_that_changes_nothing_is_reported(tmp_path: Path) -> None:
    # no group spreads so much: all are dropped, and no step is taken
    config = family_config(tmp_path, "flux_kontext", "grpo", [*BATCHES, *CASES["separate"], "credit.min_spread=1e9"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run, _ = train_tiny(config)
    assert any("changed no published weight" in str(item.message) for item in caught)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "sync/unchanged" in row]
    assert rows[-1]["sync/unchanged"] >= 1
