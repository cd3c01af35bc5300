"""Duels by people: two results of one photo side by side, without names, in an order that chance chose; decisions by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from envs.pipeline.compare import Entry
from envs.pipeline.process import Photo, png_of
from envs.pipeline.review import PageServer
from envs.pipeline.store import BuildFolder, digest_of

VERDICTS = ("a", "b", "tie", "undo")


@dataclass(frozen=True)
class Duel:
    """Results of the providers number i and j to one photo; the blobs stand as they are shown."""

    id: str  # digest of photo, providers and pictures: another candidate is another duel
    photo: str
    types: str
    i: int
    j: int
    lq: str
    left: str
    right: str
    swapped: bool  # whether the left one is j's


def duels_of(photos: Sequence[tuple[Photo, Mapping[str, Entry]]], folder: BuildFolder) -> list[Duel]:
    """All pairs of answers to each photo; their pictures are put into the folder's blobs."""
    found = []
    for photo, entries in photos:
        blobs = [folder.blobs.put(png_of(entry.pair.gt)) if entry.pair else "" for entry in entries.values()]
        lq = folder.blobs.put(photo.png)
        for i, j in combinations(range(len(blobs)), 2):
            if blobs[i] and blobs[j]:
                own = digest_of(photo.id, sorted(entries), i, j, blobs[i], blobs[j])
                swapped = int(own[:8], 16) % 2 == 1
                left, right = (blobs[j], blobs[i]) if swapped else (blobs[i], blobs[j])
                found.append(Duel(own, photo.id, photo.types, i, j, lq, left, right, swapped))
    return found


class DuelServer(PageServer):
    """Shows each duel that is not decided yet."""

    page = "duel.html"

    def __init__(self, duels: Sequence[Duel], folder: BuildFolder, reviewer: str, port: int = 0) -> None:
        self.duels, self.reviewer = list(duels), reviewer
        super().__init__(folder, {name for duel in duels for name in (duel.lq, duel.left, duel.right)}, port)

    def waiting(self) -> list[dict[str, Any]]:
        """Without the providers' names: whoever decides must not know them."""
        decided = verdicts_of(self.folder)
        return [
            {"id": duel.id, "types": duel.types, "lq": duel.lq, "a": duel.left, "b": duel.right}
            for duel in self.duels
            if duel.id not in decided
        ]

    def decide(self, given: Mapping[str, Any]) -> None:
        if given.get("id") not in {duel.id for duel in self.duels} or given.get("verdict") not in VERDICTS:
            raise ValueError(f"{given.get('verdict')!r} of {given.get('id')!r} is no verdict")
        self.folder.decisions.append({"id": given["id"], "verdict": given["verdict"], "reviewer": self.reviewer})


def verdicts_of(folder: BuildFolder) -> dict[str, str]:
    """Duel -> a, b or tie: the last word, unless it was taken back."""
    latest: dict[str, str] = {}
    for record in folder.decisions.records:
        latest.pop(record["id"], None)
        if record["verdict"] != "undo":
            latest[record["id"]] = record["verdict"]
    return latest


def people_wins(duels: Sequence[Duel], folder: BuildFolder, count: int) -> dict[str, np.ndarray]:
    """Photo -> [M, M] wins of M = `count` providers, as `envs.pipeline.compare.duel` gives them."""
    wins: dict[str, np.ndarray] = {}
    verdicts = verdicts_of(folder)
    for duel in duels:
        verdict = verdicts.get(duel.id)
        if verdict is None:
            continue
        mine = wins.setdefault(duel.photo, np.zeros((count, count)))
        share = 0.5 if verdict == "tie" else float((verdict == "a") != duel.swapped)
        mine[duel.i, duel.j] += share
        mine[duel.j, duel.i] += 1 - share
    return wins
