"""`rlrestore data check` and `show` on a data set with planted faults, each of which has to be found, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs.audit import near_pairs, twins
from envs.index import open_index
from envs.manifest import ManifestConfig, ManifestEnv
from rlrestore.cli import app
from tests.unit.test_manifest import NAMES, pack, picture, row_of, save


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for seed, name in enumerate(NAMES):
        save(root / row_of(name)["gt"], picture(seed))
        save(root / row_of(name)["lq"], picture(seed) // 2 + 20)
    return root


def run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_check_finds_what_was_planted(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def put(name: str, lq: np.ndarray, gt: np.ndarray) -> None:
        save(tree / row_of(name)["lq"], lq)
        save(tree / row_of(name)["gt"], gt)

    data = (tree / row_of("haze/001")["lq"]).read_bytes()
    (tree / row_of("haze/001")["lq"]).write_bytes(data[: len(data) // 2])
    put("haze/002", picture(2, 60, 80), picture(2))
    put("rain/003", picture(103), picture(203))
    put("rain/004", picture(14), picture(14))
    put("snow/005", picture(0) // 3, picture(0) - picture(0) // 8)  # haze/000 again, darker
    (tree / "snow" / "LQ" / "extra.png").write_bytes(data)
    out = tmp_path / "clean.jsonl"
    run("data", "check", tree, "--out", out, "--workers", 2)
    lines = Path(f"{out}.findings.jsonl").read_text().splitlines()
    found = {item.get("id", item.get("row")): item for item in map(json.loads, lines)}
    assert {name: item.get("code") for name, item in found.items()} == {
        "haze/001": "unreadable", "haze/002": "size", "rain/003": "different", "rain/004": "identical",
        "snow/005": "duplicate", "snow/extra": None,
    }  # fmt: skip
    assert found["snow/005"]["reason"] == "shows the same as haze/000"
    assert "001.png" in found["haze/001"]["reason"]
    clean = open_index(out, tree, tmp_path / "cache")
    assert not clean.bad
    assert [row.id for row in clean] == [name for name in NAMES if name not in found]
    assert all(len(row.sha256_lq) == len(row.sha256_gt) == 64 for row in clean)
    printed = capsys.readouterr().out
    assert "env.kind=manifest" in printed
    assert printed.splitlines()[1].split() == ["haze", "10", "1", "0", "1", "0", "0", "0", "0", "8"]
    with pytest.raises(SystemExit, match="64"):
        run("data", "check", tree, "--out", out)
    assert "--overwrite" in capsys.readouterr().err


def test_files_that_were_replaced_are_noticed(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "clean.jsonl"
    run("data", "check", tree, "--out", out, "--workers", 1)
    victim = tree / row_of("haze/001")["gt"]
    save(victim, picture(1) ^ 1)  # looks the same
    again = tmp_path / "again.jsonl"
    run("data", "check", out, "--root", tree, "--out", again, "--workers", 1)
    (finding,) = map(json.loads, Path(f"{again}.findings.jsonl").read_text().splitlines())
    assert (finding["id"], finding["code"]) == ("haze/001", "changed")
    for verify, quarantined in ((False, 0), (True, 1)):
        config = ManifestConfig(
            str(out), str(tree), size=48, held_out_fraction=0.3, per_step=10, verify=verify, cache=str(tmp_path / "c")
        )
        env = ManifestEnv(config)
        assert "haze/001" not in {env.index[row].id for row in env.held_out_rows}
        [env.draw(step, 10) for step in range(3)]
        assert len(env.quarantined) == quarantined
        assert all("another sha256" in reason for reason in env.quarantined.values())


def test_a_clean_manifest_of_shards_opens_the_same_images(tree: Path, tmp_path: Path) -> None:
    source, _ = pack("tar", tree, tmp_path)
    run("data", "check", source, "--out", tmp_path / "clean.jsonl", "--workers", 1)
    clean, shards = (
        open_index(tmp_path / "clean.jsonl", source, tmp_path / "c"),
        open_index(source, None, tmp_path / "c"),
    )
    assert [(row.id, row.lq, row.gt) for row in clean] == [(row.id, row.lq, row.gt) for row in shards]
    assert clean.blobs.read(clean[4].lq) == (tree / row_of(NAMES[4])["lq"]).read_bytes()


FAR = 0xFFFF << 40


def test_leaks_are_told_from_duplicates() -> None:
    # Hashes: rows 0 and 2 differ in 6 bits, 0 and 3 in 7; row 1 is row 4's. Rows 2 and 4 are held out, so 0 and 1 leak.
    hashes = np.array([0, FAR, 0b111111, 0b1111111 << 20, FAR, FAR + 1], dtype=np.uint64)
    held_out = np.array([False, False, True, False, True, True])
    assert near_pairs(np.unique(hashes)) == {(0, 1), (3, 4)}
    assert twins(hashes, held_out) == [(0, 2, "leak"), (1, 4, "leak"), (5, 4, "duplicate")]


def test_near_pairs_against_all_pairs() -> None:
    rng = np.random.default_rng(0)
    hashes = np.unique(rng.integers(0, 2**63, 60, dtype=np.uint64))
    flips = [
        hash_ ^ np.uint64(sum(1 << int(b) for b in rng.choice(64, n, False))) for n, hash_ in enumerate(hashes[:12])
    ]
    hashes = np.unique(np.concatenate([hashes, np.array(flips, dtype=np.uint64)]))
    slow = {
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if int(np.bitwise_count(hashes[i] ^ hashes[j])) <= 6
    }
    assert near_pairs(hashes) == slow
    assert len(slow) >= 6  # flips of 1 to 6 bits


def test_show(tree: Path, tmp_path: Path) -> None:
    rows = [{**row_of(name), "prompt": "<script>alert(1)</script>"} for name in NAMES]
    (tree / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("data", "show", tree, "--out", tmp_path / "sheet", "--per-type", 2, "--tensorboard", tmp_path / "tb")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height >= 6 * 192
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<img") == 12
    assert "<script>" not in page
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert events.Tags()["images"] == ["data/contact_sheet"]
    (text,) = events.Tensors("data/rows/text_summary")
    assert "| haze | - | 10 |" in text.tensor_proto.string_val[0].decode()
