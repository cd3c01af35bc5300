"""Algorithms by kind: `kind -> (config dataclass, class)`."""

from __future__ import annotations

from rlrestore.algorithms.base import Algorithm
from rlrestore.algorithms.grpo import Grpo, GrpoConfig
from rlrestore.algorithms.nft import Nft, NftConfig

ALGORITHMS: dict[str, tuple[type, type[Algorithm]]] = {
    "grpo": (GrpoConfig, Grpo),
    "nft": (NftConfig, Nft),
}
