"""The joint loss of a judge with a quality and a hallucination head, on the rows of a batch.

N rows are restorations of some sources (LQ photos); only rows of one source are compared, since a score has no zero
that sources share. The siamese form of the LL-Score figure is the special case of two rows a source: m rows cost m
forwards and give m (m - 1) / 2 pairs. All functions are pure, float32, and averaged over what they apply to.

    rank           fidelity loss 1 - sqrt(P p) - sqrt((1-P)(1-p)), P = sigmoid(s_a - s_b) (Tsai et al. 2007, FRank),
                   or the cross entropy of the same (`rank_form`)
    regression     huber((s_a - s_b) - (beta_a - beta_b)): Bradley-Terry scores, compared as differences
    hallucination  binary cross entropy, positives weighted
    centre         (mean of s over a source)^2: fixes the zero that the first two leave free
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT_FLOOR = 1e-8  # under the square roots, whose gradient at 0 is infinite
RANK_FORMS = ("cross_entropy", "fidelity")


@dataclass(frozen=True)
class JudgeLoss:
    """Weights and constants (rewards: LL-Score's own are not published; these defaults are ours)."""

    rank: float = 1.0
    regression: float = 0.5
    hallucination: float = 0.5
    centre: float = 0.01
    rank_form: str = "fidelity"
    unit: float = 1.0  # a score difference of this size is one logit of preference
    huber_delta: float = 1.0  # score units
    positive_weight: float = 1.0  # of a hallucination in the cross entropy

    def __post_init__(self) -> None:
        if self.rank_form not in RANK_FORMS:
            raise ValueError(f"loss.rank_form is {self.rank_form!r}; choose one of {', '.join(RANK_FORMS)}")
        if min(self.rank, self.regression, self.hallucination, self.centre) < 0:
            raise ValueError(f"loss weights are 0 or positive, got {self}")
        if min(self.unit, self.huber_delta, self.positive_weight) <= 0:
            raise ValueError(f"loss.unit, huber_delta and positive_weight are positive, got {self}")


@dataclass(frozen=True)
class Targets:
    """What people (or a reference) said about N rows; NaN where nobody said anything."""

    source_N: Tensor  # [N] int64, equal for rows of one source
    preference_NN: Tensor  # [N, N] P(row is better than column) in [0, 1]; NaN for pairs without a label
    score_N: Tensor  # [N] Bradley-Terry score, or another score that may be compared within a source
    hallucination_N: Tensor  # [N] 1 hallucinated, 0 not


def preferences_from_scores(score_N: Tensor, source_N: Tensor, unit: float) -> Tensor:
    """`[N, N]` sigmoid((score_a - score_b) / unit) for rows of one source, NaN elsewhere."""
    p = torch.sigmoid((score_N[:, None] - score_N[None]) / unit)
    return p.masked_fill(source_N[:, None] != source_N[None], torch.nan)


def rank_loss(difference_P: Tensor, p_P: Tensor, form: str) -> Tensor:
    """`[P]` loss of predicted logits of preference against P(a preferred); 0 where sigmoid(difference) = p ("fidelity")."""
    if form == "cross_entropy":
        return F.binary_cross_entropy_with_logits(difference_P, p_P, reduction="none")
    yes, no = torch.sigmoid(difference_P), torch.sigmoid(-difference_P)
    return 1 - (yes * p_P + ROOT_FLOOR).sqrt() - (no * (1 - p_P) + ROOT_FLOOR).sqrt()


def source_centre_loss(quality_N: Tensor, source_N: Tensor) -> Tensor:
    """Mean over sources of (mean of s)^2; scalar."""
    _, index_N = source_N.unique(return_inverse=True)
    count = torch.zeros(int(index_N.max()) + 1, device=quality_N.device).index_add_(
        0, index_N, torch.ones_like(quality_N)
    )
    return (torch.zeros_like(count).index_add(0, index_N, quality_N) / count).square().mean()


def joint_loss(
    quality_N: Tensor, hallucination_logit_N: Tensor, targets: Targets, config: JudgeLoss
) -> tuple[Tensor, dict[str, float]]:
    """The scalar to minimise, and its unweighted parts for the log. A part without any label is 0."""
    quality_N, logit_N = quality_N.float(), hallucination_logit_N.float()
    n = len(quality_N)
    i, j = torch.triu_indices(n, n, offset=1, device=quality_N.device)
    same = targets.source_N[i] == targets.source_N[j]
    i, j = i[same], j[same]
    difference = quality_N[i] - quality_N[j]
    p, gap = targets.preference_NN[i, j], targets.score_N[i] - targets.score_N[j]
    ranked, scored, labelled = ~p.isnan(), ~gap.isnan(), ~targets.hallucination_N.isnan()
    parts = {
        "rank": _mean(rank_loss(difference[ranked] / config.unit, p[ranked], config.rank_form), quality_N),
        "regression": _mean(
            F.huber_loss(difference[scored], gap[scored], reduction="none", delta=config.huber_delta), quality_N
        ),
        "hallucination": _mean(
            F.binary_cross_entropy_with_logits(
                logit_N[labelled], targets.hallucination_N[labelled].float(), reduction="none",
                pos_weight=torch.tensor(config.positive_weight, device=logit_N.device),
            ),
            logit_N,
        ),
        "centre": source_centre_loss(quality_N, targets.source_N),
    }  # fmt: skip
    total = torch.stack([getattr(config, name) * value for name, value in parts.items()]).sum()
    return total, {name: float(value.detach()) for name, value in parts.items()}


def _mean(value: Tensor, like: Tensor) -> Tensor:
    """Mean, or a 0 that carries a (zero) gradient when there is nothing to average."""
    return value.mean() if value.numel() else like.sum() * 0
