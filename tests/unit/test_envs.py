"""Envs: the shared contract, splits by photo, resume from the step alone, and refusals that say what to do."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from envs.base import Env
from envs.check import check_env, photo_of
from envs.crops import Photo, PhotoPool
from envs.degradations import DEGRADATIONS
from envs.images import DecodedCache, checked_size, load_rgb
from envs.paired import PairedConfig, PairedEnv, split_pairs, types_of
from envs.pairing import FolderPair, Pair, find_folder_pairs, pair_files
from envs.photos import WHEEL_PHOTOS, PhotosConfig, PhotosEnv, folder_photos, wheel_photos
from envs.registry import ENVS
from envs.splits import name_fraction
from envs.types import Task
from scripts.fetch_photos import rcc_files

SMALL = PhotosConfig(size=64)


def picture(seed: int, height: int = 96, width: int = 80) -> np.ndarray:
    """[height, width, 3] uint8: smooth random content, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pairs(lq: Path, gt: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        save(gt / f"{name}.png", picture(i))
        save(lq / f"{name}.jpg", picture(i))


@pytest.fixture(scope="module")
def pairs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root / "haze" / "LQ", root / "haze" / "GT", [f"{i:04d}" for i in range(8)])
    write_pairs(root / "rain" / "LQ", root / "rain" / "GT", [f"{i:04d}" for i in range(4, 12)])
    return root


@pytest.fixture(scope="module")
def photos_env() -> PhotosEnv:
    return PhotosEnv(SMALL)


def build(name: str, pairs_root: Path) -> list[Env]:
    config, env = ENVS[name]
    if name == "photos":
        return [env(replace(config(), size=64))]
    if name == "manifest":
        options = {"source": str(pairs_root), "size": 48, "held_out_fraction": 0.4, "cache": str(pairs_root / ".cache")}
        return [env(config(**options)), env(config(**options, per_step=8, balance={"haze": 3.0, "rain": 1.0}))]
    paired = config(root=str(pairs_root), size=48, held_out_fraction=0.4)
    alone = config(lq_dir=str(pairs_root / "haze" / "LQ"), size=None, held_out_fraction=0.4)
    return [env(paired), env(alone)]


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ENVS.keys() - {"preferences"}))  # that one: tests/unit/test_preferences.py
def test_every_env_keeps_the_contract(name: str, pairs_root: Path) -> None:
    for env in build(name, pairs_root):
        assert env.name == name
        check_env(env)


class Faulty:
    """An env with one fault, to show that the check sees it."""

    name = "photos"
    has_gt = True

    def __init__(self, env: PhotosEnv, fault: str):
        self.env, self.fault, self.calls = env, fault, 0

    def draw(self, step: int, n: int) -> list[Task]:
        self.calls += 1
        match self.fault:
            case "stateful":
                return self.env.draw(self.calls, n)
            case "same every step":
                return self.env.draw(0, n)
            case "not a prefix":
                return self.env.draw(step, n)[::-1]
            case "leak":
                return self.env.held_out(n + step)[step:]
            case "range":
                return [replace(task, lq=task.lq * 2) for task in self.env.draw(step, n)]
            case "layout":
                return [replace(task, lq=task.lq.transpose(1, 2)) for task in self.env.draw(step, n)]
            case "no reference":
                return [replace(task, gt=None) for task in self.env.draw(step, n)]
            case "one id":
                return [replace(task, id="photos/a@0") for task in self.env.draw(step, n)]
        return self.env.draw(step, n)

    def held_out(self, n: int) -> list[Task]:
        return self.env.draw(self.calls, n) if self.fault == "moving evaluation" else self.env.held_out(n)

    def fingerprint(self) -> str:
        return "x" if self.fault == "fingerprint" else self.env.fingerprint()


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("stateful", "second time"),
        ("same every step", "two steps"),
        ("not a prefix", "longer draw"),
        ("leak", "in training and in held_out"),
        ("range", "ranges over"),
        ("layout", "not contiguous"),
        ("no reference", "has_gt"),
        ("one id", "two different tasks"),
        ("moving evaluation", "held_out|in training"),
        ("fingerprint", "sha256"),
    ],
)
def test_the_check_sees_faults(fault: str, complaint: str, photos_env: PhotosEnv) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_env(Faulty(photos_env, fault), n=3)


# --- photos -----------------------------------------------------------------------------------------------------------


def test_draws_resume_from_the_step(photos_env: PhotosEnv) -> None:
    straight = [task.id for step in range(4) for task in photos_env.draw(step, 2)]
    resumed = PhotosEnv(SMALL)  # a new process that begins at step 2
    assert [task.id for step in range(2, 4) for task in resumed.draw(step, 2)] == straight[4:]
    assert torch.equal(resumed.draw(3, 2)[1].lq, photos_env.draw(3, 2)[1].lq)


def test_seed_changes_training_but_not_evaluation(photos_env: PhotosEnv) -> None:
    other = PhotosEnv(replace(SMALL, seed=1))
    assert {task.id for task in other.draw(0, 4)}.isdisjoint(task.id for task in photos_env.draw(0, 4))
    assert [task.id for task in other.held_out(4)] == [task.id for task in photos_env.held_out(4)]


def test_held_out_visits_every_photo_before_any_twice(photos_env: PhotosEnv) -> None:
    photos = len(photos_env.held_out_pool)
    names = [photo_of(task) for task in photos_env.held_out(2 * photos)]
    assert len(set(names[:photos])) == photos
    assert names[photos:] == names[:photos]
    colourful = [float((task.gt[0] - task.gt[2]).abs().mean()) > 0.02 for task in photos_env.held_out(photos)]
    assert sum(colourful) >= 3
    assert min(float(task.gt.std()) for task in photos_env.held_out(photos)) > 0.05  # none is flat


def test_fingerprint_follows_the_config() -> None:
    prints = [
        PhotosEnv(replace(SMALL, **change)).fingerprint()
        for change in ({}, {"seed": 1}, {"size": 32}, {"severity": 0.5}, {"recipe": "realesrgan"}, {"scale": 2})
    ]
    assert len(set(prints)) == len(prints)


def test_wheel_table() -> None:
    names = [row.name for row in WHEEL_PHOTOS]
    assert len(set(names)) == len(names)
    assert all(row.licence and row.split in {"train", "held_out"} for row in WHEEL_PHOTOS)
    split = {row.name: row.split for row in WHEEL_PHOTOS}
    assert split["motorcycle_left"] == split["motorcycle_right"]  # two views of one scene
    train, held_out = wheel_photos()
    assert len(train) + len(held_out) == len(names)


def test_crops_are_downscaled_never_upscaled(photos_env: PhotosEnv) -> None:
    zooms = [task.record["zoom"] for step in range(4) for task in photos_env.draw(step, 10)]
    assert min(zooms) >= 1.0
    assert max(zooms) <= 4.0
    assert max(zooms) > 2.0 > min(zooms)


def test_a_downscaled_crop_is_antialiased(tmp_path: Path) -> None:
    # A 1-px checkerboard has mean 127.5; without a filter, picking every fourth pixel would give 0 or 255.
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    save(tmp_path / "board.png", board)
    pool = PhotoPool([Photo("board", tmp_path / "board.png")], 64, DEGRADATIONS["mild"])
    place = replace(pool.place(pool.photos[0], np.random.default_rng(0), 1), x_px=0, y_px=0, extent_px=256)
    assert np.abs(pool.crop(pool.photos[0], place).astype(float) - 127.5).max() < 2.0


def test_detail_is_preferred(tmp_path: Path) -> None:
    # Left half flat, right half noise: that all 8 candidates lie in the flat half has p < 0.5^8 = 0.4 %.
    half = np.full((128, 256, 3), 90, np.uint8)
    half[:, 128:] = np.random.default_rng(0).integers(0, 256, (128, 128, 3))
    save(tmp_path / "half.png", half)
    pool = PhotoPool([Photo("half", tmp_path / "half.png")], 64, DEGRADATIONS["mild"])
    for seed in range(5):
        place = pool.place(pool.photos[0], np.random.default_rng(seed), 8)
        assert place.x_px + place.extent_px > 128 + place.extent_px / 4


def test_pairs_are_random_access(photos_env: PhotosEnv) -> None:
    pool = photos_env.train_pool
    forward = [pool.pair(3, i) for i in range(4)]
    lq, gt, task = pool.pair(3, 2)
    assert torch.equal(lq, forward[2][0])
    assert torch.equal(gt, forward[2][1])
    assert task.lq is lq
    assert task.gt is gt
    assert len({item[2].id for item in forward}) == 4


def test_photos_smaller_than_a_crop_are_left_out(photos_env: PhotosEnv) -> None:
    large = PhotosEnv(replace(SMALL, size=512))  # chelsea, china and coffee have shorter sides of 300, 427 and 400 px
    assert {photo.name for photo in large.held_out_pool.too_small} == {"chelsea", "china", "coffee"}
    assert {photo.name for photo in large.held_out_pool.photos} == {"astronaut"}
    with pytest.raises(ValueError, match="none of 4 photos"):
        PhotosEnv(replace(SMALL, size=1024))


def test_folder_is_split_by_name(tmp_path: Path) -> None:
    for i in range(40):
        save(tmp_path / f"{i}.png", picture(i, 64, 64))
    train, held_out = folder_photos(tmp_path, 0.25)
    assert len(train) + len(held_out) == 40
    expected = {f"{i}.png" for i in range(40) if name_fraction(f"{i}.png") < 0.25}
    assert {photo.path.name for photo in held_out} == expected
    save(tmp_path / "later.png", picture(99, 64, 64))  # nobody changes sides when a photo is added
    assert {photo.path.name for photo in folder_photos(tmp_path, 0.25)[1]} - {"later.png"} == expected
    env = PhotosEnv(PhotosConfig(size=64, folder=str(tmp_path), held_out_fraction=0.25, include_wheels=False))
    check_env(env, n=4)


def test_a_folder_for_evaluation_only(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "train" / f"{i}.png", picture(i))
        save(tmp_path / "eval" / f"{i}.png", picture(10 + i))
    config = PhotosConfig(
        size=64,
        folder=str(tmp_path / "train"),
        held_out_folder=str(tmp_path / "eval"),
        held_out_fraction=0.0,
        include_wheels=False,
    )
    env = PhotosEnv(config)
    assert [photo.name for photo in env.train_pool.photos] == ["train/0.png", "train/1.png", "train/2.png"]
    assert [photo_of(task) for task in env.held_out(3)] == [f"photos/eval/{i}.png" for i in range(3)]
    save(tmp_path / "eval" / "copy.png", picture(1))
    with pytest.raises(ValueError, match=r"1\.png \(training\) and .*copy\.png \(held out\) are the same file"):
        PhotosEnv(config)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_corrupt_photos_are_refused_at_the_start(suffix: str, tmp_path: Path) -> None:
    save(tmp_path / f"whole.{suffix}", picture(0))
    blob = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"short.{suffix}").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ValueError, match=rf"short\.{suffix} (ends too early|is not a readable).*remove or replace"):
        PhotosEnv(PhotosConfig(size=64, folder=str(tmp_path)))
    (tmp_path / f"short.{suffix}").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=rf"short\.{suffix} is not a readable"):
        PhotosEnv(PhotosConfig(size=64, folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"recipe": "hard"}, "first_order.*mild.*realesrgan"),
        ({"include_wheels": False}, "set env.folder"),
        ({"folder": "/nonexistent"}, "not a folder"),
        ({"size": 66, "scale": 4}, "multiple of scale"),
        ({"held_out_fraction": 2.0}, "held_out_fraction"),
        ({"severity": -0.1}, "severity"),
    ],
)
def test_photos_config_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PhotosEnv(replace(SMALL, **change))


def test_a_side_without_photos_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "only.png", picture(0))
    for fraction, complaint in ((0.0, "no held-out photo.*raise"), (1.0, "no training photo.*lower")):
        config = PhotosConfig(size=64, folder=str(tmp_path), include_wheels=False, held_out_fraction=fraction)
        with pytest.raises(ValueError, match=complaint):
            PhotosEnv(config)


# --- images -----------------------------------------------------------------------------------------------------------


def test_orientation_and_colour_mode_are_normalised(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[0, 0] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: display needs 90 degrees clockwise, so the top left corner goes to the top right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert checked_size(tmp_path / "turned.png") == (30, 20)
    turned = load_rgb(tmp_path / "turned.png")
    assert turned.shape == (30, 20, 3)
    assert turned[0, -1].tolist() == [250, 0, 0]
    for mode in ("L", "RGBA", "P", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.{suffix}")
        assert load_rgb(tmp_path / f"{mode}.{suffix}").shape == (20, 30, 3)


def test_bombs_and_other_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "large.png", picture(0, 100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(ValueError, match=r"large\.png has too many pixels"):
        checked_size(tmp_path / "large.png")
    monkeypatch.undo()
    gif = io.BytesIO()
    Image.fromarray(picture(0)).save(gif, "GIF")
    (tmp_path / "gif.png").write_bytes(gif.getvalue())
    with pytest.raises(ValueError, match="not a readable"):
        checked_size(tmp_path / "gif.png")


def test_the_cache_decodes_once_and_stays_below_its_limit(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        save(path, picture(i, 100, 100))  # 30,000 bytes each
    cache = DecodedCache(limit_bytes=70_000)
    first = cache[paths[0]]
    assert cache[paths[0]] is first
    assert not first.flags.writeable
    for path in paths[1:3]:  # the third passes the limit: the first goes
        assert cache[path].shape == (100, 100, 3)
    assert cache.paths() == paths[1:3]
    assert cache.held_bytes() == 60_000
    copy = pickle.loads(pickle.dumps(cache))  # a worker process decodes for itself
    assert copy.paths() == []
    assert np.array_equal(copy[paths[0]], first)


# --- pairing ----------------------------------------------------------------------------------------------------------


def test_folders_are_found_by_name(pairs_root: Path) -> None:
    found = find_folder_pairs(pairs_root)
    assert found == [FolderPair(pairs_root / c / "LQ", pairs_root / c / "GT") for c in ("haze", "rain")]
    env = PairedEnv(PairedConfig(root=str(pairs_root), size=48, held_out_fraction=0.4))
    assert {task.types for task in env.draw(0, 16)} == {("haze",), ("rain",)}
    scenes = [{pair.name[-4:] for pair in side} for side in (env.train_pairs, env.held_out_pairs)]
    assert scenes[0].isdisjoint(scenes[1])  # 0004 to 0007 are in both categories, and on one side


@pytest.mark.parametrize(
    ("lq", "gt"), [("Low-Quality", "Ground_Truth"), ("input", "target"), ("test_LR", "test_HR"), ("lq", "gt")]
)
def test_aliases_and_suffixes(lq: str, gt: str, tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / gt / "Canon" / f"{i}_HR.png", picture(i))
        save(tmp_path / lq / "Canon" / f"{i}_LR4.png", picture(i))
    if lq == "test_LR":  # not an alias: given by hand
        pairs = pair_files(tmp_path / lq, tmp_path / gt)
        with pytest.raises(ValueError, match=r"env\.lq_dir"):
            find_folder_pairs(tmp_path)
    else:
        (folders,) = find_folder_pairs(tmp_path)
        pairs = pair_files(folders.lq, folders.gt)
    assert [pair.name for pair in pairs] == ["Canon/0", "Canon/1", "Canon/2"]


def test_a_choice_between_pairings_is_refused_with_both(tmp_path: Path) -> None:
    write_pairs(tmp_path / "lq", tmp_path / "gt", ["a", "b"])
    write_pairs(tmp_path / "noisy", tmp_path / "gt", ["a", "b"])
    with pytest.raises(ValueError, match="2 pairings") as error:
        PairedEnv(PairedConfig(root=str(tmp_path)))
    assert f"env.lq_dir={tmp_path}/lq" in str(error.value)
    assert f"env.lq_dir={tmp_path}/noisy" in str(error.value)


def test_unmatched_files_are_listed(tmp_path: Path) -> None:
    write_pairs(tmp_path / "lq", tmp_path / "gt", ["a", "b", "c"])
    (tmp_path / "lq" / "b.jpg").unlink()
    save(tmp_path / "lq" / "z.png", picture(0))
    with pytest.raises(ValueError, match=r"2 files have no partner.*Only LQ: z\. Only GT: b\."):
        PairedEnv(PairedConfig(lq_dir=str(tmp_path / "lq"), gt_dir=str(tmp_path / "gt")))
    with pytest.raises(ValueError, match="share 2 of 3 names, not b, z"):
        PairedEnv(PairedConfig(root=str(tmp_path)))


def test_twins_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "lq", tmp_path / "gt", ["a", "b"])
    save(tmp_path / "lq" / "a_lq.png", picture(0))
    with pytest.raises(ValueError, match="same name for pairing"):
        pair_files(tmp_path / "lq", tmp_path / "gt")


def test_size_mismatch_is_refused_with_both_numbers(tmp_path: Path) -> None:
    write_pairs(tmp_path / "lq", tmp_path / "gt", ["a", "b"])
    save(tmp_path / "lq" / "b.jpg", picture(1, 48, 40))
    with pytest.raises(ValueError, match=r"b\.jpg is 40x48 .*b\.png is 80x96.*Resize"):
        PairedEnv(PairedConfig(root=str(tmp_path), size=32))


def test_photos_smaller_than_the_crop_are_refused(pairs_root: Path) -> None:
    with pytest.raises(ValueError, match=r"80x96, smaller than the crop env\.size=128: choose env\.size <= 80"):
        PairedEnv(PairedConfig(root=str(pairs_root)))


def test_shifted_lists_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "lq", tmp_path / "gt", list("abcdefgh"))
    for i, name in enumerate("abcdefgh"):
        save(tmp_path / "lq" / f"{name}.jpg", picture((i + 1) % 8))  # each LQ shows the next photo
    with pytest.raises(ValueError, match=r"show different things.*shifted"):
        PairedEnv(PairedConfig(root=str(tmp_path), size=64))


def test_a_test_folder_is_the_held_out_side(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train" / "lq", tmp_path / "train" / "gt", list("abc"))
    write_pairs(tmp_path / "test" / "lq", tmp_path / "test" / "gt", list("de"))
    env = PairedEnv(PairedConfig(root=str(tmp_path), size=64))
    assert [pair.name for pair in env.train_pairs] == ["train/a", "train/b", "train/c"]
    assert [pair.name for pair in env.held_out_pairs] == ["test/d", "test/e"]


def test_crops_are_at_the_same_place_in_both(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "gt" / f"{i}.png", picture(i))
        save(tmp_path / "lq" / f"{i}.png", picture(i) // 2)
    env = PairedEnv(
        PairedConfig(lq_dir=str(tmp_path / "lq"), gt_dir=str(tmp_path / "gt"), size=40, held_out_fraction=0.5)
    )
    for task in env.draw(0, 8):
        expected = torch.floor(task.gt * 255.0 / 2 + 1e-3) / 255.0
        torch.testing.assert_close(task.lq, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (PairedConfig(), "has neither"),
        (PairedConfig(root="a", lq_dir="b"), "has both"),
        (PairedConfig(root="a", gt_dir="b"), r"goes with env\.lq_dir"),
        (PairedConfig(root="/nonexistent"), "not a folder"),
        (PairedConfig(lq_dir="/nonexistent"), "not a folder"),
    ],
)
def test_paired_config_is_refused(config: PairedConfig, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PairedEnv(config)


def test_types_come_from_folders() -> None:
    assert types_of("Train/Low_Light/0001") == ("lowlight",)
    assert types_of("haze/rain/0001") == ("haze",)  # from the root down
    assert types_of("misc/haze") == ()  # a file of that name says nothing


def test_split_refuses_an_empty_side() -> None:
    pairs = [Pair(str(i), Path(), None) for i in range(5)]
    with pytest.raises(ValueError, match="no held-out pair among 5"):
        split_pairs(pairs, 0.0)


# --- Qt resources (scripts/fetch_photos.py) ---------------------------------------------------------------------------


def qt_resource(version: int) -> bytes:
    """A resource with root -> dir -> a.webp (plain) and b.txt (zlib), laid out as rcc does."""
    names, offsets = b"", []
    for name in ("dir", "a.webp", "b.txt"):
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    packed = struct.pack(">I", 5) + zlib.compress(b"hello")
    data = struct.pack(">I", 4) + b"RIFF" + struct.pack(">I", len(packed)) + packed
    time = b"" if version == 1 else bytes(8)
    tree = b"".join(
        struct.pack(">IH", name, flags) + rest + time
        for name, flags, rest in [
            (0, 2, struct.pack(">II", 1, 1)),  # root: one child, node 1
            (offsets[0], 2, struct.pack(">II", 2, 2)),  # dir: two children from node 2
            (offsets[1], 0, struct.pack(">HHI", 0, 0, 0)),
            (offsets[2], 1, struct.pack(">HHI", 0, 0, 8)),  # after 4 bytes of size and 4 of data
        ]
    )
    start = 24
    header = b"qres" + struct.pack(">IIII", version, start, start + len(tree), start + len(tree) + len(data)) + bytes(4)
    return header + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_rcc_files(version: int) -> None:
    assert dict(rcc_files(qt_resource(version))) == {"dir/a.webp": b"RIFF", "dir/b.txt": b"hello"}


def test_rcc_refuses_other_files() -> None:
    with pytest.raises(ValueError, match="qres"):
        list(rcc_files(b"PK\x03\x04" + bytes(40)))
    with pytest.raises(ValueError, match="version 9"):
        list(rcc_files(b"qres" + (9).to_bytes(4, "big") + bytes(40)))
