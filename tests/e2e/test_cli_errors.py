"""What a user gets wrong: one line that says what to do, exit code 64, and nothing left behind.

The commands run in this process: what is tested is the command line's own function, with its exit.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlrestore.cli import app
from rlrestore.config.files import layers, read_yaml
from tests.tiny import write_tiny

USAGE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    write_tiny(folder, "nft")
    write_tiny(folder, "grpo")
    return folder


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The only line on stderr of a command that the user got wrong."""
    capsys.readouterr()
    code = run_cli(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == USAGE, lines
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def assert_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, config: Path, overrides: list[str], words: list[str]
):
    before = sorted(folder.rglob("*"))
    try:
        line = error_line(capsys, "train", config, *overrides)
        for word in words:
            assert word in line, line
        assert sorted(folder.rglob("*")) == before, "a refused command must leave nothing behind"
    finally:  # what was not refused must not reach the next test
        shutil.rmtree(folder / "runs", ignore_errors=True)


# -- keys, kinds, overrides ------------------------------------------------------------------------------------------

MISSPELT = {
    "rolout.groups=2": ["rolout", "Did you mean 'rollout'?"],
    "rollout.sampels=2": ["rollout.sampels", "Did you mean 'samples'?"],
    "algorithm.bta=1": ["algorithm.bta", "Did you mean 'beta'?"],
    "algorithm.kind=nfft": ["algorithm.kind 'nfft'", "Did you mean 'nft'?", "grpo"],
    "env.kind=photo": ["env.kind 'photo'", "Did you mean 'photos'?"],
    "restorer.kind=embeded": ["restorer.kind", "Did you mean 'embedded'?"],
    "engine.kind=deepsped": ["engine.kind=deepsped", "deepspeed, torch"],
    "placement.kind=cluster": ["placement.kind=cluster", "colocated, local, separate"],
    "sampling.sampler=dpm": ["sampling.sampler=dpm", "cps"],
    "rewards.ssim_rgb.wieght=2": ["rewards.ssim_rgb.wieght", "Did you mean 'weight'?"],
    "rewards.ssim_rbg.weight=2": ["rewards.ssim_rbg", "Did you mean: 'ssim_rgb'?"],
    "rewards.low_frequency.params.sigma_x=2": ["rewards.low_frequency", "sigma_x"],
    "run.steps=many": ["run", "steps", "many"],
    "run.steps": ["'run.steps' is not key=value"],
    "algorithm.kind=null": ["algorithm.kind is missing", "grpo,", "nft,"],
    "run.name=a/b": ["run.name 'a/b'", "plain folder name"],
}


@pytest.mark.parametrize("override", MISSPELT)
def test_misspelt(capsys: pytest.CaptureFixture[str], folder: Path, override: str) -> None:
    assert_refused(capsys, folder, folder / "tiny_nft.yaml", [override], MISSPELT[override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {name: x", ["broken.yaml", "line 1"]),
        ("- a\n- b\n", ["broken.yaml", "sections"]),
        ("run: {name: '${oc.env:HOME}'}", ["broken.yaml", "oc.env"]),  # it would copy secrets into the run folder
        ("base: none.yaml", ["broken.yaml", "base 'none.yaml' does not exist"]),
        ("base: broken.yaml", ["broken.yaml", "leads back to itself"]),
    ],
)
def test_broken_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    assert_refused(capsys, tmp_path, tmp_path / "broken.yaml", [], words)


def test_a_config_on_a_base_says_what_differs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "paired.yaml").write_text(
        f"base: {os.path.relpath(folder / 'tiny_nft.yaml', tmp_path)}\nenv: {{kind: paired, folder: x}}\nalgorithm: {{beta: 0.5}}\n"
    )
    data = read_yaml(tmp_path / "paired.yaml", ["run.steps=9"])
    below = read_yaml(folder / "tiny_nft.yaml")
    assert "base" not in data and data["env"] == {"kind": "paired", "folder": "x"}  # another kind: none of its keys
    assert data["algorithm"] == {**below["algorithm"], "beta": 0.5}
    assert data["run"] == {**below["run"], "steps": 9} and data["rewards"] == below["rewards"]


def test_an_override_of_a_kind_leaves_the_other_kinds_keys_behind(tmp_path: Path) -> None:
    (path := tmp_path / "own.yaml").write_text(
        "algorithm: {kind: nft, beta: 0.5}\nengine: {kind: deepspeed, lr: 1.0e-3}\n"
    )
    data = read_yaml(path, ["algorithm.kind=grpo", "algorithm.updates=2", "engine.kind=torch"])
    assert data == {"algorithm": {"kind": "grpo", "updates": 2}, "engine": {"kind": "torch", "lr": 1.0e-3}}
    assert read_yaml(path, ["algorithm.kind=nft"])["algorithm"] == {"kind": "nft", "beta": 0.5}
    assert dict(layers(path, ["algorithm.kind=grpo"]))[str(path)] == {"engine.kind", "engine.lr"}
    assert "algorithm.beta" in dict(layers(path, ["algorithm.kind=nft"]))[str(path)]


def test_null_drops_a_term_and_never_adds_one(folder: Path, tmp_path: Path) -> None:
    base = os.path.relpath(folder / "tiny_nft.yaml", tmp_path)
    (tmp_path / "less.yaml").write_text(f"base: {base}\nrewards: {{ssim_rgb: null, niqe: null, psnr_rgb: {{}}}}\n")
    below = read_yaml(folder / "tiny_nft.yaml")["rewards"]
    assert "ssim_rgb" in below and "niqe" not in below
    assert set(read_yaml(tmp_path / "less.yaml")["rewards"]) == (set(below) | {"psnr_rgb"}) - {"ssim_rgb"}


def test_missing_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert_refused(capsys, tmp_path, tmp_path / "none.yaml", [], ["none.yaml does not exist", "configs/"])


# -- combinations that cannot work -----------------------------------------------------------------------------------

# The tiny run: 4 groups of 4 rollouts in batches of 4, micro-batches of 4, one rank.
IMPOSSIBLE = {
    "sampling.sampler=ode": ["grpo needs stochastic steps", "sampling.sampler=cps"],
    "sampling.window_range=[0,4]": ["reaches step 3", "[0, 3]"],
    "sampling.window=4": ["sampling.window=4", "[0, 3] of 4 steps"],
    "sampling.level=0": ["sampling.level=0", "level > 0"],
    "rollout.batch=5": ["= 16 does not divide", "rollout.batch=5"],
    "rollout.samples=1": ["rollout.samples=1", "at least 2"],
    "engine.micro_batch=3": ["engine.micro_batch=3 does not divide rollout.batch=4"],
    "algorithm.updates=5": ["algorithm.updates=5", "only 4 micro-batches"],
    "placement.ranks=2": ["placement.kind=local", "placement.ranks=2", "colocated or separate"],
    "placement.kind=colocated placement.ranks=3": ["4 batches", "placement.ranks=3"],
    "engine.precision=bfloat16": ["engine.kind=deepspeed", "engine.zero >= 1"],
    "engine.kind=deepspeed engine.zero=4": ["engine.zero=4", "0, 1, 2, 3"],
    "env.size=33": ["33", "size"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", IMPOSSIBLE)
def test_impossible(capsys: pytest.CaptureFixture[str], folder: Path, overrides: str) -> None:
    assert_refused(capsys, folder, folder / "tiny_grpo.yaml", overrides.split(), IMPOSSIBLE[overrides])


# Numbers that no reader of the config may find out about in the middle of a run.
SENSELESS = {
    "nft": [
        "algorithm.beta=0", "algorithm.old_decay=9", "algorithm.times=0", "algorithm.t_range=[0.5,1.5]", "algorithm.updates=0",
        "checkpoint.keep=0", "checkpoint.every=-1", "credit.clamp=0", "engine.betas=[1.5,0.9]", "engine.ema=1.5",
        "engine.grad_clip=-1", "engine.lr=-1", "evaluate.batch=0", "log.image_tasks=0", "reward_budget.max_fraction=2",
        "rewards.ssim_rgb.scale=0", "rewards.ssim_rgb.timeout_s=0", "rewards.ssim_rgb.weight=-1", "run.seed=-1",
        "sampling.shift=0", "restorer.precision=float16",
    ],
    "grpo": ["algorithm.clip_range=0", "algorithm.clip_range=1", "algorithm.kl_beta=-1", "sampling.level=1.5"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "override"), [(name, item) for name, items in SENSELESS.items() for item in items]
)
def test_senseless(capsys: pytest.CaptureFixture[str], folder: Path, algorithm: str, override: str) -> None:
    key = override.split("=")[0].split(".")[-1]
    assert_refused(capsys, folder, folder / f"tiny_{algorithm}.yaml", [override], [key])


# -- files and folders ---------------------------------------------------------------------------------------------


def save_photo(path: Path, seed: int = 0) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)


def test_missing_photo_folder(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    overrides = ["env.folder=/no/such/folder"]
    words = ["/no/such/folder is not a folder", "create it"]
    assert_refused(capsys, folder, folder / "tiny_nft.yaml", overrides, words)


def test_empty_photo_folder(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    assert_refused(capsys, folder, folder / "tiny_nft.yaml", [f"env.folder={tmp_path}"], ["holds no images", ".jpg"])


def test_missing_weights(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    overrides = ["restorer.weights=/no/such/weights"]
    assert_refused(capsys, folder, folder / "tiny_nft.yaml", overrides, ["/no/such/weights/config.json", "finetune"])


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_corrupt_weights(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, damage: str) -> None:
    for name in ("config.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / "weights" / name).read_bytes())
    whole = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"{}" * 99)
    assert_refused(capsys, folder, folder / "tiny_nft.yaml", [f"restorer.weights={tmp_path}"], ["weights.safetensors"])


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_corrupt_photo(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, damage: str) -> None:
    for index in range(3):
        save_photo(tmp_path / f"{index}.jpg", index)
    bad = tmp_path / "1.jpg"
    whole = bad.read_bytes()
    bad.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"no photo" * 500, "empty": b""}[damage])
    assert_refused(
        capsys, folder, folder / "tiny_nft.yaml", [f"env.folder={tmp_path}"], ["1.jpg", "remove or replace it"]
    )


def test_reference_metrics_without_references(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    for index in range(8):
        save_photo(tmp_path / f"{index}.png", index)
    text = (folder / "tiny_nft.yaml").read_text()
    photos = next(line for line in text.splitlines() if line.startswith("env:"))
    paired = f"env: {{kind: paired, lq_dir: {tmp_path}, size: 32, held_out_fraction: 0.5}}"
    (tmp_path / "paired.yaml").write_text(text.replace(photos, paired))
    assert_refused(capsys, folder, tmp_path / "paired.yaml", [], ["ssim_rgb", "reference", "remove the metric"])


@pytest.mark.parametrize("place", ["a_file", "/proc"])
def test_no_write_permission(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, place: str) -> None:
    """Root may write nearly everywhere; below a file and in /proc nobody can."""
    (tmp_path / "a_file").write_text("")
    where = tmp_path / place / "runs"  # tmp_path / "/proc" is /proc
    assert_refused(
        capsys, folder, folder / "tiny_nft.yaml", [f"run.dir={where}"], [f"cannot write to {where}", "run.dir"]
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_read_only_folder(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        overrides = [f"run.dir={tmp_path / 'runs'}"]
        assert_refused(capsys, folder, folder / "tiny_nft.yaml", overrides, ["cannot write to", "run.dir"])
    finally:
        tmp_path.chmod(0o700)


def test_resume_from_what_is_no_checkpoint(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    config = folder / "tiny_nft.yaml"
    assert_refused(capsys, folder, config, [f"run.resume={tmp_path}"], ["run.resume", "MANIFEST.json is missing"])
    assert_refused(capsys, folder, config, ["run.resume=/no/such"], ["run.resume", "/no/such", "auto, never"])


def test_a_run_that_is_there_is_not_replaced(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / ".lock").touch()
    overrides = [f"run.dir={tmp_path}", "run.resume=never"]
    assert_refused(capsys, tmp_path, folder / "tiny_nft.yaml", overrides, ["exists", "run.overwrite=true"])
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_in_use_is_refused(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "tiny").mkdir()
    with (tmp_path / "tiny" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(
            capsys, tmp_path, folder / "tiny_nft.yaml", [f"run.dir={tmp_path}"], ["in use by another process"]
        )


def test_finetune_says_it_as_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "finetune.yaml"
    config.write_text(f"run: {{name: f, dir: {tmp_path}/runs}}\nenv: {{kind: photos}}\nrestorer: {{kind: embedded}}\n")
    assert "Did you mean 'optimiser'?" in error_line(capsys, "finetune", config, "optimizer.lr=1")
    assert not (tmp_path / "runs").exists()
