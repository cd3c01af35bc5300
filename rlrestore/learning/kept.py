"""Weights that are kept beside the current ones (the start, the EMA, the old policy), split over the trainer ranks.

Rank r of W keeps the r-th slice of each flattened parameter: a W-th of the memory, whatever the engine does with the current
weights, and elementwise the same arithmetic. `whole` brings one parameter at a time together, so that no rank ever holds two
copies; it and `update` are collective, because the current weights may be sharded as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]


class Kept:
    def __init__(self, parameters: Named, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.shapes: dict[str, torch.Size] = {}
        self.slices: dict[str, Tensor] = {}  # float32; the last rank's end in zeros if a length does not divide
        for name, value in parameters:
            self.shapes[name] = value.shape
            self.slices[name] = self._slice(value).clone()

    @torch.no_grad()
    def update(self, parameters: Named, decay: float) -> None:
        """kept <- decay kept + (1 - decay) parameter."""
        for name, value in parameters:
            self.slices[name].lerp_(self._slice(value), 1 - decay)

    def whole(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each parameter (or those of `names`) by name, float32. Collective: consume it to its end on every rank."""
        for name in self.shapes if names is None else names:
            shape = self.shapes[name]
            mine = self.slices[name]
            if self.world > 1:
                parts = [torch.empty_like(mine) for _ in range(self.world)]
                dist.all_gather(parts, mine)
                mine = torch.cat(parts)[: shape.numel()]
            yield name, mine.view(shape)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        assert tensors.keys() == self.shapes.keys()
        for name, value in tensors.items():
            self.slices[name].copy_(self._slice(value.to(self.slices[name].device)))

    def _slice(self, value: Tensor) -> Tensor:
        flat = value.detach().flatten().float()
        if self.world == 1:
            return flat
        each = -(-flat.numel() // self.world)
        mine = flat[self.rank * each : (self.rank + 1) * each]
        return mine if mine.numel() == each else torch.cat([mine, mine.new_zeros(each - mine.numel())])
