"""Checking a whole source: every image is decoded, pairs are compared, and twins are looked for by perceptual hash.

Each row gets at most one finding, in this order: it cannot be used (`envs.inspection`), it shows what a held-out row
shows (a leak), it shows what an earlier row shows (a duplicate).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np

from envs.index import Index
from envs.inspection import Look, look_at
from envs.sources.blobs import Blobs
from envs.sources.rows import Row

NEAR = 6  # bits of 64 in which the hashes of two views of one photo may differ
_BANDS = NEAR + 1  # of two hashes within NEAR bits, at least one of so many bands is equal
_CHUNK = 32


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row."""

    id: str
    code: str  # unreadable | changed | size | different | identical | leak | duplicate
    reason: str


@dataclass(frozen=True)
class Audit:
    """`kept` are the rows without a finding, with the sha256 of their files."""

    kept: list[Row]
    findings: list[Finding]


def audit(index: Index, workers: int, progress: Callable[[int], object] = lambda n: None) -> Audit:
    """Look at all rows. `progress` is told how many rows were looked at since the last call."""
    rows = list(index)
    looks = _look_at_all(index.blobs, rows, workers, progress)
    findings = {n: (look.code, look.reason) for n, look in enumerate(looks) if look.code}
    usable = [n for n in range(len(rows)) if n not in findings]
    hashes = np.array([looks[n].phash_gt if rows[n].gt else looks[n].phash for n in usable], dtype=np.uint64)
    held_out = np.array([rows[n].split in ("val", "test") for n in usable], dtype=bool)
    for n, twin, code in twins(hashes, held_out):
        what = "shows the same as held-out row" if code == "leak" else "shows the same as"
        findings[usable[n]] = (code, f"{what} {rows[usable[twin]].id}")
    kept = [
        replace(row, sha256_lq=look.sha256_lq, sha256_gt=look.sha256_gt)
        for n, (row, look) in enumerate(zip(rows, looks, strict=True))
        if n not in findings
    ]
    return Audit(kept, [Finding(rows[n].id, *findings[n]) for n in sorted(findings)])


def twins(hashes: np.ndarray, held_out: np.ndarray) -> list[tuple[int, int, str]]:
    """(row, its twin, "leak" or "duplicate") for each row to drop: those near a row that is kept.

    hashes: [N] uint64; held_out: [N] bool. Held-out rows are kept before training rows, earlier before later ones.
    """
    distinct, which = np.unique(hashes, return_inverse=True)
    near: list[list[int]] = [[n] for n in range(len(distinct))]
    for first, second in near_pairs(distinct):
        near[first].append(second)
        near[second].append(first)
    kept: dict[int, int] = {}  # distinct hash -> the row that is kept for it
    dropped: dict[int, tuple[int, str]] = {}
    for n in np.argsort(~held_out, kind="stable").tolist():
        twin = next((kept[other] for other in near[which[n]] if other in kept), None)
        if twin is None:
            kept[int(which[n])] = n
        else:
            dropped[n] = (twin, "leak" if held_out[twin] and not held_out[n] else "duplicate")
    return [(n, *dropped[n]) for n in sorted(dropped)]


def near_pairs(hashes: np.ndarray) -> set[tuple[int, int]]:
    """All pairs (i < j) of distinct hashes that differ in at most NEAR bits: candidates share one of _BANDS bands (pigeonhole)."""
    edges = np.linspace(0, 64, _BANDS + 1).astype(int)
    found: set[tuple[int, int]] = set()
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=np.uint64(2**63)))
        for members in np.split(order, starts[1:]):
            for position in range(len(members) - 1):
                rest = members[position + 1 :]
                close = np.bitwise_count(hashes[rest] ^ hashes[members[position]]) <= NEAR
                pairs = ((int(members[position]), int(other)) for other in rest[close])
                found.update((min(pair), max(pair)) for pair in pairs)
    return found


def _look_at_all(blobs: Blobs, rows: Sequence[Row], workers: int, progress: Callable[[int], object]) -> list[Look]:
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    looks: list[list[Look]] = []
    if workers <= 1:
        for chunk in chunks:
            looks.append(_look_at_some(blobs, chunk))
            progress(len(chunk))
        return list(chain.from_iterable(looks))
    context = multiprocessing.get_context("spawn")  # this process may have threads
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context) as pool:
        for found in pool.map(_look_at_some, [blobs] * len(chunks), chunks):
            looks.append(found)
            progress(len(found))
    return list(chain.from_iterable(looks))


def _look_at_some(blobs: Blobs, rows: Sequence[Row]) -> list[Look]:
    return [look_at(blobs, row) for row in rows]
