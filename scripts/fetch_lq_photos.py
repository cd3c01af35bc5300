"""Extract photographs that are degraded as they are, at 1:1, for `rlrestore data build` and scripts/bench_built_pairs.py.

    PYTHONPATH=. python scripts/fetch_lq_photos.py [data/lq]

Nothing is degraded here: the crops show what camera, web encoder or scanner left. In OUT/build: phone and camera JPEGs of wallpaper
packages at full resolution (many quantised by 16 and more), old web photos of monuments that gcompris packs as small WebP, two
faded scans. In OUT/held_out: old digital cameras and web JPEGs of opencv-doc (quantised by up to 99), hazy aerial shots, motion and
defocus blur, the Solvay scan of 1927 (visp-images-data), scikit-image's blurred clock, four of the wallpapers. A photo is on one side
only. The packaged weights have seen build and the four wallpapers as clean photos, shrunk by up to 4; nothing else of held_out.

A crop is a lossless PNG; OUT/photos.json has package, version, file, sha256 (of the original file), place, licence and author of each.
Those of opencv-doc and gcompris have no licence of their own: for use on your machine, not to be passed on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from envs.rng import generator_for
from scripts.fetch_photos import (
    Source,
    candidates,
    download,
    licence_of,
    licences,
    run,
)

SIDE = 192  # px of a crop
CANDIDATES = 64  # places tried for a crop; the one with most detail is taken
CROP_MPX = 2.0  # a photo gives one crop for each so many megapixels, at most MOST
MOST = {"build": 3, "held_out": 1}

_LOMIRI, _MATE = "usr/share/backgrounds", "usr/share/backgrounds/mate/nature"
SHOWN = (  # of these any may be passed on: CC-BY, CC-BY-SA, CC0
    "Bridge_by_Sander_Klootwijk",
    "friends_by_Aitzol_Berasategi",
    "life_by_Aitzol_Berasategi",
    "seeding_by_Clements_Engelhardt",
)
_EXAMPLES = "usr/share/doc/opencv-doc/examples"
_DATA = (
    "aero1", "aero3", "aloeL", "apple", "baboon", "blox", "board", "building", "butterfly", "ela_original", "fruits", "home", "left",
    "leuvenA", "licenseplate_motion", "messi5", "orange", "squirrel_cls", "stuff", "text_defocus", "text_motion",
)  # fmt: skip

# Looked at on contact sheets: drawings, renderings, clean studio shots and second views of a scene are left out.
SOURCES: dict[str, tuple[Source, ...]] = {
    "build": (
        Source(
            "lomiri-wallpapers-16.04",
            keep=(f"{_LOMIRI}/*.jpg",),
            drop=("*/analogpattern_*", "*/umang_*", *(f"*/{name}.jpg" for name in SHOWN)),
        ),
        Source(
            "mate-backgrounds", keep=(f"{_MATE}/*.jpg",), drop=("*/Garden.jpg", "*/YellowFlower.jpg")
        ),  # flat colour
        Source(
            "gcompris-qt-data",
            keep=(
                "clickgame.rcc:*/resource/sea[1-6].webp",
                "explore_monuments.rcc:*/resource/*/*.webp",
                "explore_world_music.rcc:*/resource/music/*.webp",
            ),
            rcc=("usr/share/gcompris-qt/rcc/*.rcc",),
        ),
    ),
    "held_out": (
        Source("lomiri-wallpapers-16.04", keep=tuple(f"{_LOMIRI}/{name}.jpg" for name in SHOWN)),
        Source(
            "opencv-doc",
            keep=(
                *(f"{_EXAMPLES}/data/{name}.jpg" for name in _DATA),
                f"{_EXAMPLES}/data/sudoku.png",
                f"{_EXAMPLES}/hfs/data/00[12].jpg",
                f"{_EXAMPLES}/text/scenetext*.jpg",
            ),
        ),
        Source("visp-images-data", keep=("*/Solvay/Solvay_conference_1927_Version2_1280x881.jpg",)),
    ),
}
# Of the scikit-image wheel; licences as skimage/data/README.txt and the docstrings of _fetchers.py state them.
WHEEL = {"clock_motion.png": "public domain (Stefan van der Walt)"}


@dataclass(frozen=True)
class Crop:
    """One row of photos.json."""

    name: str  # relative to OUT
    package: str
    version: str
    file: str
    sha256: str  # of the original bytes
    left_px: int
    top_px: int
    licence: str
    author: str


def crop_count(width: int, height: int, most: int) -> int:
    return max(1, min(most, int(width * height / (CROP_MPX * 1e6))))


def places(pixels: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(top, left) of crops that show most detail of the places that were tried, no two of which overlap; always the same."""
    rng, tried = generator_for(41, *pixels.shape[:2]), []
    for _ in range(CANDIDATES * count):
        top, left = (int(rng.integers(length - SIDE + 1)) for length in pixels.shape[:2])
        grey = pixels[top : top + SIDE, left : left + SIDE].mean(2)
        tried.append((float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()), top, left))
    chosen: list[tuple[int, int]] = []
    for _, top, left in sorted(tried, reverse=True):
        if len(chosen) < count and all(max(abs(top - y), abs(left - x)) >= SIDE for y, x in chosen):
            chosen.append((top, left))
    return chosen


def crops(blob: bytes, most: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """([SIDE, SIDE, 3] uint8, top, left), pixels as decoded; nothing if the photo is too small or is none."""
    with Image.open(io.BytesIO(blob)) as opened:
        pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    if min(pixels.shape[:2]) < SIDE:
        return
    for top, left in places(pixels, crop_count(pixels.shape[1], pixels.shape[0], most)):
        yield pixels[top : top + SIDE, left : left + SIDE], top, left


def originals(source: Source, work: Path) -> Iterator[tuple[str, str, bytes, str, str]]:
    """(version, file, bytes, licence, author) of a package's photos."""
    deb, root = download(source.package, work), work / f"{source.package}.x"
    version = run(["dpkg-deb", "-f", str(deb), "Version"], cwd=work).strip()
    if not root.exists():
        run(["dpkg-deb", "-x", str(deb), str(root)], cwd=work)
    rows = licences(root)
    for file, blob in candidates(source, root):
        yield version, file, blob, *licence_of(file, rows, root)


def wheel_originals() -> Iterator[tuple[str, str, bytes, str, str]]:
    from importlib.metadata import version

    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None
    for name, licence in WHEEL.items():
        yield (
            version("scikit-image"),
            f"data/{name}",
            (Path(spec.origin).parent / "data" / name).read_bytes(),
            licence,
            "",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("data/lq"))
    parser.add_argument(
        "--work", type=Path, help="keep downloads here (default: a temporary folder, removed at the end)"
    )
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"error: {options.out} exists: remove it, or give another folder")
    rows: list[Crop] = []
    taken: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="lq-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        new = Path(temporary) / "new"
        for side, sources in SOURCES.items():
            (new / side).mkdir(parents=True)
            packages = {source.package: originals(source, work) for source in sources}
            for package, photos in {
                **packages,
                **({"scikit-image": wheel_originals()} if side == "held_out" else {}),
            }.items():
                for version, file, blob, licence, author in photos:
                    digest = hashlib.sha256(blob).hexdigest()
                    if digest in taken:
                        continue
                    taken.add(digest)
                    stem = f"{package}__{file.replace(':', '/').rsplit('/', 1)[-1].rsplit('.', 1)[0]}-{digest[:6]}"
                    for number, (pixels, top, left) in enumerate(crops(blob, MOST[side])):
                        name = f"{side}/{stem}.{number}.png"
                        Image.fromarray(pixels).save(new / name)
                        rows.append(Crop(name, package, version, file, digest, left, top, licence, author))
        (new / "photos.json").write_text(
            json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n", "utf-8"
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        run(["mv", str(new), str(options.out.resolve())], cwd=work)
    for side in SOURCES:
        own = [row for row in rows if row.name.startswith(side)]
        print(f"{side}: {len(own)} crops of {len({row.sha256 for row in own})} photos in {options.out / side}")


if __name__ == "__main__":
    main()
