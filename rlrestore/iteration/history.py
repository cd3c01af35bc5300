"""Credit against the past of each photo instead of inside the group: the per-prompt tracker of DDPO (arXiv 2305.13301).

A photo's last `depth` scores, those of this iteration included, give the mean that is subtracted and the std that divides;
before it has `depth` of them, the whole batch does. Other crops and degradations of the photo count as the same photo. The
only credit that remembers: its state is part of a checkpoint.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlrestore.iteration.credit import STD_EPS, Credit


class RewardHistory:
    def __init__(self, depth: int = 16):
        self.depth = depth
        self._scores: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=depth))

    def credit(self, photos: Sequence[str], mix_N: Tensor, clamp: float) -> Credit:
        """Remember N = G * K scores, group-major, NaN for invalid ones; (score - mean) / std of each one's photo.

        Unlike advantages inside a group they do not add up to 0: a hard photo's rollouts may all be above its past.
        """
        mix_GK = mix_N.detach().cpu().double().reshape(len(photos), -1)
        valid_GK = mix_GK.isfinite()
        for photo, row, valid in zip(photos, mix_GK, valid_GK, strict=True):
            self._scores[photo].extend(row[valid].tolist())
        batch = mix_GK[valid_GK]
        advantage_GK = torch.zeros_like(mix_GK)
        for group, photo in enumerate(photos):
            past = torch.tensor(list(self._scores[photo]), dtype=torch.float64)
            known = past if len(past) == self.depth else batch
            if len(known) >= 2:
                advantage_GK[group] = (mix_GK[group] - known.mean()) / (known.std(correction=0) + STD_EPS)
        advantage_N = torch.where(valid_GK, advantage_GK, 0.0).reshape(-1)
        kept = int(valid_GK.sum())
        stats = {
            "adv_abs_mean": float(advantage_N.abs().sum()) / max(kept, 1),
            "clamped_frac": float((advantage_N.abs() > clamp).sum()) / max(kept, 1),
            "masked_samples": float((~valid_GK).sum()),
            "kept_samples": float(kept),
            "photos_with_history": float(sum(len(self._scores[photo]) == self.depth for photo in set(photos))),
        }
        return Credit(advantage_N.clamp(-clamp, clamp).float(), valid_GK.reshape(-1).float(), stats)

    def state_dict(self) -> dict[str, list[float]]:
        return {photo: list(scores) for photo, scores in self._scores.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._scores.clear()
        for photo, scores in state.items():
            self._scores[photo].extend(scores)
