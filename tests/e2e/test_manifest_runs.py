"""`train` and `finetune` on one data set in four containers: the same batches, hence the same weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlrestore.checkpoint import load_tensors
from rlrestore.commands.finetune import run_finetune
from rlrestore.commands.train import run_train
from rlrestore.config.files import ConfigError
from tests.tiny import write_tiny
from tests.unit.test_manifest import NAMES, pack, picture, row_of, save


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    for seed, name in enumerate(NAMES):
        save(root / row_of(name)["gt"], picture(seed))
        noisy = picture(seed) + np.random.default_rng(seed).normal(0, 12, (64, 80, 3))
        save(root / row_of(name)["lq"], np.array(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))
    return root


def env_line(kind: str, tree: Path, out: Path, per_step: int) -> str:
    source, root = (tree, None) if kind == "folder" else pack(kind, tree, out)
    more = f", root: {root}" if root else ""
    return (
        f"env: {{kind: manifest, source: {source}{more}, size: 32, held_out_fraction: 0.3, per_step: {per_step}, "
        f"balance: {{haze: 2.0, rain: 1.0, snow: 1.0}}, cache: {out}/cache}}"
    )


def with_env(path: Path, line: str) -> Path:
    path.write_text("\n".join(line if old.startswith("env:") else old for old in path.read_text().splitlines()) + "\n")
    return path


def scalars(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time", "throughput/"))} for row in rows]


def test_training_does_not_see_the_container(tree: Path, tmp_path: Path) -> None:
    runs = {}
    for kind in ("folder", "jsonl", "tar", "parquet images"):
        out = tmp_path / kind.replace(" ", "_")
        out.mkdir()
        run_train(with_env(write_tiny(out), env_line(kind, tree, out, per_step=4)), [])
        runs[kind] = scalars(out / "runs" / "tiny")
    assert len(runs["folder"]) >= 2
    assert all(found == runs["folder"] for found in runs.values()), "another container, other batches"


def test_finetuning_does_not_see_the_container(tree: Path, tmp_path: Path) -> None:
    weights = {}
    for kind in ("folder", "jsonl", "tar", "parquet images"):
        out = tmp_path / kind.replace(" ", "_")
        out.mkdir()
        write_tiny(out)
        config = out / "finetune.yaml"
        config.write_text(
            f"run: {{name: f, dir: {out}/runs, steps: 3}}\n{env_line(kind, tree, out, per_step=4)}\n"
            f"restorer: {{kind: embedded, weights: {out}/weights, precision: float32}}\n"
            "optimiser: {batch: 4, warmup: 1, decay: 1, data_workers: 2}\nevaluate: {every: 3, tasks: 2, samples: 2, steps: 2}\n"
        )
        run_finetune(config, [])
        weights[kind] = load_tensors(out / "runs" / "f" / "weights" / "weights.safetensors")
    for kind, found in weights.items():
        assert all(bool((found[key] == value).all()) for key, value in weights["folder"].items()), kind


def test_too_few_tasks_a_step_are_refused_before_anything_is_written(tree: Path, tmp_path: Path) -> None:
    line = env_line("folder", tree, tmp_path, per_step=2)
    with pytest.raises(ConfigError, match=r"env\.per_step=2 .* set env\.per_step to the tasks of a step"):
        run_train(with_env(write_tiny(tmp_path), line), [])
    config = tmp_path / "finetune.yaml"
    config.write_text(
        f"run: {{name: f, dir: {tmp_path}/runs, steps: 3}}\n{line}\nrestorer: {{kind: embedded}}\noptimiser: {{batch: 4}}\n"
    )
    with pytest.raises(ConfigError, match=r"env\.per_step=2"):
        run_finetune(config, [])
    assert not (tmp_path / "runs").exists()
