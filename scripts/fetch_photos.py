"""Extract real photographs from Debian packages into a folder, for training and for held-out evaluation.

In: names of Debian packages, fetched with `apt-get download` and unpacked with `dpkg-deb -x`; no root, nothing
installed. Out: one losslessly compressed WebP a photo (long edge <= 2048, antialiased), and `photos.json` with package,
version, file, sha256 (of the original file), licence and author where the package states them. Both appear under their
final name only when complete; a second run keeps what is there. Drawings, patterns and renderings are left out by the
literal lists below.

The photos are for use on your machine: the licences differ by file (see photos.json), do not commit or redistribute
them blindly.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = 60_000_000  # the largest photo of these packages has 24 Mpx

LONG_EDGE_PX = 2048
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """Where the photos of a package lie: glob patterns of kept and of left-out files (package-relative, or inside an
    .rcc).
    """

    package: str
    keep: tuple[str, ...]
    drop: tuple[str, ...] = ()
    rcc: tuple[str, ...] = ()  # Qt resource files to look into; then `keep` and `drop` match the names inside
    min_mpx: float = 0.6


# Looked at one by one on contact sheets: what is not a photograph (drawings, patterns, renderings, masks, scans with
# borders) is left out by name, and where photographs are the minority the photographs are named. Order: `drop` wins
# over `keep`.
TRAIN: tuple[Source, ...] = (
    Source(
        "lomiri-wallpapers-16.04",
        keep=("usr/share/backgrounds/*.jpg",),
        drop=("*/analogpattern_by_Peter_Nerlich.jpg", "*/umang_by_Abhishek_Mudgal.jpg"),
    ),
    Source("lomiri-wallpapers-20.04", keep=("*/Kleiber_by_Lukas_Baubkus.jpg",)),  # the other three are digital art
    Source("mate-backgrounds", keep=("usr/share/backgrounds/mate/nature/*.jpg",)),
    Source(
        "plasma-workspace-wallpapers",
        keep=tuple(
            f"usr/share/wallpapers/{name}/contents/images/*"
            for name in (
                "BytheWater",
                "ColdRipple",
                "ColorfulCups",
                "DarkestHour",
                "EveningGlow",
                "FallenLeaf",
                "Grey",
                "Kite",
                "OneStandsOut",
                "Path",
                "summer_1am",
            )
        ),
    ),
)
GCOMPRIS: tuple[Source, ...] = (
    Source(
        "gcompris-qt-data",
        keep=(
            "clickgame.rcc:*/resource/sea[2-6].webp",  # sea1 is murky
            "erase.rcc:*/resource/*.webp",
            "explore_farm_animals.rcc:*/resource/animals/*.webp",
            "explore_monuments.rcc:*/resource/*/*.webp",
            "explore_world_animals.rcc:*/resource/animals/*.webp",
            "explore_world_music.rcc:*/resource/music/*.webp",
        ),
        drop=("*/castillodeSanMarcos.webp", "*/georgeWashingtonBirthplace.webp"),  # posterised; a faded scan
        rcc=("usr/share/gcompris-qt/rcc/*.rcc",),
    ),
)
_OPENCV = "usr/share/doc/opencv-doc/examples"
HELD_OUT: tuple[Source, ...] = (
    Source(
        # One view of each stereo or motion pair; photos that are themselves degraded (blurred text, ...) stay out.
        "opencv-doc",
        keep=(
            f"{_OPENCV}/alphamat/input_images/plant.jpg",
            *(
                f"{_OPENCV}/data/{name}"
                for name in (
                    "aloeL.jpg",
                    "baboon.jpg",
                    "board.jpg",
                    "building.jpg",
                    "butterfly.jpg",
                    "chicky_512.png",
                    "ela_original.jpg",
                    "fruits.jpg",
                    "graf1.png",
                    "home.jpg",
                    "leuvenA.jpg",
                    "messi5.jpg",
                    "rubberwhale1.png",
                    "squirrel_cls.jpg",
                )
            ),
            f"{_OPENCV}/text/scenetext0[1-6].jpg",
            f"{_OPENCV}/text/scenetext_segmented_word0[1-5].jpg",
        ),
        min_mpx=0.15,
    ),
    Source("palapeli-data", keep=("usr/share/palapeli/collection/*.jpg",)),
)


@dataclass(frozen=True)
class Photo:
    """One row of photos.json."""

    name: str  # file in the output folder
    package: str
    version: str
    file: str  # path in the package; "FILE.rcc:path/inside" for a Qt resource
    sha256: str  # of the original bytes
    width_px: int  # as saved
    height_px: int
    licence: str  # "" where the package does not say
    author: str


def rcc_files(blob: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (path, bytes) of each file in a Qt resource (`rcc --format-version` 1 to 3), walking its tree from the
    root.

    Big-endian header `qres`, version, offsets of tree, data and names; a tree node has 14 bytes in version 1, else 22.
    Raises ValueError on anything that is not such a file or that uses zstd.
    """
    if len(blob) < 20 or blob[:4] != b"qres":
        raise ValueError("not a Qt resource file: the first four bytes are not 'qres'")
    version, tree, data, names = struct.unpack_from(">IIII", blob, 4)
    if version not in (1, 2, 3):
        raise ValueError(f"Qt resource version {version} is unknown, expected 1, 2 or 3")
    node_bytes = 14 if version == 1 else 22

    def name_of(offset: int) -> str:
        (length,) = struct.unpack_from(">H", blob, names + offset)
        start = names + offset + 6  # u16 length, u32 hash
        return blob[start : start + 2 * length].decode("utf-16-be")

    def walk(index: int, prefix: str, depth: int) -> Iterator[tuple[str, bytes]]:
        if depth > 64:
            raise ValueError("Qt resource tree is deeper than 64: the file is damaged")
        name_offset, flags = struct.unpack_from(">IH", blob, tree + index * node_bytes)
        path = f"{prefix}/{name_of(name_offset)}" if index else ""
        if flags & 2:
            count, first = struct.unpack_from(">II", blob, tree + index * node_bytes + 6)
            for child in range(first, first + count):
                yield from walk(child, path, depth + 1)
            return
        (data_offset,) = struct.unpack_from(">I", blob, tree + index * node_bytes + 10)
        (size,) = struct.unpack_from(">I", blob, data + data_offset)
        body = blob[data + data_offset + 4 : data + data_offset + 4 + size]
        if len(body) != size:
            raise ValueError(f"{path}: {size} bytes announced, {len(body)} present: the file is cut short")
        if flags & 4:
            raise ValueError(f"{path}: zstd-compressed Qt resources are not supported")
        yield path.lstrip("/"), zlib.decompress(body[4:]) if flags & 1 else body  # qCompress puts a u32 length first

    yield from walk(0, "", 0)


def run(command: list[str], cwd: Path) -> str:
    """Run a command, return its stdout; SystemExit with its last words if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise SystemExit(f"error: `{' '.join(command)}` failed with status {done.returncode}:\n{tail}")
    return done.stdout


def private_apt_options(state: Path) -> list[str]:
    """apt options that keep package lists and cache in `state`, so that `apt-get update` needs no root."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}/cache", "-o", "APT::Sandbox::User="]


def download(package: str, folder: Path) -> Path:
    """`apt-get download` into `folder`; when this machine has no package lists, first update them in a private
    folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{package}_*.deb"):
        return old
    plain = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
    if plain.returncode:
        options = private_apt_options(folder / "apt")
        if not any((folder / "apt" / "lists").glob("*Packages*")):
            print("  no usable package lists: running apt-get update in a private folder", flush=True)
            run(["apt-get", *options, "update"], cwd=folder)
        run(["apt-get", *options, "download", package], cwd=folder)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise SystemExit(f"error: apt-get download {package} left no .deb in {folder}")
    return found[-1]


def candidates(source: Source, root: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files of an unpacked package that `source` keeps, in sorted order, no symlinks."""

    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def kept(name: str) -> bool:
        return name.lower().endswith(PHOTO_SUFFIXES) and matches(name, source.keep) and not matches(name, source.drop)

    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    for path in files:
        name = path.relative_to(root).as_posix()
        if source.rcc:
            if matches(name, source.rcc):
                for inner, blob in sorted(rcc_files(path.read_bytes()), key=lambda item: item[0]):
                    full = f"{path.name}:{inner}"
                    if kept(full):
                        yield full, blob
        elif kept(name):
            yield name, path.read_bytes()


def shrink(blob: bytes) -> Image.Image:
    """Decode, apply the EXIF orientation, convert to RGB, and bring the long edge to at most 2048 px (Lanczos)."""
    with Image.open(io.BytesIO(blob)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    scale = LONG_EDGE_PX / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def licences(root: Path) -> list[tuple[tuple[str, ...], str, str]]:
    """(file patterns, licence, author) of each `Files:` paragraph of debian/copyright, in order: the last match
    holds.
    """
    rows = []
    for path in root.glob("usr/share/doc/*/copyright"):
        if path.is_symlink():
            continue
        for paragraph in re.split(r"\n\s*\n", path.read_text("utf-8", errors="replace")):
            fields: dict[str, list[str]] = {}
            key = ""
            for line in paragraph.splitlines():
                match = re.match(r"([A-Za-z-]+):\s*(.*)", line)
                if match:
                    key = match.group(1).lower()
                    fields[key] = [match.group(2)]
                elif key:
                    fields[key].append(line.strip())
            if "files" in fields and "license" in fields:
                patterns = tuple(" ".join(fields["files"]).split())
                author = "; ".join(part for part in fields.get("copyright", []) if part)
                rows.append((patterns, fields["license"][0].strip(), author[:200]))
    return rows


def licence_of(file: str, rows: list[tuple[tuple[str, ...], str, str]], root: Path) -> tuple[str, str]:
    """(licence, author) of one file: KDE's metadata.json or .desktop beside it, else the debian/copyright paragraph
    naming it.

    A paragraph for the whole package says nothing certain of a single photo, and is marked so.
    """
    wallpaper = root.joinpath(*file.split("/")[:4], "metadata.json")
    if "/contents/images/" in file and wallpaper.is_file():
        plugin = json.loads(wallpaper.read_text("utf-8"))["KPlugin"]
        return plugin.get("License", ""), "; ".join(author.get("Name", "") for author in plugin.get("Authors", []))
    author = ""
    desktop = (root / file).with_suffix(".desktop") if ":" not in file else root / "none"
    if desktop.is_file():
        entries = dict(re.findall(r"^X-KDE-PluginInfo-(\w+)=(.*)$", desktop.read_text("utf-8"), flags=re.MULTILINE))
        author, licence = entries.get("Author", ""), entries.get("License", "")
        if licence:
            return licence, author
    base = file.split(":")[-1].rsplit("/", 1)[-1]
    default = "not stated"
    for patterns, licence, named_author in rows:
        if any(pattern.rsplit("/", 1)[-1] == base for pattern in patterns):
            return licence, named_author
        if "*" in patterns:
            default = f"not stated for this file; package: {licence}"
    return default, author


def output_name(package: str, file: str, taken: set[str]) -> str:
    """A readable unique file name: package, and the file's own name (or its wallpaper's, when it is called
    2560x1600).
    """
    parts = re.split(r"[/:]", file)
    stem = Path(parts[-1]).stem
    if re.fullmatch(r"\d+x\d+", stem):
        stem = parts[-4]
    elif ":" in file:
        stem = f"{Path(parts[0]).stem}_{stem}"
    base = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{package}__{stem}")
    name, count = base, 2
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    taken.add(name)
    return f"{name}.webp"


def save_atomically(image: Image.Image, path: Path) -> None:
    """Save as lossless WebP under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="WEBP", lossless=True, quality=30, method=2)  # quality is the effort when lossless
    temporary.replace(path)


def fetch(source: Source, out: Path, work: Path, known: dict[str, Photo], seen: set[str]) -> list[Photo]:
    """Extract one package; `known` holds the rows of an earlier run by sha256, `seen` the hashes already taken."""
    deb = download(source.package, work)
    version = run(["dpkg-deb", "-f", str(deb), "Version"], cwd=work).strip()
    root = work / f"{source.package}.x"
    if not root.exists():
        temporary = work / f".{source.package}.x.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        run(["dpkg-deb", "-x", str(deb), str(temporary)], cwd=work)
        temporary.rename(root)
    rows = licences(root)
    taken = {Path(p.name).stem for p in known.values()}
    photos: list[Photo] = []
    for file, blob in candidates(source, root):
        sha256 = hashlib.sha256(blob).hexdigest()
        if sha256 in seen:
            continue
        seen.add(sha256)
        licence, author = licence_of(file, rows, root)
        if sha256 in known:
            photos.append(replace(known[sha256], licence=licence, author=author))
            continue
        try:
            with Image.open(io.BytesIO(blob)) as opened:
                mpx = opened.width * opened.height / 1e6
            if mpx < source.min_mpx:
                continue
            image = shrink(blob)
        except (OSError, Image.DecompressionBombError) as error:
            print(f"  left out {file}: {error}", file=sys.stderr, flush=True)
            continue
        name = output_name(source.package, file, taken)
        save_atomically(image, out / name)
        photos.append(Photo(name, source.package, version, file, sha256, image.width, image.height, licence, author))
        if sys.stdout.isatty():
            print(f"\r  {len(photos)} photos", end="", flush=True)
    print(f"\r  {source.package} {version}: {len(photos)} photos", flush=True)
    return photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", nargs="?", type=Path, help="folder to write (default data/photos; with --held-out data/photos_heldout)"
    )
    parser.add_argument(
        "--held-out", action="store_true", help="fetch the evaluation packages instead: opencv-doc, palapeli-data"
    )
    parser.add_argument(
        "--with-gcompris", action="store_true", help="add 106 photos of gcompris-qt-data (no licence stated for each)"
    )
    parser.add_argument(
        "--work", type=Path, default=None, help="keep downloads here (default: a temporary folder, removed at the end)"
    )
    arguments = parser.parse_args()
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"error: {' and '.join(missing)} not found: this script needs Debian or Ubuntu (or such a container). "
            "Elsewhere, point the `photos` env at a folder of your own photos instead (env.folder=...)."
        )
    sources = HELD_OUT if arguments.held_out else TRAIN + (GCOMPRIS if arguments.with_gcompris else ())
    out: Path = arguments.out or Path("data/photos_heldout" if arguments.held_out else "data/photos")
    out.mkdir(parents=True, exist_ok=True)
    index = out / "photos.json"
    rows = [Photo(**row) for row in json.loads(index.read_text("utf-8"))] if index.is_file() else []
    known = {row.sha256: row for row in rows if (out / row.name).is_file()}
    with tempfile.TemporaryDirectory(prefix="photos-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        photos: list[Photo] = []
        seen: set[str] = set()
        for number, source in enumerate(sources, 1):
            print(f"[{number}/{len(sources)}] {source.package}", flush=True)
            photos += fetch(source, out, work, known, seen)
    keep = {**known, **{photo.sha256: photo for photo in photos}}
    temporary_index = index.with_name(".photos.json.tmp")
    table = [asdict(photo) for photo in keep.values()]
    temporary_index.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary_index.replace(index)
    megapixels = sum(p.width_px * p.height_px for p in keep.values()) / 1e6
    print(f"{len(keep)} photos, {megapixels:.0f} Mpx in {out}; licences in {index}")


if __name__ == "__main__":
    main()
