"""Reading a photo arena (scripts/make_arena.py): sources with many restorations, scores and planted faults.

In : a folder of `*.safetensors` shards. Out: `Source` records, and an endless training sequence over them whose item i
is a pure function of (seed, i). ValueError, naming the folder or the file, if there is nothing to read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from rewards.embedded_judge.network import EmbeddedJudge
from rewards.judges.trainer import collate_targets

POLICY = "policy"  # the hand whose pictures are one group of the same restorer


@dataclass(frozen=True)
class Source:
    """One LQ with V restorations."""

    id: str
    lq: Tensor  # [3, H, W] uint8
    gt: Tensor  # [3, H, W] uint8
    images: Tensor  # [V, 3, H, W] uint8
    score: Tensor  # [V] composite to gt
    hands: tuple[str, ...]  # V: who made it
    faults: tuple[str, ...]  # V: kind of planted hallucination, "" for none

    def index(self, hand: str) -> list[int]:
        return [i for i, name in enumerate(self.hands) if name == hand]

    @property
    def target(self) -> Tensor:
        """[V] asinh of the score above the policy's mean: small gaps as they are, large ones (the reference itself is 40 units
        above the rest) by their logarithm, so that a few rows do not own the loss. Same order."""
        group = self.index(POLICY) or list(range(len(self.hands)))
        return (self.score - self.score[group].mean()).asinh()

    @property
    def hallucinated(self) -> Tensor:
        return torch.tensor([float(bool(fault)) for fault in self.faults])


def read_arena(folder: Path) -> list[Source]:
    """All sources of a folder, in the order of the shards."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no arena; make one with scripts/make_arena.py")
    sources = []
    for file in files:
        with safe_open(file, "pt") as shard:
            rows = json.loads((shard.metadata() or {}).get("sources", "[]"))
            if not rows:
                raise ValueError(f"{file} is no arena shard: its header names no sources")
            for i, row in enumerate(rows):
                tensors = {name: shard.get_tensor(f"{i}/{name}") for name in ("lq", "gt", "images", "composite")}
                sources.append(
                    Source(
                        row["id"], tensors["lq"], tensors["gt"], tensors["images"], tensors["composite"],
                        tuple(row["hands"]), tuple(row["faults"]),
                    )
                )  # fmt: skip
    return sources


class ArenaSequence(Dataset):
    """Item i: a random source, `items` of its pictures; every other item is the policy's group.

    That half is what RL needs: telling samples of one restorer apart. Pictures are measured once.
    """

    def __init__(self, sources: Sequence[Source], judge: EmbeddedJudge, items: int, length: int, seed: int):
        """Sets the zero and the unit of the judge's measurements, too."""
        self.sources, self.items, self.length, self.seed = sources, items, length, seed
        self.features = [judge.describe(s.lq.float() / 255, s.images.float() / 255) for s in sources]
        judge.heads.calibrate(torch.cat(self.features))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        place = int(rng.integers(len(self.sources)))
        source = self.sources[place]
        group = source.index(POLICY)
        among = group if index % 2 and len(group) >= 2 else range(len(source.hands))
        chosen = rng.permutation(np.array(among))[: self.items].tolist()
        return {
            "features": self.features[place][chosen],
            "score": source.target[chosen],
            "hallucination": source.hallucinated[chosen],
        }


class ArenaCollator:
    """Sources into a batch."""

    def __init__(self, unit: float):
        self.unit = unit

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"features": torch.cat([row["features"] for row in rows]), **collate_targets(rows, self.unit)}
