"""What the trainer needs of a judge. Imports torch alone: rewards are built in processes that never train."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Judged:
    """What a judge says about the N rows of a batch."""

    quality_N: Tensor
    hallucination_logit_N: Tensor


class Judge(nn.Module):
    """A module whose `forward(**batch)` gives `Judged`; the batch is a dict of tensors."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part; each part has its learning rate."""
