"""Checkpoints under damage and kills: what `find_latest` returns is always whole."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlrestore.checkpoint import (
    MANIFEST,
    CheckpointError,
    checkpoint_path,
    checkpoints_dir,
    find_latest,
    load_tensors,
    new_checkpoint,
    read_json,
    remove_stale,
    retain,
    save_tensors,
    set_aside,
    verify,
    write_json_atomic,
)

ROOT = Path(__file__).parents[2]


def write(run_dir: Path, step: int, meta: dict | None = None) -> Path:
    with new_checkpoint(run_dir, step, meta) as tmp:
        (tmp / "state").mkdir()
        (tmp / "state" / "weights.bin").write_bytes(bytes(range(256)) * (step % 7 + 1))
        (tmp / "scalars.json").write_text(json.dumps({"step": step}))
    return checkpoint_path(run_dir, step)


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in checkpoints_dir(run_dir).iterdir())


def test_what_is_written_is_what_is_verified(tmp_path):
    path = write(tmp_path, 120, {"world_size": 2})
    assert path == tmp_path / "checkpoints" / "step_000120"
    manifest = verify(path)
    assert manifest.step == 120
    assert manifest.meta == {"world_size": 2}
    assert [(f.path, f.bytes) for f in manifest.files] == [("scalars.json", 13), ("state/weights.bin", 512)]
    # sha256 of b'{"step": 120}', from sha256sum
    assert manifest.files[0].sha256 == "886213fa78e374e38b1705f610776df6b9ad01cc6468068373479d972044af94"
    assert find_latest(tmp_path) == (path, [])
    assert names(tmp_path) == ["step_000120"]


def test_meta_may_be_filled_inside_the_block(tmp_path):
    meta: dict[str, object] = {}
    with new_checkpoint(tmp_path, 1, meta) as tmp:
        (tmp / "a").write_text("a")
        meta["loss_scale"] = 2.0
    assert verify(checkpoint_path(tmp_path, 1)).meta == {"loss_scale": 2.0}


def test_no_run_has_no_checkpoint(tmp_path):
    assert find_latest(tmp_path / "absent") == (None, [])
    assert retain(tmp_path / "absent", 1) == []
    assert remove_stale(tmp_path / "absent") == []


# ---- damage


def truncate(path: Path) -> Path:
    file = path / "state" / "weights.bin"
    file.write_bytes(file.read_bytes()[:-1])
    return file


def flip_bit(path: Path) -> Path:
    file = path / "state" / "weights.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    return file


def delete_file(path: Path) -> Path:
    (path / "scalars.json").unlink()
    return path / "scalars.json"


def delete_manifest(path: Path) -> Path:
    (path / MANIFEST).unlink()
    return path / MANIFEST


def cut_manifest(path: Path) -> Path:
    file = path / MANIFEST
    file.write_text(file.read_text()[:-20])
    return file


def other_schema(path: Path) -> Path:
    file = path / MANIFEST
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 99'))
    return file


def escape(path: Path) -> Path:
    file = path / MANIFEST
    file.write_text(file.read_text().replace("scalars.json", "../../secret"))
    return file


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "has 1279 bytes, not the 1280"),
        (flip_bit, "sha256"),
        (delete_file, "not there"),
        (delete_manifest, "missing"),
        (cut_manifest, "cannot be read"),
        (other_schema, "schema 99"),
        (escape, "outside"),
    ],
)
def test_damage_is_named_and_the_step_before_is_found(tmp_path, damage, message):
    good, bad = write(tmp_path, 100), write(tmp_path, 200)
    file = damage(bad)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(bad)
    assert caught.value.file == file
    latest, rejected = find_latest(tmp_path)
    assert latest == good
    assert [r.path for r in rejected] == [bad]
    assert str(file) in rejected[0].reason


def test_a_renamed_folder_is_not_the_step_it_says(tmp_path):
    good, later = write(tmp_path, 100), write(tmp_path, 50)
    later.rename(checkpoint_path(tmp_path, 200))
    latest, rejected = find_latest(tmp_path)
    assert latest == good
    assert "holds step 50" in rejected[0].reason


def test_all_damaged_is_none_with_all_reasons(tmp_path):
    for step in (1, 2):
        flip_bit(write(tmp_path, step))
    latest, rejected = find_latest(tmp_path)
    assert latest is None
    assert [r.path.name for r in rejected] == ["step_000002", "step_000001"]


# ---- failures while writing


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    write(tmp_path, 1)

    def fail() -> None:
        with new_checkpoint(tmp_path, 2) as tmp:
            (tmp / "half").write_text("x")
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        fail()
    assert names(tmp_path) == ["step_000001"]


def test_empty_and_linked_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="empty"), new_checkpoint(tmp_path, 1):
        pass
    with pytest.raises(CheckpointError, match="link"), new_checkpoint(tmp_path, 1) as tmp:
        (tmp / "weights").symlink_to("/etc/hostname")
    nan = {"loss": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"), new_checkpoint(tmp_path, 1, nan) as tmp:
        (tmp / "a").write_text("a")
    assert names(tmp_path) == []


KILLED = """
import os, pathlib, sys
from rlrestore import checkpoint
point, run_dir = sys.argv[1], sys.argv[2]
real_rename, real_fsync, calls = pathlib.Path.rename, checkpoint._fsync, []

def rename(self, target):
    if point == "before rename" or (point == "between renames" and calls):
        os._exit(9)
    calls.append(target)
    return real_rename(self, target)

pathlib.Path.rename = rename
if point == "at fsync":
    checkpoint._fsync = lambda path: os._exit(9)
if point == "at manifest":
    checkpoint.write_json_atomic = lambda path, value: os._exit(9)
with checkpoint.new_checkpoint(run_dir, 200) as tmp:
    (tmp / "weights.bin").write_bytes(b"new" * 1000)
    if point == "in block":
        os._exit(9)
"""


def run_python(code: str, *arguments: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment).returncode


@pytest.mark.parametrize(
    ("point", "exists"),
    [
        *itertools.product(("in block", "at fsync", "at manifest", "before rename"), (False, True)),
        ("between renames", True),
    ],
)
def test_a_kill_at_any_phase_loses_no_earlier_checkpoint(tmp_path, point, exists):
    good = write(tmp_path, 100)
    if exists:
        write(tmp_path, 200)
    assert run_python(KILLED, point, str(tmp_path)) == 9
    assert any(name.startswith(".tmp-") for name in names(tmp_path))
    assert len(remove_stale(tmp_path)) == (2 if point == "between renames" else 1)
    latest, rejected = find_latest(tmp_path)
    assert rejected == []
    assert latest == (checkpoint_path(tmp_path, 200) if exists and point != "between renames" else good)
    write(tmp_path, 200)  # and the run goes on
    assert names(tmp_path) == ["step_000100", "step_000200"]


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    flip_bit(write(tmp_path, 5))
    write(tmp_path, 5, {"again": True})
    assert verify(checkpoint_path(tmp_path, 5)).meta == {"again": True}
    assert names(tmp_path) == ["step_000005"]


# ---- retention


def test_retain_keeps_the_last_and_the_pinned(tmp_path):
    for step in (10, 20, 30, 40, 1_000_000):
        write(tmp_path, step)
    deleted = retain(tmp_path, keep_last=2, pinned=[10])
    assert [p.name for p in deleted] == ["step_000020", "step_000030"]
    assert names(tmp_path) == ["step_000010", "step_000040", "step_1000000"]
    assert retain(tmp_path, keep_last=5) == []
    with pytest.raises(ValueError, match="at least 1"):
        retain(tmp_path, keep_last=0)


def test_incomplete_folders_do_not_push_out_complete_ones(tmp_path):
    write(tmp_path, 1)
    delete_manifest(write(tmp_path, 2))
    assert retain(tmp_path, keep_last=1) == []
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_resume_sets_later_steps_aside(tmp_path):
    # 20 is damaged: the run resumes at 10, and keep_last=1 must then keep 15, not 20
    write(tmp_path, 10)
    flip_bit(write(tmp_path, 20))
    (moved,) = set_aside(tmp_path, after_step=10)
    assert moved.name.startswith("aside_step_000020-")
    write(tmp_path, 15)
    assert [p.name for p in retain(tmp_path, keep_last=1)] == ["step_000010"]
    assert find_latest(tmp_path) == (checkpoint_path(tmp_path, 15), [])


# ---- tensors and JSON


def test_tensors_come_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "plain": base,
        "shared": base[1:],
        "transposed": base.t(),
        "bf16": base.bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "rng": torch.get_rng_state(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "grad": torch.nn.Parameter(base.clone()),
    }
    save_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"format": "pt"})
    loaded = load_tensors(tmp_path / "deep" / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        expected = tensor.detach().contiguous().view(-1)
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), expected.view(torch.uint8))


def test_a_cut_tensor_file_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"a": torch.zeros(100)})
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_tensors(file)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        load_tensors(tmp_path / "absent.safetensors")


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "run.json"
    write_json_atomic(file, {"b": [1, 2.5], "a": None})
    assert read_json(file) == {"a": None, "b": [1, 2.5]}
    for unwritable in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json_atomic(file, unwritable)
    assert read_json(file) == {"a": None, "b": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_json(file)


def test_reading_a_manifest_does_not_import_torch():
    assert run_python("import sys, rlrestore.checkpoint; sys.exit('torch' in sys.modules)") == 0
