"""Env `photos`: real photographs, degraded on the fly. Works with no download at all.

The photographs are those in the scikit-image and scikit-learn wheels (WHEEL_PHOTOS: a fixed split, a licence each) and,
if given, any folder of yours, split by the hash of the file name. References exist, so full-reference rewards and
metrics apply.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from envs.crops import HELD_OUT_CANDIDATES, Photo, PhotoPool
from envs.degradations import DEGRADATIONS
from envs.images import file_digest, image_files
from envs.rng import generator_for
from envs.splits import is_held_out
from envs.types import Task

HELD_OUT_SEED = 20_251  # fixed: runs of different seeds are evaluated on the same tasks


@dataclass(frozen=True)
class WheelPhoto:
    """One photograph inside an installed wheel."""

    name: str
    package: str  # import name
    file: str  # inside the package
    split: str  # "train" | "held_out"
    licence: str  # as its package states it


# Licences: docstrings of skimage/data/_fetchers.py and skimage/data/README.txt; sklearn/datasets/images/README.txt.
# Left out: diagrams, text, microscopy, and photos that are themselves degraded (clock_motion, page).
WHEEL_PHOTOS: tuple[WheelPhoto, ...] = (
    WheelPhoto("astronaut", "skimage", "data/astronaut.png", "held_out", "public domain (NASA)"),
    WheelPhoto("chelsea", "skimage", "data/chelsea.png", "held_out", "CC0-1.0 (Stefan van der Walt)"),
    WheelPhoto("china", "sklearn", "datasets/images/china.jpg", "held_out", "CC-BY-2.0 (danielbuechele)"),
    WheelPhoto("coffee", "skimage", "data/coffee.png", "held_out", "CC0-1.0 (Rachel Michetti)"),
    WheelPhoto("brick", "skimage", "data/brick.png", "train", "CC0-1.0 (CC0Textures)"),
    WheelPhoto("camera", "skimage", "data/camera.png", "train", "CC0-1.0 (Lav Varshney)"),
    WheelPhoto("flower", "sklearn", "datasets/images/flower.jpg", "train", "CC-BY-2.0 (vultilion)"),
    WheelPhoto("grass", "skimage", "data/grass.png", "train", "CC0-1.0 (DTD / CC0Textures)"),
    WheelPhoto("gravel", "skimage", "data/gravel.png", "train", "CC0-1.0 (CC0Textures)"),
    WheelPhoto("hubble_deep_field", "skimage", "data/hubble_deep_field.jpg", "train", "public domain (NASA)"),
    WheelPhoto("moon", "skimage", "data/moon.png", "train", "public domain (NASA)"),
    WheelPhoto("motorcycle_left", "skimage", "data/motorcycle_left.png", "train", "none stated (Middlebury 2014)"),
    WheelPhoto("motorcycle_right", "skimage", "data/motorcycle_right.png", "train", "none stated (Middlebury 2014)"),
    WheelPhoto("retina", "skimage", "data/retina.jpg", "train", "CC0-1.0"),
    WheelPhoto("rocket", "skimage", "data/rocket.jpg", "train", "CC0-1.0 (SpaceX)"),
)
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class PhotosConfig:
    """Defaults: 128 px crops of the wheels' photos with mild degradations at full resolution."""

    size: int = 128  # side of a task's image, px; a multiple of `scale`
    recipe: str = "mild"  # key of envs.degradations.DEGRADATIONS
    scale: int = 1  # LQ passes through 1/scale of the resolution and is resized back
    severity: float = 1.0  # in [0, 1], from the mild end of each range to all of it
    folder: str | None = None  # your photos, e.g. data/photos (scripts/fetch_photos.py); searched recursively
    held_out_folder: str | None = None  # photos for evaluation only, all of them, e.g. data/photos_heldout
    held_out_fraction: float = 0.1  # of the folder's photos, chosen by name; 0 keeps all for training, 1 none
    include_wheels: bool = True  # use the wheels' photos (too)
    seed: int = 0  # of the training draws; held-out tasks do not depend on it


class PhotosEnv:
    """Crops of photographs with synthetic degradations. ValueError for what cannot work, with the remedy."""

    name = "photos"
    has_gt = True

    def __init__(self, config: PhotosConfig) -> None:
        if config.recipe not in DEGRADATIONS:
            raise ValueError(f"env.recipe must be one of {sorted(DEGRADATIONS)}, got {config.recipe!r}")
        if not 0.0 <= config.held_out_fraction <= 1.0:
            raise ValueError(f"env.held_out_fraction must be in [0, 1], got {config.held_out_fraction}")
        if not config.include_wheels and config.folder is None:
            raise ValueError(
                "env photos has no photos: set env.folder to a folder of photos, or env.include_wheels=true"
            )
        self.config = config
        train, held_out = wheel_photos() if config.include_wheels else ((), ())
        if config.folder is not None:
            more_train, more_held_out = folder_photos(Path(config.folder), config.held_out_fraction)
            train, held_out = (*train, *more_train), (*held_out, *more_held_out)
        if config.held_out_folder is not None:
            held_out = (*held_out, *folder_photos(Path(config.held_out_folder), 1.0)[1])
        _refuse_twins(train, held_out)
        for side, photos, remedy in (("training", train, "lower"), ("held-out", held_out, "raise")):
            if not photos:
                raise ValueError(
                    f"no {side} photo in {config.folder} at env.held_out_fraction={config.held_out_fraction}: "
                    f"{remedy} it, add photos, or set env.include_wheels=true"
                )
        recipe = replace(DEGRADATIONS[config.recipe], scale=config.scale, severity=config.severity)
        self.train_pool = PhotoPool(train, config.size, recipe)
        self.held_out_pool = PhotoPool(held_out, config.size, recipe)

    def draw(self, step: int, n: int) -> list[Task]:
        """Training tasks at positions 0..n-1 of this step, a pure function of (config.seed, step, position)."""
        return [self.train_pool.random_task(generator_for(self.config.seed, step, position)) for position in range(n)]

    def held_out(self, n: int) -> list[Task]:
        """Task i shows photo i modulo the number of held-out photos, unflipped, at a place with detail."""
        pool = self.held_out_pool
        return [
            pool.task(pool.photos[i % len(pool)], generator_for(HELD_OUT_SEED, i), HELD_OUT_CANDIDATES, flip=False)
            for i in range(n)
        ]

    def fingerprint(self) -> str:
        parts = f"photos {self.config.seed} {self.train_pool.digest()} {self.held_out_pool.digest()}"
        return hashlib.sha256(parts.encode()).hexdigest()


def _refuse_twins(train: Sequence[Photo], held_out: Sequence[Photo]) -> None:
    """ValueError if one file is on both sides under two names."""
    seen = {file_digest(photo.path): photo for photo in train}
    for photo in held_out:
        twin = seen.get(file_digest(photo.path))
        if twin is not None:
            raise ValueError(
                f"{twin.path} (training) and {photo.path} (held out) are the same file: remove one of them"
            )


def wheel_photos() -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
    """(train, held_out) of the installed wheels; ValueError if one is missing. The packages are found, not imported."""
    found: dict[str, list[Photo]] = {"train": [], "held_out": []}
    for row in WHEEL_PHOTOS:
        spec = importlib.util.find_spec(row.package)
        path = Path(spec.submodule_search_locations[0]) / row.file if spec and spec.submodule_search_locations else None
        if path is None or not path.is_file():
            raise ValueError(
                f"photo {row.name} of {_DISTRIBUTIONS[row.package]} is not installed: `pip install "
                "scikit-image scikit-learn`, or set env.include_wheels=false and env.folder to a folder of photos"
            )
        found[row.split].append(Photo(row.name, path, row.licence))
    return tuple(found["train"]), tuple(found["held_out"])


def folder_photos(folder: Path, held_out_fraction: float) -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
    """(train, held_out) of a folder of photos, split by the hash of the file name; ValueError if it holds no image."""
    if not folder.is_dir():
        raise ValueError(
            f"env.folder {folder} is not a folder: create it (scripts/fetch_photos.py) or correct the path"
        )
    files = image_files(folder)
    if not files:
        raise ValueError(f"env.folder {folder} holds no images: expected .jpg, .png, .webp, .tif or .bmp files")
    photos = [Photo(f"{folder.name}/{path.relative_to(folder).as_posix()}", path) for path in files]
    aside = [is_held_out(photo.path.name, held_out_fraction) for photo in photos]
    train = tuple(photo for photo, out in zip(photos, aside, strict=True) if not out)
    return train, tuple(photo for photo, out in zip(photos, aside, strict=True) if out)
