"""Env `manifest` and its index: one data set in five containers, order and balance, and what is refused or set aside."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from envs.ahead import Ahead
from envs.balance import Classes, Draws, Epochs
from envs.check import check_env, photo_of
from envs.index import open_index
from envs.manifest import ManifestConfig, ManifestEnv, QuarantineError
from envs.sources.rows import parse_types, types_of_folders


def picture(seed: int, height: int = 64, width: int = 80) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


NAMES = [f"{category}/{i:03d}" for category in ("haze", "rain", "snow") for i in range(10)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGT-like: category/{LQ,GT}/000.png."""
    root = tmp_path_factory.mktemp("ggt")
    for seed, name in enumerate(NAMES):
        category, stem = name.split("/")
        save(root / category / "GT" / f"{stem}.png", picture(seed))
        save(root / category / "LQ" / f"{stem}.png", picture(seed) // 2 + 20)
    return root


def row_of(name: str) -> dict[str, str]:
    category, stem = name.split("/")
    lq, gt = f"{category}/LQ/{stem}.png", f"{category}/GT/{stem}.png"
    return {"id": name, "lq": lq, "gt": gt, "types": category}


def pack(kind: str, tree: Path, out: Path) -> tuple[Path, Path | None]:
    """The tree in another container: (source, root)."""
    rows = [row_of(name) for name in NAMES]
    if kind == "jsonl":
        (out / "m.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
        return out / "m.jsonl", tree
    if kind == "json":
        (out / "m.json").write_text(json.dumps(rows))
        return out / "m.json", tree
    if kind == "csv":
        with (out / "m.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return out / "m.csv", tree
    if kind == "parquet index":
        pq.write_table(pa.Table.from_pylist(rows), out / "m.parquet")
        return out / "m.parquet", tree
    if kind == "tar":
        (out / "shards").mkdir()
        for shard in range(2):
            with tarfile.open(out / "shards" / f"{shard}.tar", "w") as tar:
                for row in rows[shard::2]:
                    for role in ("lq", "gt"):
                        tar.add(tree / row[role], f"{row['id']}.{role}.png")
                    tar.addfile(*member(f"{row['id']}.json", json.dumps({"type": row["types"]}).encode()))
        return out / "shards", None
    cells = [{**row, **{role: (tree / row[role]).read_bytes() for role in ("lq", "gt")}} for row in rows]
    if kind == "parquet images":
        pq.write_table(pa.Table.from_pylist(cells), out / "images.parquet", row_group_size=7)
        return out / "images.parquet", None
    from datasets import Dataset

    Dataset.from_list([{**c, **{r: {"bytes": c[r], "path": None} for r in ("lq", "gt")}} for c in cells]).save_to_disk(
        str(out / "hub")
    )
    return out / "hub", None


def member(name: str, data: bytes, **more: object) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


def config_of(source: Path, cache: Path, root: Path | None = None, **more: object) -> ManifestConfig:
    root_text = str(root) if root else None
    return ManifestConfig(str(source), root_text, size=48, held_out_fraction=0.3, cache=str(cache), **more)  # type: ignore[arg-type]


# --- one data set, many containers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet index", "tar", "parquet images", "hub"])
def test_the_container_changes_nothing(kind: str, tree: Path, tmp_path: Path) -> None:
    source, root = pack(kind, tree, tmp_path)
    folder = ManifestEnv(config_of(tree, tmp_path / "c0"))
    other = ManifestEnv(config_of(source, tmp_path / "c1", root))
    assert [row.id for row in other.index] == [row.id for row in folder.index] == NAMES
    assert other.index.types() == {"haze": 10, "rain": 10, "snow": 10}
    for a, b in zip([*folder.draw(5, 6), *folder.held_out(4)], [*other.draw(5, 6), *other.held_out(4)], strict=True):
        assert (a.id, a.types) == (b.id, b.types)
        assert torch.equal(a.lq, b.lq)
        assert torch.equal(a.gt, b.gt)
    check_env(other)


def test_a_data_set_by_id(tree: Path, tmp_path: Path) -> None:
    """`datasets` loads a folder as it loads an id; without a network an id is one clear line."""
    source, _ = pack("parquet images", tree, tmp_path)
    (tmp_path / "repository").mkdir()
    source.rename(tmp_path / "repository" / "train-00000.parquet")
    by_id = open_index(f"hf:{tmp_path}/repository", cache=tmp_path / "c")
    assert {(row.id, row.split) for row in by_id} == {(name, "train") for name in NAMES}
    assert by_id.blobs.read(by_id[3].lq) == (tree / row_of(NAMES[3])["lq"]).read_bytes()
    (tmp_path / "repository" / "train-00000.parquet").unlink()
    assert len(open_index(f"hf:{tmp_path}/repository", cache=tmp_path / "c")) == len(NAMES), "it is fetched once"
    with pytest.raises(ValueError, match=r"hf:.*nothing cannot be loaded .*download it and give its folder"):
        open_index(f"hf:{tmp_path}/nothing", cache=tmp_path / "c")
    assert not list((tmp_path / "c").glob(".tmp*"))


def test_the_index_is_kept_and_follows_changes(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, root = pack("jsonl", tree, tmp_path)
    cache = tmp_path / "cache"
    first = open_index(source, root, cache)
    with monkeypatch.context() as patch:
        patch.setattr("envs.index._rows", lambda *_: pytest.fail("the source was read again"))
        again = open_index(source, root, cache)
    assert list(again) == list(first)
    assert again[7] == first[7]
    source.write_text(json.dumps(row_of(NAMES[0])))
    assert [row.id for row in open_index(source, root, cache)] == NAMES[:1]
    copy = tmp_path / "tree"
    save(copy / "lq" / "a.png", picture(0))
    save(copy / "gt" / "a.png", picture(0) // 2)
    assert len(open_index(copy, cache=cache)) == 1
    os.utime(copy / "lq", ns=(1, 1))  # a folder whose time is not that of its last change, so that the next one shows
    save(copy / "lq" / "b.png", picture(1))
    save(copy / "gt" / "b.png", picture(1) // 2)
    assert len(open_index(copy, cache=cache)) == 2
    next(cache.glob("index-*.arrow")).write_bytes(b"broken")
    assert len(open_index(copy, cache=cache)) == 2


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "rows"),
    [
        (["01Blur/GT/1.png", "01Blur/LQ/1.png", "12NightRain/GT/1.png", "12NightRain/LQ/1.png"],  # FoundIR
         [("01Blur/1", "blur", ""), ("12NightRain/1", "rain|lowlight", "")]),
        (["gt/1.png", "lr/1.png", "tag/1.txt"], [("1", "mix", "")]),  # SeeSR
        (["gt/1.png", "sr_bicubic/1.png", "caption/1.txt"], [("1", "mix", "")]),  # DreamClear
        (["test_HR/C_001.png", "test_LR/C_001_LR4.png"], [("test/C_001", "mix", "test")]),  # RealSR crops
        (["Canon/Train/4/1_HR.png", "Canon/Train/4/1_LR4.png"], [("Canon/Train/4/1", "mix", "train")]),  # RealSR v3
        (["GGT-100K/train/old_photo/LQ/1.png", "GGT-100K/train/old_photo/GGT/1.jpg"],
         [("GGT-100K/train/old_photo/1", "oldphoto", "train")]),
        (["train/LQ/haze/1.png", "train/GT/haze/1.png", "test/LQ/haze/1.png", "test/GT/haze/1.png"],
         [("test/haze/1", "haze", "test"), ("train/haze/1", "haze", "train")]),
        (["lq/1.png", "lq/2.png"], [("lq/1", "mix", ""), ("lq/2", "mix", "")]),  # LQ alone
    ],
)  # fmt: skip
def test_layouts(files: list[str], rows: list[tuple[str, str, str]], tmp_path: Path) -> None:
    for name in files:
        if name.endswith(".txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("a house")
        else:
            save(tmp_path / name, picture(0, 16, 16))
    index = open_index(tmp_path, cache=tmp_path / ".cache")
    assert [(row.id, row.types, row.split) for row in index] == rows
    assert not index.bad
    assert all(bool(row.gt) == (files[0] != "lq/1.png") for row in index)


def test_two_possible_pairings_are_refused_with_both(tmp_path: Path) -> None:
    for folder in ("lq", "noisy", "gt"):
        save(tmp_path / folder / "1.png", picture(0, 16, 16))
    with pytest.raises(ValueError, match="2 pairings are possible"):
        open_index(tmp_path, cache=tmp_path / ".cache")


def test_types_in_all_spellings() -> None:
    assert [parse_types(given) for given in ("haze|rain", ["haze", "Rain"], "Low Light", None, "")] == [
        "haze|rain", "haze|rain", "lowlight", "mix", "mix",
    ]  # fmt: skip
    assert types_of_folders("test/17Lowlight_JPEG/0001") == "lowlight|compression"
    with pytest.raises(ValueError, match="'cats' is unknown"):
        parse_types("haze|cats")


# --- order ------------------------------------------------------------------------------------------------------------


def test_epochs_visit_every_row_once_and_resume_by_number() -> None:
    labels = ["a"] * 7 + ["b"] * 5
    order = Epochs(Classes(labels, range(12), {}), seed=3, per_step=4)
    rows = [order.row(step, position) for step in range(6) for position in range(4)]
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
    assert rows[:12] != rows[12:]
    later = Epochs(Classes(labels, range(12), {}), seed=3, per_step=4)  # a new process that begins at step 4
    assert [later.row(step, position) for step in (4, 5) for position in range(4)] == rows[16:]
    workers = [[order.row(step, p) for step in range(w, 3, 2) for p in range(4)] for w in range(2)]
    assert sorted(workers[0] + workers[1]) == list(range(12))  # two workers: nothing twice, nothing missed
    with pytest.raises(ValueError, match=r"env\.per_step=4 and position 4"):
        order.row(0, 4)


def test_balance() -> None:
    labels = ["a"] * 90 + ["b"] * 10
    order = Epochs(Classes(labels, range(100), {"a": 1, "b": 1}), seed=0, per_step=10)
    rows = [order.row(step, position) for step in range(100) for position in range(10)]
    # 1000 places are one cycle: 500 of each class. b's 10 rows are each visited 50 times, a's 90 rows 5 or 6 times.
    counts = Counter(rows)
    assert {counts[row] for row in range(90, 100)} == {50}
    assert {counts[row] for row in range(90)} == {5, 6}
    draws = Draws(Classes(labels, range(100), {"a": 1, "b": 3}), seed=0)
    share = sum(draws.row(0, position) >= 90 for position in range(2000)) / 2000
    assert share == pytest.approx(0.75, abs=0.04)  # 4 standard deviations of sqrt(.75 * .25 / 2000)
    for weights, complaint in (({"c": 1.0}, "no row: known are"), ({"a": 0.0}, "one of them positive")):
        with pytest.raises(ValueError, match=complaint):
            Classes(labels, range(100), weights)


def test_what_is_decoded_ahead_changes_nothing(tree: Path, tmp_path: Path) -> None:
    ahead = ManifestEnv(config_of(tree, tmp_path, ahead=2))
    plain = ManifestEnv(config_of(tree, tmp_path, ahead=0))
    for step in range(4):
        for a, b in zip(ahead.draw(step, 5), plain.draw(step, 5), strict=True):
            assert a.id == b.id
            assert torch.equal(a.lq, b.lq)
    assert ahead.fingerprint() == plain.fingerprint()
    copy = pickle.loads(pickle.dumps(ahead))  # as for a worker
    assert copy.draw(9, 1)[0].id == plain.draw(9, 1)[0].id


def test_ahead_loads_once_and_keeps_to_its_limit() -> None:
    loaded: list[int] = []

    def load(number: int) -> bytes:
        loaded.append(number)
        if number == 13:
            raise ValueError("bad luck")
        return bytes(100)

    cache: Ahead[bytes] = Ahead(load, len, limit_bytes=250, threads=2)
    cache.hint([1, 2])
    assert [len(cache.get(n)) for n in (1, 2, 1)] == [100, 100, 100]
    assert sorted(loaded) == [1, 2]
    cache.get(3)  # 300 bytes: the oldest that was used, 2, goes
    cache.get(1)
    assert sorted(loaded) == [1, 2, 3]
    cache.get(2)
    assert sorted(loaded) == [1, 2, 2, 3]
    for _ in range(2):
        with pytest.raises(ValueError, match="bad luck"):
            cache.get(13)
    assert loaded.count(13) == 1


# --- what cannot be used ----------------------------------------------------------------------------------------------


def broken_tree(tree: Path, out: Path, broken: list[str]) -> Path:
    for name in NAMES:
        row = row_of(name)
        for role in ("lq", "gt"):
            target = out / row[role]
            target.parent.mkdir(parents=True, exist_ok=True)
            data = (tree / row[role]).read_bytes()
            target.write_bytes(data[: len(data) // 2] if role == "lq" and name in broken else data)
    return out


def test_bad_images_are_quarantined_and_replaced(tree: Path, tmp_path: Path) -> None:
    bad = ["haze/003", "rain/005"]
    env = ManifestEnv(config_of(broken_tree(tree, tmp_path / "t", bad), tmp_path / "c", per_step=6))
    tasks = [task for step in range(8) for task in env.draw(step, 6)]
    assert len(tasks) == 48
    assert not {f"manifest/{name}" for name in bad} & {photo_of(task) for task in tasks}
    held_out = {env.index[row].id for row in env.held_out_rows}
    seen = {env.index[row].id for row in env.quarantined}
    assert seen == set(bad) - held_out
    lines = [json.loads(line) for line in env.quarantine_file.read_text().splitlines()]
    assert {line["id"] for line in lines} == seen
    assert all(f"{line['id'].split('/')[1]}.png" in line["reason"] for line in lines)
    again = ManifestEnv(config_of(tmp_path / "t", tmp_path / "c", per_step=6))  # in another order, with another history
    assert [task.id for task in again.draw(7, 6)] == [task.id for task in tasks[42:]]
    check_env(ManifestEnv(config_of(tmp_path / "t", tmp_path / "c")))


def test_too_many_bad_images_end_the_run(tree: Path, tmp_path: Path) -> None:
    bad = [name for name in NAMES if name.endswith(("1", "3", "5"))]
    root = broken_tree(tree, tmp_path / "t", bad)
    env = ManifestEnv(config_of(root, tmp_path / "c", max_quarantined=3, per_step=6))
    with pytest.raises(QuarantineError, match=r"max_quarantined=3.*quarantine\.jsonl"):
        [env.draw(step, 6) for step in range(8)]


def test_a_source_that_is_mostly_wrong_is_refused(tree: Path, tmp_path: Path) -> None:
    rows = [{**row_of(a), "gt": row_of(b)["gt"]} for a, b in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"pairs looked at in .* cannot be used.*show different things"):
        ManifestEnv(config_of(tmp_path / "m.jsonl", tmp_path / "c", tree))


def test_bad_rows_are_named_and_the_others_kept(tree: Path, tmp_path: Path) -> None:
    link = tmp_path / "root" / "link.png"
    save(tmp_path / "root" / "ok.png", picture(0))
    save(tmp_path / "secret.png", picture(1))
    link.symlink_to(tmp_path / "secret.png")
    lines = [
        '{"lq": "ok.png", "types": "haze"}',
        '{"lq": "../secret.png"}',
        '{"lq": "link.png"}',
        f'{{"lq": "{tmp_path}/secret.png"}}',
        '{"lq": "gone.png"}',
        '{"lq": "ok.png", "id": "b", "types": "cats"}',
        '{"lq": "ok.png", "id": "../up"}',
        '{"lq": "ok.png", "id": "c", "split": "later"}',
        '{"lq": "ok.png"}',
        '{"lq": 7}',
        "[1, 2]",
        '{"lq": "ok.png',
        '{"lq": "ok\\n.png"}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    index = open_index(tmp_path / "m.jsonl", tmp_path / "root", tmp_path / "c")
    assert [row.id for row in index] == ["ok"]
    reasons = {item.row: item.reason for item in index.bad}
    for row, words in {
        "2": "leads out", "3": "leads out", "4": "leads out", "5": "does not exist", "6": "'cats' is unknown",
        "7": "'../up' must be", "8": "split 'later'", "ok": "stands twice", "10": "must be a path, got 7", "11": "no object",
        "12": "is not JSON", "13": "control characters",
    }.items():  # fmt: skip
        assert words in reasons.pop(row), (row, reasons)
    assert not reasons
    with pytest.raises(ValueError, match=r"12 of 13 rows of .* cannot be used"):
        ManifestEnv(ManifestConfig(str(tmp_path / "m.jsonl"), str(tmp_path / "root"), cache=str(tmp_path / "c")))


def test_a_hub_folder_may_not_name_files_elsewhere(tree: Path, tmp_path: Path) -> None:
    source, _ = pack("hub", tree, tmp_path)
    state = json.loads((source / "state.json").read_text())
    name = state["_data_files"][0]["filename"]
    (source / name).rename(tmp_path / "elsewhere.arrow")
    for told in ("../elsewhere.arrow", str(tmp_path / "elsewhere.arrow")):
        (source / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": told}]}))
        with pytest.raises(ValueError, match="leads out"):
            open_index(source, cache=tmp_path / "c")
    (source / "state.json").write_text(json.dumps(state))
    (source / name).symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(ValueError, match="leads out"):
        open_index(source, cache=tmp_path / "c")
    (source / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say which files"):
        open_index(source, cache=tmp_path / "c")


def test_a_link_made_later_is_refused_when_read(tree: Path, tmp_path: Path) -> None:
    save(tmp_path / "root" / "a.png", picture(0))
    save(tmp_path / "secret.png", picture(1))
    index = open_index(tmp_path / "root", cache=tmp_path / "c")
    (tmp_path / "root" / "a.png").unlink()
    (tmp_path / "root" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="leads out"):
        index.blobs.read(index[0].lq)


def test_what_a_shard_may_not_hold(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.fromarray(picture(0)).save(png, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*member("ok.lq.png", png.getvalue()))
        tar.addfile(*member("../up.lq.png", png.getvalue()))
        tar.addfile(*member("/abs.lq.png", png.getvalue()))
        tar.addfile(*member("link.lq.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
        tar.addfile(*member("hard.lq.png", b"", type=tarfile.LNKTYPE, linkname="ok.lq.png"))
        tar.addfile(*member("device.lq.png", b"", type=tarfile.CHRTYPE))
        tar.addfile(*member("code.pkl", pickle.dumps(print)))
        tar.addfile(*member("half.gt.png", png.getvalue()))
        tar.addfile(*member("long.json", b" " * (2**20 + 1)))
    index = open_index(tmp_path / "a.tar", cache=tmp_path / "c")
    assert [row.id for row in index] == ["ok"]
    reasons = {item.row: item.reason for item in index.bad}
    for row, words in {
        "../up.lq.png": "leads out", "/abs.lq.png": "leads out", "link.lq.png": "is a link", "hard.lq.png": "is a link",
        "device.lq.png": "is a device", "code.pkl": "pickle, which is never opened", "half": "has no LQ member",
        "long.json": "the limit is 1,048,576",
    }.items():  # fmt: skip
        assert words in reasons.pop(row), (row, reasons)
    assert not reasons
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.addfile(*member("ok.lq.png", png.getvalue()))
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.tar")
    with pytest.raises(ValueError, match="uncompressed tar"):
        open_index(tmp_path / "b.tar", cache=tmp_path / "c")


def test_decompression_bombs_are_quarantined(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = broken_tree(tree, tmp_path / "t", [])
    save(root / "haze" / "LQ" / "004.png", picture(4, 640, 800))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    env = ManifestEnv(config_of(root, tmp_path / "c", types=("haze",), per_step=10))
    [env.draw(step, 5) for step in range(10)]
    assert all("too many pixels" in reason for reason in env.quarantined.values())
    assert len(env.quarantined) == ("haze/004" not in {env.index[row].id for row in env.held_out_rows})


def test_lq_at_a_smaller_scale_is_brought_to_the_size_of_the_reference(tmp_path: Path) -> None:
    for i in range(6):
        gt = picture(i, 96, 128)
        save(tmp_path / "gt" / f"{i}.png", gt)
        save(tmp_path / "lq" / f"{i}.png", np.array(Image.fromarray(gt).resize((32, 24), Image.Resampling.BOX)))
    env = ManifestEnv(
        ManifestConfig(str(tmp_path), size=48, held_out_fraction=0.5, cache=str(tmp_path / ".c"), flip=False)
    )
    for task in env.draw(0, 6):
        assert task.lq.shape == task.gt.shape == (3, 48, 48)
        assert task.record["scale"] == 4.0
        assert task.record["x_px"] % 4 == task.record["y_px"] % 4 == 0
        assert float((task.lq - task.gt).abs().mean()) < 0.05  # the same place: another one differs by 0.2 and more
    check_env(env, n=4)
