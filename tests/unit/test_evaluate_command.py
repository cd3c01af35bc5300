"""`rlrestore evaluate` on a tiny run: it measures what the training measured, and leaves the run as it was."""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from envs.types import Task
from rlrestore.commands.evaluate import run_evaluate
from rlrestore.commands.train import run_train
from rlrestore.config.files import ConfigError
from rlrestore.evaluation.evaluate import caveats

CONFIG = """
run: {name: tiny, seed: 0, steps: 2}
env: {kind: photos, size: 16, recipe: mild}
restorer:
  {kind: embedded, weights: null, precision: float32, unshuffle: 2, groups: 4,
   mean_channels: [16, 16], flow_channels: [16, 32]}
algorithm: {kind: nft, beta: 0.1, times: 2}
rewards: {ssim_rgb: {weight: 1.0}}
evaluate: {tasks: 3, samples: 2, batch: 6, gold: {psnr_rgb: {}}}
rollout: {groups: 2, samples: 2, batch: 4}
sampling: {steps: 2, window: 1, window_range: [0, 1]}
engine: {kind: torch, lr: 1.0e-3, micro_batch: 4}
checkpoint: {every: 1, keep: 2}
placement: {kind: local}
log: {image_tasks: 2}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with tiny.yaml and runs/tiny, trained for two steps."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.yaml").write_text(CONFIG)
    run_train(folder / "tiny.yaml", [f"run.dir={folder / 'runs'}"])
    return folder


@pytest.fixture
def tiny(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def evaluate(folder: Path, *overrides: str, checkpoint: Path | None = None) -> dict:
    run_evaluate(folder / "tiny.yaml", [f"run.dir={folder / 'runs'}", *overrides], checkpoint)
    return json.loads((folder / "runs" / "tiny" / "result.json").read_text())


def digests(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def test_it_measures_what_training_measured_and_disturbs_nothing(tiny, capsys):
    run = tiny / "runs" / "tiny"
    before, trained = digests(run), json.loads((run / "result.json").read_text())
    capsys.readouterr()
    result = evaluate(tiny)
    assert result["metrics"] == trained["metrics"]  # same weights, same tasks, same noise: the same numbers
    for key in ("images", "wall_s", "efficiency", "seed", "versions"):
        assert result[key] == trained[key]
    assert result["images"] == 2 * 2 * 2  # steps, groups, samples
    assert set(result["stages_s"]) == set(trained["stages_s"]) | {"evaluate_base", "evaluate_tuned"}
    after = digests(run)
    grid = "samples/step_000002/evaluate_lq_base_tuned_gt.png"
    assert set(after) == set(before) | {grid}
    assert {name for name in before if before[name] != after[name]} == {"result.json", "report.html"}
    printed = capsys.readouterr().out
    assert "psnr_rgb (up)" in printed
    assert "too few for a bootstrap interval" in printed


def test_an_older_checkpoint_and_other_tasks(tiny):
    run = tiny / "runs" / "tiny"
    result = evaluate(tiny, "evaluate.tasks=2", checkpoint=run / "checkpoints" / "step_000001")
    assert result["images"] == 1 * 2 * 2
    assert result["metrics"]["psnr_rgb"]["n"] == 2
    assert set(result["stages_s"]) == {"evaluate_base", "evaluate_tuned"}  # the training's were of two steps
    assert result["wall_s"] > 0
    assert (run / "checkpoints" / "step_000002").is_dir()


def test_base_against_base_is_zero(tiny):
    """With the base's tensors in place of the EMA's, equal seeds give equal pictures: every difference is exactly 0."""
    checkpoint = tiny / "runs" / "tiny" / "checkpoints" / "step_000002"
    shutil.copy(checkpoint / "base.safetensors", checkpoint / "ema.safetensors")
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    by_path = {entry["path"]: entry for entry in manifest["files"]}
    by_path["ema.safetensors"] |= {key: by_path["base.safetensors"][key] for key in ("bytes", "sha256")}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    for row in evaluate(tiny, "evaluate.weights=ema")["metrics"].values():
        assert row["delta"] == 0
        assert row["ci95"] == [0, 0]


def test_what_cannot_be_evaluated_is_said(tiny):
    run = tiny / "runs" / "tiny"
    with pytest.raises(ConfigError, match=r"nothing.*train it first"):
        evaluate(tiny, "run.name=nothing")
    assert not (tiny / "runs" / "nothing").exists()
    with pytest.raises(ConfigError, match="was trained with sampling="):
        evaluate(tiny, "sampling.steps=3")
    with pytest.raises(ConfigError, match="is not a folder"):
        evaluate(tiny, checkpoint=run / "checkpoints" / "step_000009")
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use"):
            evaluate(tiny)
    metrics = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"no complete checkpoint.*rlrestore train"):
        evaluate(tiny)
    assert (run / "metrics.jsonl").read_bytes() == metrics  # `train` would start anew here; evaluate must not


def test_caveats_count_photos(tiny):
    def tasks(photos, crops):
        return [Task(f"photos/p{p}@{c}", None, ()) for p in range(photos) for c in range(crops)]

    assert caveats(tasks(10, 1)) == []
    crops = caveats(tasks(10, 2))
    assert len(crops) == 1
    assert "20 tasks are crops of 10 photos" in crops[0]
    assert "3 photos are too few" in caveats(tasks(3, 1))[0]
