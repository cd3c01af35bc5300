"""Tar shards in webdataset's form: `KEY.lq.png` and `KEY.gt.png`, with `KEY.json` for the rest.

Members are found once and then read in place by offset, so access is random and nothing is unpacked. Refused: compressed
tars (no offsets), links and devices, member names that lead out, and pickles, which are never opened.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from envs.images import SUFFIXES
from envs.pairing import GT_NAMES, LQ_NAMES, normalised
from envs.sources.rows import FIELDS, BadRow, Row, check_id, parse_types, split_of_folders, types_of_folders

MAX_MEMBER, MAX_TEXT = 2**28, 2**20  # bytes of an image, of a .json
_PICKLES = ("pkl", "pickle", "pyd", "pt", "pth", "npy", "npz")
_TEXT = tuple(name for name in FIELDS if name not in ("id", "lq", "gt", "types"))


def read_shards(files: Sequence[Path], root: Path) -> Iterator[Row | BadRow]:
    """Rows of all shards; ids are the keys, which may not occur in two shards."""
    for file in files:
        yield from _read_shard(file, file.relative_to(root).as_posix())


def _read_shard(file: Path, relative: str) -> Iterator[Row | BadRow]:
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if reason := _refused(member):
                    yield BadRow(str(file), member.name, reason)
                    continue
                if not member.isfile():
                    continue
                key, role = _key_and_role(member.name)
                sample = samples.setdefault(key, {})
                if role in ("lq", "gt"):
                    sample[role] = f"{relative}\t{member.offset_data}+{member.size}"
                elif role == "json":
                    content = tar.extractfile(member)
                    assert content is not None
                    sample["json"] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        yield BadRow(str(file), "-", f"is not a readable uncompressed tar ({error}): unpack or replace it")
    for key, sample in samples.items():
        try:
            yield _row(key, sample)
        except (ValueError, TypeError) as error:
            yield BadRow(str(file), key, str(error))


def _refused(member: tarfile.TarInfo) -> str:
    """Why a member is not looked at; "" if it is."""
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        return "the name leads out of the archive: refused"
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname}: refused"
    if not (member.isfile() or member.isdir()):
        return "is a device: refused"
    if member.sparse is not None:
        return "is a sparse file, whose bytes are not where they seem to be: refused"
    limit = MAX_TEXT if parts[-1].endswith(".json") else MAX_MEMBER
    if member.size > limit:
        return f"has {member.size:,} bytes, the limit is {limit:,}"
    if parts[-1].rsplit(".", 1)[-1].lower() in _PICKLES:
        return "may hold a pickle, which is never opened"
    return ""


def _key_and_role(name: str) -> tuple[str, str]:
    """webdataset's split at the first dot of the file name: "haze/0001.lq.png" -> ("haze/0001", "lq")."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    key = f"{folder}/{stem}".removeprefix("./") if folder not in ("", ".") else stem
    words = extension.lower().split(".")
    if words == ["json"]:
        return key, "json"
    if "." + words[-1] not in SUFFIXES:
        return key, ""
    label = normalised("".join(words[:-1]))
    return key, "lq" if label in LQ_NAMES or not label else "gt" if label in GT_NAMES else ""


def _row(key: str, sample: dict[str, Any]) -> Row:
    if "lq" not in sample:
        raise ValueError("has no LQ member: expected KEY.lq.png (and KEY.gt.png)")
    told = json.loads(sample["json"]) if "json" in sample else {}
    if not isinstance(told, dict):
        raise ValueError("its .json is no object")
    types = told.get("types", told.get("type"))
    more = {name: str(told[name]) for name in _TEXT if told.get(name)}
    return Row(
        id=check_id(str(told.get("id") or key)),
        lq=sample["lq"],
        gt=sample.get("gt", ""),
        types=parse_types(types) if types else types_of_folders(key),
        **{"split": split_of_folders(key), **more},
    )
