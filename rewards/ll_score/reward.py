"""`ll_score` and `ll_score_hallucination`: a trained LL-Score as two rewards of a mix.

Quality is a Bradley-Terry logit without a zero that photos share: it is for comparing restorations of one LQ, and grows
upwards. Hallucination is a probability and a fidelity term. Both terms of a mix share one loaded judge and one forward
a picture. The task comes from the degradation types, never from a prompt of the policy.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from envs.types import Restoration
from rewards.base import Reward, RewardSpec, Scores, checked_scores, missing_data
from rewards.ll_score.prompt import task_of_types

if TYPE_CHECKING:
    from rewards.ll_score.model import LLScore

KEPT_SCORES = 4096  # rows that are remembered, so that the second term costs nothing
FILES = ("adapter_model.safetensors", "heads.safetensors", "judge.json")


@dataclass(frozen=True)
class LLScoreParams:
    checkpoint: str  # a folder that `rlrestore judge train` wrote
    base: str | None = None  # the Qwen3-VL checkpoint, if it is elsewhere than when the judge was trained
    batch_size: int = 8
    device: str = "auto"  # "auto": the GPU if there is one


def judge_version(folder: Path) -> str:
    """First 8 hex digits of the sha256 of the judge's files; ValueError if one is missing."""
    digest = hashlib.sha256()
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} does not exist; params.checkpoint is a folder that `rlrestore judge train` wrote"
            )
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:8]


class SharedJudge:
    """A loaded judge with a memory of what it has scored, by content."""

    def __init__(self, params: LLScoreParams) -> None:
        from rewards.ll_score.model import load_ll_score  # transformers and peft: seconds to import

        device = ("cuda" if torch.cuda.is_available() else "cpu") if params.device == "auto" else params.device
        self.judge: LLScore = load_ll_score(Path(params.checkpoint), params.base).to(device)
        self.batch_size = params.batch_size
        self.known: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def heads(self, items: Sequence[Restoration]) -> tuple[Tensor, Tensor]:
        """(quality [N], hallucination probability [N])."""
        keys = [_key(item) for item in items]
        new = list({key: i for i, key in enumerate(keys) if key not in self.known}.values())
        rows = [(_picture(items[i].task.lq), _picture(items[i].image), task_of_types(items[i].task.types)) for i in new]
        quality, probability = self.judge.score(rows, self.batch_size)
        fresh = {
            keys[i]: pair for i, pair in zip(new, zip(quality.tolist(), probability.tolist(), strict=True), strict=True)
        }
        found = torch.tensor([fresh.get(key) or self.known[key] for key in keys]).reshape(-1, 2)
        self.known |= fresh
        while len(self.known) > KEPT_SCORES:
            self.known.popitem(last=False)
        return found[:, 0], found[:, 1]


shared_judge = functools.lru_cache(maxsize=2)(SharedJudge)


def _key(item: Restoration) -> str:
    digest = hashlib.sha256(task_of_types(item.task.types).encode())
    for image in (item.task.lq, item.image):
        digest.update(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _picture(image: Tensor):
    """PIL RGB of [3, H, W] in [0, 1]."""
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


class LLScoreReward(Reward):
    head: int  # 0 quality, 1 hallucination
    name: str

    def __init__(self, params: LLScoreParams) -> None:
        judge_version(Path(params.checkpoint))
        self.params, self.spec = params, self.spec_for(params)
        self.shared = shared_judge(params)

    @classmethod
    def spec_for(cls, params: LLScoreParams) -> RewardSpec:
        quality = cls.head == 0
        return RewardSpec(
            name=cls.name,
            # a config may be looked at before its judge is trained; building the reward asks for the files
            version=judge_version(folder) if (folder := Path(params.checkpoint)).is_dir() else "absent",
            higher_is_better=quality,
            range=(None, None) if quality else (0.0, 1.0),
            needs=frozenset({"lq"}),
            block="quality" if quality else "fidelity",
            scale=1.0 if quality else 0.1,
            differentiable=False,
            deterministic=True,
            licence="of the base checkpoint and of LL-Bench (CC-BY-NC-4.0), on which it was trained",
        )

    @torch.no_grad()
    def score(self, items: Sequence[Restoration]) -> Scores:
        reasons = [missing_data(item, self.spec.needs) for item in items]
        good = [item for item, reason in zip(items, reasons, strict=True) if not reason]
        values = iter(self.shared.heads(good)[self.head]) if good else iter(())
        rows = [
            Scores.failed(1, reason) if reason else checked_scores(next(values).reshape(1), self.spec.range)
            for reason in reasons
        ]
        return Scores.cat(rows)


class LLScoreQuality(LLScoreReward):
    head, name = 0, "ll_score"


class LLScoreHallucination(LLScoreReward):
    head, name = 1, "ll_score_hallucination"
