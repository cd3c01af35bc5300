"""`rlrestore finetune` on real photographs, in seconds: it learns, resumes bit for bit, and trains what it is told to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlrestore.cli import app
from rlrestore.reporting.log import read_metrics

CONFIG = """
run: {{name: tiny, dir: {folder}/runs, seed: 0, steps: 6}}
env: {{kind: photos, size: 32, recipe: mild}}
restorer:
  {{kind: embedded, weights: null, precision: float32, unshuffle: 2, mean_channels: [16, 16], flow_channels: [16, 16], groups: 4}}
optimiser: {{batch: 2, lr: 1.0e-3, warmup: 2, decay: 2, threads: 1, data_workers: 0}}
evaluate: {{every: 6, tasks: 1, samples: 2, steps: 2}}
checkpoint: {{every: 3, keep: 2}}
"""


def finetune(folder: Path, *overrides: str) -> Path:
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    with pytest.raises(SystemExit) as stop:
        app(["finetune", str(folder / "tiny.yaml"), *overrides])
    assert not stop.value.code
    return folder / "runs" / "tiny"


def checkpoint_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step:06d}"
    return {
        f"{file}.{name}": value
        for file in ("parameters", "ema", "optimiser")
        for name, value in load_file(folder / f"{file}.safetensors").items()
    }


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    run = finetune(tmp_path)
    straight, metrics = checkpoint_tensors(run, 6), read_metrics(run / "metrics.jsonl")
    first = checkpoint_tensors(run, 3)
    moved = [name for name, value in straight.items() if name.startswith("parameters") and not value.equal(first[name])]
    assert any(".mean." in name for name in moved) and any("denoiser" in name for name in moved)
    assert metrics[-1]["eval/psnr_rgb/mean_of_samples"] > 10  # a picture, not noise
    shutil.rmtree(run / "checkpoints" / "step_000006")
    finetune(tmp_path)
    resumed = checkpoint_tensors(run, 6)
    assert straight.keys() == resumed.keys()
    assert [name for name, value in straight.items() if not value.equal(resumed[name])] == []


def test_one_network_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = load_file(finetune(tmp_path, "run.steps=3") / "weights" / "weights.safetensors")
    start = tmp_path / "start"
    shutil.copytree(tmp_path / "runs" / "tiny" / "weights", start)
    run = finetune(tmp_path, "run.steps=3", "run.name=tiny", "run.resume=never", "run.overwrite=true",
                   f"restorer.weights={start}", "optimiser.modules=[mean]")  # fmt: skip
    after = load_file(run / "weights" / "weights.safetensors")
    moved = {name for name, value in both.items() if not value.equal(after[name])}
    assert moved and all(name.startswith("mean.") for name in moved)
    with pytest.raises(SystemExit) as stop:
        app(["finetune", str(tmp_path / "tiny.yaml"), "run.name=other", "optimiser.modules=[vae]"])
    assert stop.value.code
    assert "optimiser.modules: this restorer has ['denoiser', 'mean'], not ['vae']" in capsys.readouterr().err
