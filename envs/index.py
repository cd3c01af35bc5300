"""The index of a source: one Arrow table, a row a pair, sorted by id; read again only when the source has changed.

It is kept as an Arrow file in the cache folder and mapped into memory, so opening it costs no parsing, workers share its
pages, and any row is there in constant time. A source is

    a manifest      x.json, x.jsonl, x.csv, x.parquet, or a folder with exactly one file `manifest.*`
    tar shards      x.tar, or a folder of them
    Parquet         files with image columns, or a folder of them
    Hugging Face    a folder written by `datasets.save_to_disk`, or hf:owner/name (`envs.sources.hub`)
    folders         of images, whose layout is found by itself (`envs.sources.folders`)

The index follows files that are added, removed or replaced: it remembers size and time of manifests and archives, and
the times of all folders. Images that are overwritten in place are not noticed; they are checked when they are decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from envs.sources.blobs import Blobs
from envs.sources.folders import read_folder
from envs.sources.hub import PREFIX, fetched
from envs.sources.manifests import SUFFIXES, read_manifest
from envs.sources.rows import FIELDS, BadRow, Row, primary_type, without_twins
from envs.sources.shards import read_shards
from envs.sources.tables import holds_images, read_hub_folder, read_parquet

VERSION = 1  # of the cached form
_SCHEMA = pa.schema([(name, pa.string()) for name in FIELDS])
_BAD_KEPT = 10_000


class Index:
    """Rows by number. `bad` lists what was left out and why; `blobs` reads the images."""

    def __init__(self, table: pa.Table, bad: Sequence[BadRow], bad_count: int, root: Path) -> None:
        self.table, self.bad, self.bad_count, self.root = table, tuple(bad), bad_count, root
        self.blobs = Blobs(root)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> Row:
        return Row(*(self.table.column(name)[number].as_py() for name in FIELDS))

    def __iter__(self) -> Iterator[Row]:
        for batch in self.table.to_batches(max_chunksize=4096):
            for values in zip(*(batch.column(name).to_pylist() for name in FIELDS), strict=True):
                yield Row(*values)

    def column(self, name: str) -> list[str]:
        return self.table.column(name).to_pylist()

    def types(self) -> Counter[str]:
        """Rows by primary type."""
        known: dict[str, str] = {}
        return Counter(known.setdefault(types, primary_type(types)) for types in self.column("types"))

    def digest(self) -> str:
        """sha256 over all fields of all rows."""
        digest = hashlib.sha256()
        for name in FIELDS:
            digest.update(("\0".join(self.column(name)) + "\1").encode())
        return digest.hexdigest()


def open_index(source: str | Path, root: str | Path | None = None, cache: Path | None = None) -> Index:
    """The index of a source; from the cache if that is up to date.

    root: what paths in a manifest are relative to; default: the manifest's folder. cache: a folder, default
    `cache_folder()`. ValueError, naming source and remedy, if the source cannot be read or has no usable row.
    """
    if str(source).startswith(PREFIX):
        source = fetched(str(source), cache or cache_folder())
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} does not exist: correct the path of the manifest, archive or folder")
    manifest, base = _manifest_of(source), source if source.is_dir() else source.parent
    base = Path(root) if root is not None else base
    key = hashlib.sha256(f"{VERSION} {source.resolve()} {base.resolve()}".encode()).hexdigest()[:24]
    file = (cache or cache_folder()) / f"index-{key}.arrow"
    cached = _load(file, base)
    if cached is not None:
        return cached
    rows, bad = without_twins(_rows(source, manifest, base), source)
    if not rows:
        first = f"; the first of {len(bad)}: {bad[0]}" if bad else ""
        raise ValueError(f"{source} has no usable row{first}")
    columns = [[getattr(row, name) for row in rows] for name in FIELDS]
    watched = [source, manifest] if manifest else _watched(source)
    meta = {
        "signature": _signature([path for path in watched if path]),
        "bad": [vars(item) for item in bad[:_BAD_KEPT]],
        "bad_count": len(bad),
    }
    table = pa.table([pa.array(values, pa.string()) for values in columns], schema=_SCHEMA)
    _save(table.replace_schema_metadata({"rlrestore": json.dumps(meta)}), file)
    return Index(table, bad, len(bad), base)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/rlrestore`, by default `~/.cache/rlrestore`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlrestore"


# -- which reader --------------------------------------------------------------------------------------------------


def _manifest_of(source: Path) -> Path | None:
    """The manifest that a source is, or that its folder holds."""
    if source.is_file():
        return source if source.suffix in SUFFIXES and not _is_table(source) else None
    found = [path for path in sorted(source.glob("manifest.*")) if path.suffix in SUFFIXES and not _is_table(path)]
    if len(found) > 1:
        raise ValueError(f"{source} has {len(found)} manifests ({', '.join(p.name for p in found)}): name one of them")
    return found[0] if found else None


def _is_table(file: Path) -> bool:
    return file.suffix == ".parquet" and holds_images(file)


def _rows(source: Path, manifest: Path | None, base: Path) -> Iterator[Row | BadRow]:
    if manifest is not None:
        return read_manifest(manifest, base)
    if source.is_file():
        if source.suffix == ".tar":
            return read_shards([source], base)
        if source.suffix == ".parquet":
            return read_parquet([source], base)
        known = ", ".join((*SUFFIXES, ".tar"))
        raise ValueError(f"{source} is no manifest or archive: known are {known} (uncompressed), or a folder")
    if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
        return read_hub_folder(source)
    for suffix, read in ((".tar", read_shards), (".parquet", read_parquet)):
        files = sorted(source.rglob(f"*{suffix}"))
        if files:
            return read(files, source)
    return read_folder(source)


# -- the cache -----------------------------------------------------------------------------------------------------


def _watched(source: Path) -> list[Path]:
    """What tells that a source has changed: archives by themselves, folders of images by all their folders."""
    if source.is_file():
        return [source]
    folders, archives = [source], []
    for parent, names, files in os.walk(source):
        names[:] = sorted(name for name in names if not name.startswith("."))
        folders += [Path(parent) / name for name in names]
        archives += [Path(parent) / name for name in sorted(files) if name.endswith((".tar", ".parquet", ".arrow"))]
    return folders + archives


def _signature(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    return [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]


def _load(file: Path, root: Path) -> Index | None:
    """The cached index, if there is one and nothing has changed since."""
    try:
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        meta = json.loads(table.schema.metadata[b"rlrestore"])
        if _signature([Path(path) for path, *_ in meta["signature"]]) != [tuple(i) for i in meta["signature"]]:
            return None
        bad = [BadRow(**item) for item in meta["bad"]]
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):  # absent, of another version, or damaged
        return None
    return Index(table, bad, meta["bad_count"], root)


def _save(table: pa.Table, file: Path) -> None:
    """Atomically; a cache folder that cannot be written costs time, nothing else."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
