"""How a judge did against the truth, from its scores: per source, pooled, per task, with intervals over sources.

In : `Judgement`s, one a source. Out: plain numbers for JSON and tables. A score has no zero that sources share, so what
counts is the mean over sources; the pooled figures stand beside it because papers print them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewards.judges.metrics import auroc, bootstrap, f1, krcc, mean_over, pairwise_accuracy, plcc, plcc_raw, srcc


@dataclass(frozen=True)
class Judgement:
    """What a metric said about the m restorations of one source, and the truth."""

    source: str
    task: str
    names: tuple[str, ...]  # m: the restorer (hand)
    quality: np.ndarray  # [m] aligned so that higher is better; NaN where invalid
    target: np.ndarray  # [m] truth, higher is better; NaN where unknown
    hallucination: np.ndarray  # [m] the higher, the more likely; NaN if the metric has no opinion
    label: np.ndarray  # [m] 1, 0, NaN
    faults: tuple[str, ...] = ()  # m: kind of planted fault, "" for none; () if nothing was planted

    def only(self, keep: Sequence[bool]) -> Judgement:
        """The restorations that are marked."""
        rows = [i for i, kept in enumerate(keep) if kept]
        return replace(
            self, names=tuple(self.names[i] for i in rows), quality=self.quality[rows], target=self.target[rows],
            hallucination=self.hallucination[rows], label=self.label[rows],
            faults=tuple(self.faults[i] for i in rows) if self.faults else (),
        )  # fmt: skip


def agreement(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Quality: SRCC, KRCC, pairwise accuracy a source (mean, interval of SRCC), and pooled SRCC and PLCC."""
    pairs = [_both(j.quality, j.target) for j in judgements]
    pairs = [(a, b) for a, b in pairs if len(a) > 1]
    if not pairs:
        return {"sources": 0}
    by_source = np.array([srcc(a, b) for a, b in pairs])
    low, high = bootstrap(by_source)
    all_a, all_b = (np.concatenate([pair[k] for pair in pairs]) for k in range(2))
    return {
        "sources": len(pairs),
        "srcc": mean_over(pairs, srcc),
        "srcc_low": low,
        "srcc_high": high,
        "krcc": mean_over(pairs, krcc),
        "pairwise_accuracy": mean_over(pairs, pairwise_accuracy),
        "srcc_pooled": srcc(all_a, all_b),
        "plcc_pooled": plcc(all_a, all_b),
        "pearson_pooled": plcc_raw(all_a, all_b),
    }


def detection(judgements: Sequence[Judgement], threshold: float | None = None) -> dict[str, float]:
    """Hallucination: AUROC, F1 at `threshold` (None: leave it out), counts; AUROC a kind of fault against all sound rows."""
    score, label = (np.concatenate([getattr(j, name) for j in judgements]) for name in ("hallucination", "label"))
    kind = np.array([f for j in judgements for f in (j.faults or ("",) * len(j.names))])
    known = np.isfinite(score) & np.isfinite(label)
    score, label, kind = score[known], label[known], kind[known]
    out = {"rows": len(score), "positives": int(label.sum()), "auroc": auroc(score, label)}
    if threshold is not None and len(score):
        out["f1"] = f1(score, label, threshold)
    for fault in sorted(set(kind) - {""}):
        rows = (kind == fault) | (label == 0)
        out[f"auroc/{fault}"] = auroc(score[rows], label[rows])
    return out


def by_task(judgements: Sequence[Judgement]) -> dict[str, dict[str, float]]:
    """`agreement` and the AUROC of each task."""
    groups: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.task].append(judgement)
    return {task: {**agreement(group), "auroc": detection(group)["auroc"]} for task, group in sorted(groups.items())}


def _both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(a) & np.isfinite(b)
    return a[known], b[known]
