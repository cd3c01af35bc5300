"""Algorithms by kind: `kind -> (config dataclass, class)`."""

from __future__ import annotations

from rlrestore.algorithms.awm import Awm, AwmConfig
from rlrestore.algorithms.base import Algorithm
from rlrestore.algorithms.d3po import D3po, D3poConfig
from rlrestore.algorithms.dgpo import Dgpo, DgpoConfig
from rlrestore.algorithms.dpo import Dpo, DpoConfig
from rlrestore.algorithms.draft import Draft, DraftConfig
from rlrestore.algorithms.flow_dppo import FlowDppo, FlowDppoConfig
from rlrestore.algorithms.grpo import Grpo, GrpoConfig
from rlrestore.algorithms.grpo_guard import GrpoGuard, GrpoGuardConfig
from rlrestore.algorithms.nft import Nft, NftConfig
from rlrestore.algorithms.refl import Refl, ReflConfig
from rlrestore.algorithms.reinforce import Reinforce, ReinforceConfig

ALGORITHMS: dict[str, tuple[type, type[Algorithm]]] = {
    "awm": (AwmConfig, Awm),
    "d3po": (D3poConfig, D3po),
    "dgpo": (DgpoConfig, Dgpo),
    "dpo": (DpoConfig, Dpo),
    "draft": (DraftConfig, Draft),
    "flow_dppo": (FlowDppoConfig, FlowDppo),
    "grpo": (GrpoConfig, Grpo),
    "grpo_guard": (GrpoGuardConfig, GrpoGuard),
    "nft": (NftConfig, Nft),
    "refl": (ReflConfig, Refl),
    "reinforce": (ReinforceConfig, Reinforce),
}
