"""`rlrestore restore`: photos in, restored photos out, nothing half-written and nothing replaced unasked."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm

from envs.images import SUFFIXES, checked_size, image_files, load_rgb, open_image
from envs.sources.rows import parse_types
from rlrestore.build import RESTORERS, best_device, build_restorer
from rlrestore.checkpoint import MANIFEST, verify
from rlrestore.config.files import Plugin
from rlrestore.errors import InputError
from rlrestore.quiet import quiet
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.colour import FIXES
from rlrestore.restorers.restoration import check_tiling, restore_pixels, tile_count
from rlrestore.rundir import newest_checkpoint

# What is written, by suffix: Pillow's format, whether it has an alpha channel, its longest side.
OUTPUTS = {
    ".jpeg": ("JPEG", False, 65_500), ".jpg": ("JPEG", False, 65_500), ".png": ("PNG", True, 2**31 - 1),
    ".webp": ("WEBP", True, 16_383),
}  # fmt: skip
QUALITY = 95  # of JPEG and WebP
CHECKPOINTS = "give a run, a checkpoints/step_N, or a folder with weights that rlrestore wrote"


@dataclass(frozen=True)
class Job:
    source: Path
    target: Path


@dataclass(frozen=True)
class Settings:
    seed: int
    steps: int
    samples: int
    tile: int  # pixels, as overlap
    overlap: int
    types: tuple[str, ...] = ()  # degradation types of all photos


@dataclass(frozen=True)
class Photo:
    """What is kept of a file. Other metadata, such as the place where it was taken, is left behind."""

    rgb_HW3: np.ndarray  # uint8, upright
    alpha_HW: np.ndarray | None  # uint8; returned as it was
    icc: bytes | None  # colour profile of rgb_HW3: values are restored as they are and keep their profile


def run_restore(
    source: Path, target: Path, checkpoint: Path | None, seed: int, steps: int, samples: int, tile: int, overlap: int,
    overwrite: bool, colour_fix: str | None = None, types: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Restore `source`, a photo or a folder of them, to `target`.

    InputError (before any work, where possible) for what the user has to mend; also at the end, if photos of a folder
    could not be read: the others are written.
    """
    quiet()
    for name, value in (("steps", steps), ("samples", samples)):
        if value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    jobs = plan_jobs(source, target, overwrite)
    try:
        types = tuple(parse_types(list(types)).split("|")) if types else ()
    except ValueError as error:
        raise InputError(f"--type: {error}") from error
    if colour_fix is not None and colour_fix not in FIXES:
        raise InputError(f"--colour-fix {colour_fix} is unknown: choose one of {', '.join(FIXES)}")
    restorer = load_restorer(checkpoint)
    restorer.colour_fix = restorer.colour_fix if colour_fix is None else colour_fix
    try:
        check_tiling(tile, overlap, restorer.multiple)
    except ValueError as error:
        raise InputError(f"--tile {tile} --overlap {overlap}: {error}") from error
    try:
        restorer.times(steps, (tile, tile))
    except ValueError as error:
        raise InputError(f"--steps {steps}: {error}") from error
    failures = restore_all(restorer, jobs, Settings(seed, steps, samples, tile, overlap, types))
    if failures and source.is_dir():
        names = ", ".join(path.name for path in list(failures)[:5]) + (", ..." if len(failures) > 5 else "")
        raise InputError(f"{len(failures)} of {len(jobs)} photos could not be restored (reasons above): {names}")
    if failures:
        raise InputError(failures[source])


# -- what to do ----------------------------------------------------------------------------------------------------


def plan_jobs(source: Path, target: Path, overwrite: bool) -> list[Job]:
    """Pairs of files. InputError for a clash of any kind; writes nothing."""
    if source.is_dir():
        jobs = _folder_jobs(source, target)
    elif source.is_file():
        jobs = [_file_job(source, target)]
    else:
        raise InputError(f"{source} does not exist; give a photo or a folder of photos")
    originals = {job.source.resolve() for job in jobs}
    for job in jobs:
        if job.target.resolve() in originals:
            raise InputError(f"{job.target} is one of the photos to restore: choose another OUT, so that it is kept")
    existing = [job.target for job in jobs if job.target.exists()]
    if existing and not overwrite:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise InputError(f"{existing[0]}{more} exist(s) already: add --overwrite to replace, or choose another OUT")
    for folder in existing:
        if folder.is_dir():
            raise InputError(f"{folder} is a folder, where a restored photo would go: choose another OUT")
    return jobs


def _file_job(source: Path, target: Path) -> Job:
    if source.suffix.lower() not in SUFFIXES:
        raise InputError(f"{source} is not a photo by its name: known are {', '.join(SUFFIXES)}")
    if target.is_dir():
        raise InputError(f"{target} is a folder and {source} a file: name the output, e.g. {target / source.stem}.png")
    if target.suffix.lower() not in OUTPUTS:
        raise InputError(f"cannot write {target}: its suffix must be one of {', '.join(OUTPUTS)}")
    if not target.parent.is_dir():
        raise InputError(f"folder {target.parent} does not exist: create it, or choose another OUT")
    return Job(source, target)


def _folder_jobs(source: Path, target: Path) -> list[Job]:
    """The same relative paths; formats that are not written become PNG."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{source} is a folder and {target} a file: give a folder for the outputs")
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} lies in {source}, so outputs would be the next inputs: choose a folder outside")
    jobs: dict[Path, Job] = {}
    for path in image_files(source):
        relative = path.relative_to(source)
        output = target / (relative if path.suffix.lower() in OUTPUTS else relative.with_suffix(".png"))
        if output in jobs:
            raise InputError(f"{jobs[output].source} and {path} would both be written to {output}: rename one of them")
        jobs[output] = Job(path, output)
    if not jobs:
        raise InputError(f"{source} has no photos ({', '.join(SUFFIXES)})")
    return list(jobs.values())


def load_restorer(checkpoint: Path | None) -> Restorer:
    """From a run (its newest checkpoint), a checkpoint folder, a folder with weights, or None: the packaged weights.

    InputError or CheckpointError if there is none, or if it is damaged.
    """
    folder = None if checkpoint is None else weights_folder(checkpoint)
    kind = "embedded" if folder is None else _kind(folder)
    config_class = RESTORERS[kind][0]
    plugin = Plugin(kind, config_class() if folder is None else config_class(weights=str(folder)))
    try:
        return build_restorer(plugin).to(best_device())
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:  # not the tensors that config.json speaks of
        raise InputError(f"the weights in {folder} are damaged ({error}): choose another --checkpoint") from error


def weights_folder(checkpoint: Path) -> Path:
    """The folder with config.json and weights.safetensors that `--checkpoint` means."""
    if not checkpoint.is_dir():
        raise InputError(f"--checkpoint {checkpoint} is not a folder; {CHECKPOINTS}")
    if _has_weights(checkpoint):
        return checkpoint
    if (checkpoint / "checkpoints").is_dir():
        newest, _ = newest_checkpoint(checkpoint)
        if newest is None:
            raise InputError(f"--checkpoint {checkpoint}: this run has no complete checkpoint yet")
        checkpoint = newest
    elif (checkpoint / MANIFEST).is_file():
        verify(checkpoint)
    if _has_weights(checkpoint / "restorer"):
        return checkpoint / "restorer"
    raise InputError(
        f"--checkpoint {checkpoint} holds no restorer (config.json and weights.safetensors); {CHECKPOINTS}"
    )


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "weights.safetensors").is_file()


def _kind(folder: Path) -> str:
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text())["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} names no kind of restorer; {CHECKPOINTS}") from error
    if kind not in RESTORERS:
        raise InputError(f"{file}: restorer kind '{kind}' is unknown; known: {', '.join(sorted(RESTORERS))}")
    return kind


# -- doing it ------------------------------------------------------------------------------------------------------


def restore_all(restorer: Restorer, jobs: list[Job], settings: Settings) -> dict[Path, str]:
    """All photos that can be read, with one bar over all tiles; returns the others with reasons."""
    failures: dict[Path, str] = {}
    tile_counts: dict[Path, int] = {}
    for job in jobs:
        try:
            tile_counts[job.source] = _checked_tiles(job, settings, restorer.multiple)
        except (OSError, ValueError) as error:
            failures[job.source] = str(error)
    with tqdm(total=sum(tile_counts.values()), unit="tile", smoothing=0.1, disable=not tile_counts) as bar:
        for job in jobs:
            if job.source not in tile_counts:
                continue
            bar.set_description(job.source.name)
            try:
                photo = read_photo(job.source)
            except (OSError, ValueError) as error:
                failures[job.source] = str(error)
                bar.total -= tile_counts[job.source]
                continue
            restored = _restore(restorer, photo, settings, bar.update)
            write_photo(job.target, restored)
    if len(jobs) > 1:
        for reason in failures.values():
            print(f"skipped: {reason}", file=sys.stderr)
    if len(failures) < len(jobs):
        first = next(job.target for job in jobs if job.source not in failures)
        print(f"restored {len(jobs) - len(failures)} of {len(jobs)}: {first}" + (" ..." if len(jobs) > 1 else ""))
    return failures


def _checked_tiles(job: Job, settings: Settings, multiple: int) -> int:
    """Number of tiles, from the header alone; ValueError if the file is visibly broken or the result has no place."""
    height, width = checked_size(job.source)
    longest = OUTPUTS[job.target.suffix.lower()][2]
    if max(height, width) > longest:
        raise ValueError(f"{job.source} is {width}x{height}; {job.target.suffix} ends at {longest} px: write a .png")
    return tile_count(height, width, settings.tile, settings.overlap, multiple)


def _restore(restorer: Restorer, photo: Photo, settings: Settings, progress: Callable[[], object]) -> Photo:
    rgb = restore_pixels(restorer, photo.rgb_HW3, **vars(settings), progress=progress)
    return Photo(rgb, photo.alpha_HW, photo.icc)


def read_photo(path: Path) -> Photo:
    """ValueError, naming the file, if it cannot be decoded."""
    rgb = load_rgb(path)
    with open_image(path) as opened:
        icc = opened.info.get("icc_profile") if opened.mode in ("RGB", "RGBA") else None  # of others it is not of RGB
        if "A" not in opened.getbands() and "transparency" not in opened.info:
            return Photo(rgb, None, icc)
        alpha = np.array(ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A"))
    return Photo(rgb, None if alpha.min() == 255 else alpha, icc)


def write_photo(target: Path, photo: Photo) -> None:
    """By suffix, whole or not at all; InputError if that fails. JPEG has no alpha: there the photo lies on white."""
    form, has_alpha, _ = OUTPUTS[target.suffix.lower()]
    picture = Image.fromarray(photo.rgb_HW3)
    if photo.alpha_HW is not None:
        picture.putalpha(Image.fromarray(photo.alpha_HW))
        if not has_alpha:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    options: dict[str, Any] = {"icc_profile": photo.icc} if photo.icc else {}
    if form != "PNG":
        options |= {"quality": QUALITY, **({"subsampling": 0} if form == "JPEG" else {})}
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, format=form, **options)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"cannot write {target} ({error.strerror or error}): choose another OUT") from error
    finally:
        temporary.unlink(missing_ok=True)
