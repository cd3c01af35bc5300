"""`judge` and `judge_hallucination`: the embedded judge's two heads as rewards. They read the LQ, no reference.

`judge` is a quality score in units of `composite` (rewards/composite.py) with no zero of its own: it ranks restorations
of one LQ and says nothing about two LQs. `judge_hallucination` is the log-odds that something was invented; it is a
fidelity term.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images
from rewards.embedded_judge.judge import CONFIG, PACKAGED, WEIGHTS, load_judge

LICENCE = "own code and weights (rewards/embedded_judge/weights/README.md)"


@dataclass(frozen=True)
class EmbeddedJudgeParams:
    weights: str = "packaged"  # or a folder that `rlrestore judge train` wrote


def weights_folder(params: EmbeddedJudgeParams) -> Path:
    return PACKAGED if params.weights == "packaged" else Path(params.weights)


def weights_version(folder: Path) -> str:
    """First 8 hex digits of the sha256 of the files: another judge is another version."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} does not exist; give a folder that `rlrestore judge train` wrote")
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:8]


class JudgeReward(ImageReward):
    """One head. Restorations that share an LQ are judged in one forward."""

    params: EmbeddedJudgeParams
    chunk_pixels = 16 * 128 * 128

    def __init__(self, params: EmbeddedJudgeParams) -> None:
        super().__init__(params)
        self.judge = load_judge(weights_folder(params))

    def heads(self, items: Sequence[Restoration]) -> tuple[Tensor, Tensor]:
        """(quality [N], hallucination log-odds [N])."""
        images, quality, logit = stack_images(items), torch.empty(len(items)), torch.empty(len(items))
        rows_of: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            rows_of.setdefault(id(item.task.lq), []).append(i)
        for rows in rows_of.values():
            quality[rows], logit[rows] = self.judge(items[rows[0]].task.lq.float(), images[rows])
        return quality, logit


class JudgeQuality(JudgeReward):
    @classmethod
    def spec_for(cls, params: EmbeddedJudgeParams) -> RewardSpec:
        return RewardSpec(
            name="judge",
            version=weights_version(weights_folder(params)),
            higher_is_better=True,
            range=(None, None),
            needs=frozenset({"lq"}),
            block="quality",
            scale=0.04,  # the in-group std of its scores over the embedded restorer's samples
            differentiable=True,
            deterministic=True,
            licence=LICENCE,
        )

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        return self.heads(items)[0]


class JudgeHallucination(JudgeReward):
    @classmethod
    def spec_for(cls, params: EmbeddedJudgeParams) -> RewardSpec:
        return RewardSpec(
            name="judge_hallucination",
            version=weights_version(weights_folder(params)),
            higher_is_better=False,
            range=(None, None),
            needs=frozenset({"lq"}),
            block="fidelity",
            scale=1.0,
            differentiable=True,
            deterministic=True,
            licence=LICENCE,
        )

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        return self.heads(items)[1]
