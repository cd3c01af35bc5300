"""All rewards by kind: a literal dict `kind -> (parameter dataclass, reward class)`.

Heavy packages are imported by a reward's constructor, not here. A third party adds kinds through the entry-point group
`rlrestore.rewards`, whose objects are such pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from rewards.base import Reward, RewardSpec
from rewards.composite import Composite
from rewards.embedded_judge.reward import EmbeddedJudgeParams, JudgeHallucination, JudgeQuality
from rewards.iqa import PyiqaParams, PyiqaReward
from rewards.ll_score.reward import LLScoreHallucination, LLScoreParams, LLScoreQuality
from rewards.naturalness import Niqe, NiqeParams, Nss, NssParams
from rewards.penalties.anchor import Anchored, AnchoredParams
from rewards.penalties.colour_drift import ColourDrift, ColourDriftParams
from rewards.penalties.consistency import Consistency, ConsistencyParams
from rewards.penalties.face_identity import FaceIdentity, FaceIdentityParams
from rewards.penalties.low_frequency import LowFrequency, LowFrequencyParams
from rewards.penalties.no_op import NoOp, NoOpParams
from rewards.penalties.semantic import Semantic, SemanticParams
from rewards.penalties.structure import Structure, StructureParams
from rewards.penalties.text_change import TextChange, TextChangeParams
from rewards.reference import Gmsd, PsnrRgb, PsnrY, ReferenceParams, SsimRgb, SsimY
from rewards.remote.reward import RemoteParams, RemoteReward
from rewards.vlm.reward import (
    VlmHallucination,
    VlmParams,
    VlmQuality,
    VlmQualityParams,
    VlmRemovalFidelity,
    VlmRemovalFidelityParams,
)

ENTRY_POINTS = "rlrestore.rewards"
REWARDS: dict[str, tuple[type, type[Reward]]] = {
    "anchored": (AnchoredParams, Anchored),
    "colour_drift": (ColourDriftParams, ColourDrift),
    "composite": (ReferenceParams, Composite),
    "consistency": (ConsistencyParams, Consistency),
    "face_identity": (FaceIdentityParams, FaceIdentity),
    "gmsd": (ReferenceParams, Gmsd),
    "judge": (EmbeddedJudgeParams, JudgeQuality),
    "judge_hallucination": (EmbeddedJudgeParams, JudgeHallucination),
    "ll_score": (LLScoreParams, LLScoreQuality),
    "ll_score_hallucination": (LLScoreParams, LLScoreHallucination),
    "low_frequency": (LowFrequencyParams, LowFrequency),
    "niqe": (NiqeParams, Niqe),
    "no_op": (NoOpParams, NoOp),
    "nss": (NssParams, Nss),
    "psnr_rgb": (ReferenceParams, PsnrRgb),
    "psnr_y": (ReferenceParams, PsnrY),
    "pyiqa": (PyiqaParams, PyiqaReward),
    "remote": (RemoteParams, RemoteReward),
    "semantic": (SemanticParams, Semantic),
    "ssim_rgb": (ReferenceParams, SsimRgb),
    "ssim_y": (ReferenceParams, SsimY),
    "structure": (StructureParams, Structure),
    "text_change": (TextChangeParams, TextChange),
    "vlm_hallucination": (VlmParams, VlmHallucination),
    "vlm_quality": (VlmQualityParams, VlmQuality),
    "vlm_removal_fidelity": (VlmRemovalFidelityParams, VlmRemovalFidelity),
}


def reward_kinds() -> list[str]:
    """Our own; those of third parties are found by name."""
    return sorted(REWARDS)


def find_reward(kind: str) -> tuple[type, type[Reward]]:
    """(parameter dataclass, class) of a kind; ValueError with the nearest name."""
    if kind in REWARDS:
        return REWARDS[kind]
    added = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if kind in added:
        return added[kind].load()
    known = sorted({*REWARDS, *added})
    near = get_close_matches(kind, known, n=1)
    raise ValueError(
        f"there is no reward {kind!r}."
        + (f" Did you mean: {near[0]!r}?" if near else "")
        + f" Known: {', '.join(known)}"
    )


def typed_params(kind: str, params: Any) -> Any:
    """The parameter dataclass of a kind from a mapping (or None, or such a dataclass).

    ValueError for unknown or missing keys.
    """
    params_type, _ = find_reward(kind)
    if isinstance(params, params_type):
        return params
    given: Mapping[str, Any] = params or {}
    fields = {f.name: f for f in dataclasses.fields(params_type)}
    for key in given:
        if key not in fields:
            near = get_close_matches(key, list(fields), n=1)
            hint = f" Did you mean: {near[0]!r}?" if near else f" It knows: {', '.join(fields) or 'none'}."
            raise ValueError(f"reward {kind!r} has no parameter {key!r}.{hint}")
    no_default = [
        f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if absent := [name for name in no_default if name not in given]:
        raise ValueError(f"reward {kind!r} needs params: {{{absent[0]}: ...}}")
    return params_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def build_reward(kind: str, params: Any = None) -> Reward:
    """A reward, ready to score. ValueError for unknown kinds and parameters and for missing weights or packages."""
    _, reward_type = find_reward(kind)
    return reward_type(typed_params(kind, params))  # type: ignore[call-arg]


def reward_spec(kind: str, params: Any = None) -> RewardSpec:
    """The spec that `build_reward` would give, without loading weights."""
    _, reward_type = find_reward(kind)
    return reward_type.spec_for(typed_params(kind, params))
