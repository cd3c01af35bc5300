"""LL-Score on LL-Bench: read, split by source, train, calibrate, measure, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rewards.judges.losses import JudgeLoss
from rewards.judges.report import Judgement, agreement, by_task, detection
from rewards.judges.trainer import TrainConfig
from rewards.ll_score.data import BenchCollator, BenchSequence, open_rgb
from rewards.ll_score.llbench import BenchSource, expected_counts, read_llbench, split_by_source
from rewards.ll_score.model import LLScore, LLScoreConfig, new_ll_score

TEMPERATURES = np.exp(np.linspace(np.log(0.2), np.log(5), 41))


def train_ll_score(
    bench: Path, model: Mapping[str, Any], data: Mapping[str, Any], train: TrainConfig, loss: JudgeLoss,
    fit: Callable[[LLScore, BenchSequence, BenchCollator], None], folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Numbers on the held-out sources; the judge is in `folder`. ValueError for unusable data or base."""
    sources = read_llbench(bench, data["columns"])
    train_sources, test_sources = split_by_source(sources, data["held_out"], data["held_out_models"])
    labels = np.array([o.hallucinated for s in train_sources for o in s.outputs])
    rate = float(np.clip(np.nanmean(labels), 0.01, 0.99)) if np.isfinite(labels).any() else 0.5
    judge = new_ll_score(LLScoreConfig(**model, hallucination_rate=rate, seed=train.seed))
    length = train.steps * train.sources * train.accumulate
    fit(judge, BenchSequence(train_sources, train.items, length, train.seed), BenchCollator(judge, loss.unit))
    judgements = judge_bench(judge, test_sources)
    judge.temperature = fit_temperature(judgements)
    result = {
        "train_sources": len(train_sources), "test_sources": len(test_sources), "counts": expected_counts(sources),
        "hallucination_rate": rate, "temperature": judge.temperature, **bench_report(judgements),
    }  # fmt: skip
    judge.save(folder, {"test_sources": [s.id for s in test_sources], "metrics": result})
    return result


def judge_bench(judge: LLScore, sources: Sequence[BenchSource], batch_size: int = 8) -> list[Judgement]:
    """One judgement a source; hallucination as log-odds."""
    out = []
    for source in sources:
        degraded = open_rgb(source.degraded)
        rows = [(degraded, open_rgb(output.path), source.task) for output in source.outputs]
        quality, probability = judge.score(rows, batch_size)
        out.append(
            Judgement(
                source.id, source.task, tuple(o.model for o in source.outputs), quality.numpy(),
                np.array([o.score for o in source.outputs]), torch.logit(probability, 1e-6).numpy(),
                np.array([o.hallucinated for o in source.outputs]),
            )
        )  # fmt: skip
    return out


def bench_report(judgements: Sequence[Judgement]) -> dict[str, Any]:
    return {
        "quality": agreement(judgements), "hallucination": detection(judgements, threshold=0.0), "tasks": by_task(judgements),
    }  # fmt: skip


def fit_temperature(judgements: Sequence[Judgement]) -> float:
    """T of sigmoid(l / T) with the least cross entropy on these sources; 1 if nothing is labelled."""
    logit, label = (
        np.concatenate([getattr(j, n) for j in judgements] or [np.empty(0)]) for n in ("hallucination", "label")
    )
    known = np.isfinite(label)
    if len(set(label[known])) < 2:
        return 1.0
    logits, y = torch.tensor(logit[known]), torch.tensor(label[known], dtype=torch.float32)
    losses = [float(F.binary_cross_entropy_with_logits(logits.float() / t, y)) for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])
