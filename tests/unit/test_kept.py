"""Weights that are split over ranks: slices of 5 elements over 2 ranks are [0, 1, 2] and [3, 4, 0]."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from rlrestore.engine.build import free_port
from rlrestore.learning.kept import Kept

FIVE, FOUR = torch.arange(5.0), torch.arange(4.0).view(2, 2)


def test_slices_and_padding() -> None:
    first, last = (Kept([("a", FIVE)], rank, 2).slices["a"].tolist() for rank in (0, 1))
    assert (first, last) == ([0, 1, 2], [3, 4, 0])


def test_one_rank_keeps_all_and_owns_it() -> None:
    source = FOUR.clone()
    kept = Kept([("a", source)])
    source.zero_()
    assert torch.equal(dict(kept.whole())["a"], FOUR)
    kept.update([("a", torch.ones(2, 2))], 0.75)  # 0.75 x + 0.25
    assert dict(kept.whole())["a"].flatten().tolist() == [0.25, 1.0, 1.75, 2.5]


def _rank_main(rank: int, port: int, folder: str) -> None:
    from rlrestore.engine.group import join_group

    join_group(rank, 2, "127.0.0.1", port, 60.0)
    kept = Kept([("a", FIVE), ("b", FOUR)], rank, 2)
    kept.update([("a", FIVE + 1), ("b", FOUR * 3)], 0.5)
    assert kept.slices["a"].numel() == 3 and kept.slices["b"].numel() == 2  # half of each, the odd one padded
    save_file({name: value.contiguous() for name, value in kept.whole()}, Path(folder) / f"{rank}.safetensors")
    kept.load({"a": FIVE, "b": FOUR})
    assert all(torch.equal(value, {"a": FIVE, "b": FOUR}[name]) for name, value in kept.whole())
    torch.distributed.destroy_process_group()


def test_two_ranks_bring_it_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank_main, (free_port(), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(found["a"], FIVE + 0.5) and torch.equal(found["b"], FOUR * 2)
