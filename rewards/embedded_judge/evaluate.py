"""How well rewards judge a photo arena: with the reference's composite as the truth, and planted faults as hallucinations.

The three questions, each on sources (photos) and some hands (restorers) that training never saw:
  group     do they order the samples of one restorer? (what RL compares; `policy` rows)
  hands     do they order different restorers of one LQ? all sound rows, and the held-out hands among them
  faults    do they find what was planted?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.types import Restoration, Task
from rewards.base import Reward
from rewards.embedded_judge.arena import POLICY, Source
from rewards.judges.report import Judgement, agreement, detection

HELD_OUT_HANDS = frozenset({"nlm", "realesrgan", "span", "waifu2x", "wiener"})


def judge_arena(sources: Sequence[Source], quality: Reward, hallucination: Reward | None = None) -> list[Judgement]:
    """One judgement a source. Without a `hallucination` reward, low quality counts as suspicion."""
    sign = 1.0 if quality.spec.higher_is_better else -1.0
    out = []
    for source in sources:
        task = Task(source.id, source.lq.float() / 255, ("noise",), gt=source.gt.float() / 255)
        items = [Restoration(task, image.float() / 255) for image in source.images]
        value = sign * quality.score(items).value_N.numpy()
        suspicion = -value if hallucination is None else hallucination.score(items).value_N.numpy()
        if hallucination is not None and hallucination.spec.higher_is_better:
            suspicion = -suspicion
        out.append(
            Judgement(
                source.id, "arena", source.hands, value, source.score.numpy(), suspicion, source.hallucinated.numpy(),
                source.faults,
            )
        )  # fmt: skip
    return out


def arena_report(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The three questions as numbers; see the module docstring."""
    sound = [j.only([not fault for fault in j.faults]) for j in judgements]
    return {
        "group": agreement([j.only([name == POLICY for name in j.names]) for j in sound]),
        "hands": agreement(sound),
        "hands_no_reference": agreement([j.only([name != "reference" for name in j.names]) for j in sound]),
        "held_out_hands": agreement([j.only([name in HELD_OUT_HANDS for name in j.names]) for j in sound]),
        "faults": detection(judgements),
        "preferred": preferred(sound),
    }


def preferred(sound: Sequence[Judgement]) -> dict[str, float]:
    """Mean score of each hand above that of the policy's samples of the same source, in the metric's own unit."""
    gaps: dict[str, list[float]] = {}
    for j in sound:
        base = np.nanmean([q for q, name in zip(j.quality, j.names, strict=True) if name == POLICY])
        for value, name in zip(j.quality, j.names, strict=True):
            gaps.setdefault(name, []).append(float(value - base))
    return {name: float(np.nanmean(values)) for name, values in sorted(gaps.items())}
