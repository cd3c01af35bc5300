"""The pure parts of scripts/fetch_lq_photos.py and scripts/bench_built_pairs.py: places of crops, twins, the table's signs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from scripts.bench_built_pairs import BASE, BUILT, clean_twins, interval, table
from scripts.fetch_lq_photos import SIDE, SOURCES, crop_count, crops, places


def test_a_crop_shows_detail_at_the_scale_of_the_camera() -> None:
    pixels = np.full((800, 900, 3), 120, np.uint8)
    pixels[500:, 600:] = np.random.default_rng(0).integers(0, 255, (300, 300, 3))  # the only place with detail
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    ((view, top, left),) = crops(data.getvalue(), most=3)  # 0.7 Mpx: one crop
    assert np.array_equal(view, pixels[top : top + SIDE, left : left + SIDE]), "pixels as decoded"
    assert view.std() > 30
    small = io.BytesIO()
    Image.fromarray(pixels[: SIDE - 1]).save(small, "PNG")
    assert list(crops(small.getvalue(), most=1)) == []


def test_crops_of_a_photo_do_not_overlap_and_are_as_many_as_it_is_large() -> None:
    assert [crop_count(*size, 3) for size in ((640, 480), (2000, 2000), (4000, 3000))] == [1, 2, 3]
    found = places(np.random.default_rng(1).integers(0, 255, (1200, 1500, 3), np.uint8), 3)
    assert len(found) == 3
    assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= SIDE for n, a in enumerate(found) for b in found[:n])


def test_wallpapers_that_are_held_out_are_not_built_from() -> None:
    (build,) = (source for source in SOURCES["build"] if source.package == "lomiri-wallpapers-16.04")
    (held_out,) = (source for source in SOURCES["held_out"] if source.package == build.package)
    assert all(any(file.endswith(pattern.lstrip("*")) for pattern in build.drop) for file in held_out.keep)


def test_the_synthetic_arm_gets_the_photos_of_the_pairs_and_no_held_out_one() -> None:
    low = [
        {"name": "build/a.0.png", "sha256": "1"},
        {"name": "build/a.1.png", "sha256": "1"},
        {"name": "held_out/b.png", "sha256": "2"},
    ]
    clean = [{"name": "x.webp", "sha256": "1"}, {"name": "y.webp", "sha256": "2"}, {"name": "z.webp", "sha256": "3"}]
    assert clean_twins(low, clean) == ["x.webp"]


def test_a_difference_is_paired_and_averages_seeds_first() -> None:
    """12 photos, 2 seeds: built is better by 1 and 3 on each, whatever the photo's own level: 2 exactly."""
    level = np.arange(12.0)[:, None] * 100
    base, built = np.repeat(level, 2, 1), level + np.array([1.0, 3.0])
    assert interval(built, base, 1) == "**+2.0 [+2.0, +2.0]**"
    noise = np.random.default_rng(0).normal(size=(12, 2))
    assert "**" not in interval(base + noise - noise.mean(), base, 2)
    built[3] = np.nan  # no target: left out, not 0
    assert interval(built, base, 1) == "**+2.0 [+2.0, +2.0]**"


def test_the_table_compares_every_arm_with_the_base_and_built_with_the_rest() -> None:
    zero = {"niqe": np.zeros((12, 2)), "psnr_rgb": np.zeros((12, 2))}
    arms = {BASE: zero, "mild": {k: v + 1 for k, v in zero.items()}, BUILT: {k: v - 2 for k, v in zero.items()}}
    low = {"niqe": np.ones((12, 1)), "psnr_rgb": np.where(np.arange(12) < 5, np.nan, 1.0)[:, None]}
    head, _, niqe, psnr = table(low, arms, {"niqe": False, "psnr_rgb": True}).splitlines()
    assert head.split(" | ")[2:] == ["LQ", "base", "mild", "built", "mild - base", "built - base", "built - mild |"]
    assert niqe.startswith("| `niqe` (down) | 12 | 1.000 | 0.000 | 1.000 | -2.000 | **+1.000 ")
    assert "**-2.000 [-2.000, -2.000]** | **-3.000 [-3.000, -3.000]** |" in niqe
    assert psnr.startswith("| `psnr_rgb` (up), to the target | 7 |")
