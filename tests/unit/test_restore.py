"""Restoring photos of any size, with a tiny untrained restorer whose answer is known.

Its last layers are zero, so m = u(LQ), s = exp(-2.5) and v = (2t - 1) / ((1-t)^2 + t^2) z, pixel by pixel.
One step from t = 1: v = z, z_0 = z - z = 0, and the restoration is the photo itself. Two steps (1, 1/2, 0): z = eps / 2
after the first and v = 0 in the second, so it is u(photo) + s / 2 eps, in [0, 1] the photo + s / 4 eps.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import pixel_shuffle
from typer.testing import CliRunner

from envs.images import load_rgb
from rlrestore.checkpoint import CheckpointError, new_checkpoint
from rlrestore.cli import app
from rlrestore.commands.restore import load_restorer, plan_jobs, read_photo, run_restore, weights_folder
from rlrestore.config.files import ConfigError
from rlrestore.errors import InputError
from rlrestore.restorers.embedded import PACKAGED_WEIGHTS, EmbeddedConfig, EmbeddedRestorer
from rlrestore.restorers.restoration import canvas_noise, check_tiling, restore_pixels, tile_count

CONFIG = EmbeddedConfig(
    weights=None, precision="float32", unshuffle=2, mean_channels=(16, 16), flow_channels=(16, 32), groups=4
)  # photos are padded to multiples of 2 * 2 = 4


@pytest.fixture(scope="module")
def restorer() -> EmbeddedRestorer:
    return EmbeddedRestorer(CONFIG)


@pytest.fixture(scope="module")
def weights(restorer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    restorer.save(folder)
    return folder


def noisy_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def restore(source: Path, target: Path, weights: Path | None, **changed) -> None:
    arguments = {"seed": 0, "steps": 1, "samples": 1, "tile": 16, "overlap": 4, "overwrite": False, **changed}
    run_restore(source, target, weights, **arguments)


# -- pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"),
    [(16, 16), (37, 53), (64, 16), (5, 40), (7, 3), (1, 1)],  # a tile, odd, a row, lower than a tile, tiny
)
def test_one_step_returns_the_photo(restorer, height, width):
    photo = noisy_photo(height, width)
    calls = []
    out = restore_pixels(
        restorer, photo, seed=3, steps=1, samples=1, tile=16, overlap=8, progress=lambda: calls.append(1)
    )
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, photo)
    assert len(calls) == tile_count(height, width, 16, 8, 4)


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_tiles_see_one_canvas_of_noise(restorer, tile):
    # mid-grey, so that nothing is clipped: 0.5 + s/4 eps, s = exp(-2.5); only rounding is left between tilings
    photo = np.full((44, 60, 3), 128, dtype=np.uint8)
    out = restore_pixels(restorer, photo, seed=5, steps=2, samples=1, tile=tile, overlap=8)
    eps = pixel_shuffle(canvas_noise(5, 0, 12, 0, 22, 30), 2).permute(1, 2, 0).numpy()
    expected = 128 + 255 * math.exp(-2.5) / 4 * eps
    assert np.abs(out - expected).max() < 0.51


@pytest.mark.skipif(not PACKAGED_WEIGHTS.is_dir(), reason="the packaged weights are not there")
def test_no_seams_with_the_packaged_weights():
    """Networks that look around see tile borders; tiled and untiled still differ less than two seeds do, edges too."""
    held_out = load_rgb(Path(skimage.__file__).parent / "data" / "chelsea.png")[20:276, 100:356]
    photo = np.asarray(Image.fromarray(held_out).filter(ImageFilter.GaussianBlur(1)))
    photo = (photo + np.random.default_rng(0).normal(0, 8, photo.shape)).clip(0, 255).astype(np.uint8)
    network = EmbeddedRestorer(EmbeddedConfig(precision="float32"))

    def run(seed, tile):
        return restore_pixels(network, photo, seed=seed, steps=2, samples=1, tile=tile, overlap=64).astype(float)

    untiled = run(0, 256)
    tiled, seeds = np.abs(run(0, 160) - untiled).mean(2), np.abs(run(1, 256) - untiled).mean(2)
    edges = np.zeros(256, dtype=bool)
    for edge in (96, 160):  # tiles [0, 160) and [96, 256)
        edges[edge - 4 : edge + 4] = True
    near = edges[:, None] | edges[None, :]
    assert tiled.mean() < 0.3 * seeds.mean()
    assert tiled[near].mean() < 1.5 * tiled[~near].mean()


def test_averaging_samples_divides_the_spread(restorer):
    # std s/4 * 255 = 5.23 levels for one sample, 5.23 / 4 for 16; rounding adds 1/sqrt(12) in quadrature: 1.34
    photo = np.full((64, 64, 3), 128, dtype=np.uint8)
    one = restore_pixels(restorer, photo, seed=0, steps=2, samples=1, tile=64, overlap=0)
    many = restore_pixels(restorer, photo, seed=0, steps=2, samples=16, tile=64, overlap=0)
    assert one.std() == pytest.approx(5.24, rel=0.03)
    assert many.std() == pytest.approx(1.34, rel=0.03)


def test_noise_belongs_to_places():
    canvas = canvas_noise(0, 0, 3, 0, 64, 10)
    for top, height in ((0, 5), (14, 4), (16, 16), (33, 31)):
        assert torch.equal(canvas_noise(0, 0, 3, top, height, 10), canvas[:, top : top + height])
    assert not torch.equal(canvas_noise(0, 1, 3, 0, 64, 10), canvas)
    assert not torch.equal(canvas_noise(1, 0, 3, 0, 64, 10), canvas)
    assert not torch.equal(canvas[:, :16], canvas[:, 16:32])  # bands differ


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(30, 8, "try 32"), (0, 0, "try 4"), (16, 6, "try 8"), (16, 16, "try 12"), (16, -4, "try 0")],
)
def test_a_tiling_off_the_grid_is_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        check_tiling(tile, overlap, 4)


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_formats_by_suffix(tmp_path, weights, suffix):
    smooth = Image.fromarray(noisy_photo(2, 2)).convert("L").convert("RGB").resize((29, 22))
    smooth.save(tmp_path / "in.png")
    restore(tmp_path / "in.png", tmp_path / f"out{suffix}", weights)
    with Image.open(tmp_path / f"out{suffix}") as out:
        assert out.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]
        error = np.abs(np.asarray(out).astype(float) - np.asarray(smooth))
        assert error.shape == (22, 29, 3)
        assert error.mean() < {".png": 1e-9, ".jpg": 2, ".webp": 2}[suffix]


def test_same_seed_same_bytes(tmp_path, weights):
    Image.fromarray(noisy_photo(12, 20)).save(tmp_path / "in.png")
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        restore(tmp_path / "in.png", tmp_path / f"{name}.png", weights, seed=seed, steps=2)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_orientation_alpha_and_profile(tmp_path, weights):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown turned by 90 degrees
    Image.fromarray(noisy_photo(10, 30)).save(tmp_path / "turned.png", exif=exif)
    restore(tmp_path / "turned.png", tmp_path / "upright.png", weights)
    upright = Image.open(tmp_path / "upright.png")
    assert upright.size == (10, 30)
    assert 0x0112 not in upright.getexif()

    alpha = np.arange(400, dtype=np.uint16).reshape(20, 20).astype(np.uint8)
    rgba = np.dstack([noisy_photo(20, 20), alpha])
    Image.fromarray(rgba).save(tmp_path / "alpha.png", icc_profile=b"a profile")
    restore(tmp_path / "alpha.png", tmp_path / "kept.png", weights)
    kept = Image.open(tmp_path / "kept.png")
    np.testing.assert_array_equal(np.asarray(kept), rgba)
    assert kept.info["icc_profile"] == b"a profile"
    restore(tmp_path / "alpha.png", tmp_path / "white.jpg", weights)
    assert np.asarray(Image.open(tmp_path / "white.jpg"))[0, :2].min() > 200  # alpha 0 and 1: white shows
    assert read_photo(tmp_path / "white.jpg").alpha_HW is None


def test_an_output_is_not_replaced_unasked(tmp_path, weights):
    Image.fromarray(noisy_photo(8, 8)).save(tmp_path / "in.png")
    (tmp_path / "out.png").write_text("precious")
    with pytest.raises(InputError, match="--overwrite"):
        restore(tmp_path / "in.png", tmp_path / "out.png", weights)
    assert (tmp_path / "out.png").read_text() == "precious"
    restore(tmp_path / "in.png", tmp_path / "out.png", weights, overwrite=True)
    assert Image.open(tmp_path / "out.png").size == (8, 8)
    with pytest.raises(InputError, match="one of the photos"):  # not even with --overwrite
        restore(tmp_path / "in.png", tmp_path / "in.png", weights, overwrite=True)


def test_what_cannot_be_is_refused_before_any_work(tmp_path):
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.fromarray(noisy_photo(8, 8)).save(photo)
    (tmp_path / "file.png").write_text("")
    (tmp_path / "empty").mkdir()
    for source, target, message in (
        (tmp_path / "nothing.png", tmp_path / "x.png", "does not exist"),
        (photo.parent, tmp_path / "file.png", "give a folder"),
        (photo, photo.parent, "name the output"),
        (photo, tmp_path / "out.tiff", "suffix"),
        (photo, tmp_path / "no" / "out.png", "create it"),
        (photo.parent, photo.parent / "out", "outside"),
        (tmp_path / "empty", tmp_path / "out", "no photos"),
    ):
        with pytest.raises(InputError, match=message):
            plan_jobs(source, target, overwrite=True)
    Image.fromarray(noisy_photo(8, 8)).save(photo.with_suffix(".bmp"))
    with pytest.raises(InputError, match="rename one"):  # a.bmp becomes a.png, which a.png is already
        plan_jobs(photo.parent, tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_corrupt_photo(tmp_path, weights, capsys):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(noisy_photo(9, 9, 1)).save(folder / "a.png")
    Image.fromarray(noisy_photo(20, 12, 2)).save(folder / "deep" / "b.bmp")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF  # the header is fine, the pixels do not inflate or fail their checksum
    (folder / "flipped.png").write_bytes(bytes(flipped))
    with pytest.raises(InputError, match=r"2 of 4 photos.*cut\.png, flipped\.png"):
        restore(folder, tmp_path / "out", weights)
    assert capsys.readouterr().err.count("skipped:") == 2
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.png", "deep/b.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "deep" / "b.png")), noisy_photo(20, 12, 2))


def test_nothing_half_written(tmp_path, weights, monkeypatch):
    Image.fromarray(noisy_photo(8, 8)).save(tmp_path / "in.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.png").write_text("old")

    def full_disk(picture, path, **options):
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    for name in ("new.png", "old.png"):
        with pytest.raises(InputError, match="No space left"):
            restore(tmp_path / "in.png", out / name, weights, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["old.png"]
    assert (out / "old.png").read_text() == "old"


def test_webp_ends_at_16383_pixels(tmp_path, weights):
    Image.new("RGB", (16_384, 1)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match=r"16383 px.*\.png"):
        restore(tmp_path / "wide.png", tmp_path / "out.webp", weights)


def test_wrong_numbers_are_one_line(tmp_path, weights):
    Image.fromarray(noisy_photo(8, 8)).save(tmp_path / "in.png")
    for changed, message in (({"tile": 30}, "try 32"), ({"steps": 0}, "--steps"), ({"samples": 0}, "--samples")):
        with pytest.raises(InputError, match=message):
            restore(tmp_path / "in.png", tmp_path / "out.png", weights, **changed)
    assert not (tmp_path / "out.png").exists()


def test_exit_code_of_a_corrupt_photo(tmp_path, weights):
    (tmp_path / "in.png").write_bytes(b"no picture")
    result = CliRunner().invoke(
        app, ["restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--checkpoint", str(weights)]
    )
    assert result.exit_code == 64
    assert "in.png is not a readable" in result.output
    assert not (tmp_path / "out.png").exists()


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoint_by_run_by_step_and_by_folder(tmp_path, weights):
    run = tmp_path / "run"
    for step in (10, 20):
        with new_checkpoint(run, step) as folder:
            shutil.copytree(weights, folder / "restorer")
    first, newest = (run / "checkpoints" / f"step_{step:06d}" for step in (10, 20))
    assert weights_folder(run) == newest / "restorer"
    assert weights_folder(first) == first / "restorer"
    assert weights_folder(weights) == weights

    file = newest / "restorer" / "weights.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(bytes(damaged))
    assert weights_folder(run) == first / "restorer"  # passed over
    with pytest.raises(CheckpointError, match="sha256"):
        weights_folder(newest)  # asked for by name: said


def test_checkpoints_that_are_none(tmp_path, weights):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for folder, message in (
        (tmp_path / "run", "no complete checkpoint"),
        (tmp_path / "other", "holds no restorer"),
        (tmp_path / "nothing", "not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_restorer(folder)
    shutil.copytree(weights, tmp_path / "bad")
    (tmp_path / "bad" / "weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises((InputError, ConfigError), match=r"weights\.safetensors|damaged"):
        load_restorer(tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text('{"kind": "oracle"}')
    with pytest.raises((InputError, ConfigError), match="oracle"):
        load_restorer(tmp_path / "bad")
