"""`rlrestore data check`: decode everything, report what is wrong by category, write a manifest of the rest."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from envs.audit import Audit, audit
from envs.index import Index, open_index
from envs.sources.manifests import to_record
from envs.sources.rows import primary_type
from rlrestore.errors import InputError

CODES = ("unreadable", "changed", "size", "different", "identical", "leak", "duplicate")


def run_check(source: Path, root: Path | None, out: Path, workers: int, overwrite: bool) -> None:
    """Writes OUT (JSONL) and OUT.findings.jsonl; InputError if they exist, or if the source cannot be read."""
    report = out.with_name(out.name + ".findings.jsonl")
    for path in (out, report):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: add --overwrite to replace it, or choose another --out")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} does not exist: create it, or choose another --out")
    index = open_user_index(source, root)
    with tqdm(total=len(index), desc="checking", unit="pair") as bar:
        found = audit(index, workers, bar.update)
    _write(out, [to_record(row) for row in found.kept])
    _write(report, [vars(item) for item in index.bad] + [vars(item) for item in found.findings])
    print(table(index, found))
    print(f"\nclean manifest  {out}\nfindings        {report}\nto train on it  env.kind=manifest env.source={out} "
          f"env.root={index.root}")  # fmt: skip


def open_user_index(source: Path, root: Path | None) -> Index:
    """`open_index`, with the user's errors as InputError."""
    try:
        return open_index(source, root)
    except ValueError as error:
        raise InputError(str(error)) from error


def table(index: Index, found: Audit) -> str:
    """Rows by primary type and finding, and their sum."""
    types = dict(zip(index.column("id"), map(primary_type, index.column("types")), strict=True))
    counts = Counter((types[item.id], item.code) for item in found.findings)
    kept = Counter(primary_type(row.types) for row in found.kept)
    lines = ["type".ljust(14) + "".join(name.rjust(12) for name in ("rows", *CODES, "kept"))]
    for name, rows in sorted(index.types().items()):
        cells = [rows, *(counts[name, code] for code in CODES), kept[name]]
        lines.append(name.ljust(14) + "".join(str(cell).rjust(12) for cell in cells))
    total = [len(index), *(sum(counts[name, code] for name in index.types()) for code in CODES), len(found.kept)]
    lines.append("all".ljust(14) + "".join(str(cell).rjust(12) for cell in total))
    if index.bad_count:
        lines.append(f"and {index.bad_count} rows that cannot be read as rows, e.g. {index.bad[0]}")
    return "\n".join(lines)


def _write(path: Path, records: list[dict[str, str]]) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(temporary, path)
