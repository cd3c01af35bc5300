"""Reading photographs that others made: capped, oriented, as RGB uint8, and with errors that name the file and the
remedy.

Only the formats in FORMATS are decoded, and no image of more than MAX_PIXELS (decompression bombs); both are checked on
the header, before any pixel is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_EXIF_ORIENTATION = 0x0112
_TAIL_BYTES = 65_536
# What ends a complete file of each format; a file cut short lacks it. TIFF and BMP have no such mark.
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def image_files(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted by relative path; hidden files and folders are skipped."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            f"{parent}{os.sep}{name}"
            for name in files
            if not name.startswith(".") and name[name.rfind(".") :].lower() in SUFFIXES
        ]
    start = len(str(folder))
    return [Path(path) for path in sorted(found, key=lambda path: path[start:])]


def open_image(source: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """Open lazily; ValueError if it cannot be opened, is of another format, or is too large. `name` is for messages."""
    shown = name or source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(source, formats=list(FORMATS))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        remedy = f"downscale it, the limit is {MAX_PIXELS:,} pixels"
        raise ValueError(f"{shown} has too many pixels ({error}): {remedy}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{shown} is not a readable {'/'.join(FORMATS)} image ({error}): remove or replace it"
        ) from error


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """As `load_rgb`, from the bytes of a file; `name` is for the ValueError."""
    with open_image(io.BytesIO(data), name) as opened:
        try:
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{name} cannot be decoded ({error}): remove or replace it") from error


def checked_size(path: Path) -> tuple[int, int]:
    """(height, width) after EXIF orientation, without decoding; ValueError also if the file is visibly cut short."""
    with open_image(path) as opened:
        width, height = opened.size
        _check_end(path, opened.format)
        # Pillow decodes a whole PNG to look for an EXIF chunk behind the pixels, where nobody writes one.
        turned = (opened.format != "PNG" or "exif" in opened.info) and opened.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    return (width, height) if turned else (height, width)


def _check_end(path: Path, form: str | None) -> None:
    """ValueError if the file lacks what ends a complete file of its format."""
    with path.open("rb") as file:
        head = file.read(12)
        length = file.seek(0, 2)
        file.seek(max(0, length - _TAIL_BYTES))
        tail = file.read()
    mark = _END_MARKS.get(form or "", b"")
    if mark not in tail or (form == "WEBP" and int.from_bytes(head[4:8], "little") + 8 > length):
        raise ValueError(f"{path} ends too early (a broken download or copy?): remove or replace it")


def load_rgb(path: Path, long_edge_px: int | None = None) -> np.ndarray:
    """Decode to [H, W, 3] uint8 RGB, EXIF orientation applied, alpha dropped.

    With `long_edge_px`, a larger image is downscaled to it (antialiased bicubic), a smaller one stays as it is.
    Raises ValueError, naming the file, if it cannot be decoded.
    """
    with open_image(path) as opened:
        try:
            if long_edge_px is not None:  # JPEG: decode at 1/2, 1/4 or 1/8 where that suffices
                opened.draft("RGB", (2 * long_edge_px, 2 * long_edge_px))
            image = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be decoded ({error}): remove or replace it") from error
    if long_edge_px is not None and max(image.size) > long_edge_px:
        scale = long_edge_px / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(image)


def file_digest(path: Path) -> bytes:
    """sha256 over the length and the first 64 KiB: enough to notice another file, cheap on a large folder."""
    with path.open("rb") as file:
        head = file.read(_TAIL_BYTES)
        return hashlib.sha256(file.seek(0, 2).to_bytes(8, "little") + head).digest()


class DecodedCache:
    """Decoded photos by path, each decoded once; the oldest go when `limit_bytes` is passed.

    Safe to read from several threads. A pickled copy (to a worker process) starts empty.
    """

    def __init__(self, limit_bytes: int, long_edge_px: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._long_edge_px = long_edge_px
        self._pixels: OrderedDict[Path, np.ndarray] = OrderedDict()

    def __reduce__(self) -> tuple[type[DecodedCache], tuple[int, int | None]]:
        return DecodedCache, (self._limit_bytes, self._long_edge_px)

    def __getitem__(self, path: Path) -> np.ndarray:
        """[H, W, 3] uint8, not to be written to."""
        pixels = self._pixels.get(path)
        if pixels is None:
            pixels = load_rgb(path, self._long_edge_px)
            pixels.flags.writeable = False
            self._pixels[path] = pixels
            while len(self._pixels) > 1 and self.held_bytes() > self._limit_bytes:
                self._pixels.popitem(last=False)
        return pixels

    def held_bytes(self) -> int:
        """Size of all that is held."""
        return sum(pixels.nbytes for pixels in list(self._pixels.values()))

    def paths(self) -> list[Path]:
        """What is held, oldest first."""
        return list(self._pixels)
