"""One trainer for every judge of ours: transformers' Trainer with the joint loss, and a learning rate a part.

Targets travel in the judge's batch under `TARGETS`, one key a field of `losses.Targets`. Items are drawn by the dataset
as a pure function of their index, and the order is the index's, so a resumed run goes on where it was.

What of the libraries is used: Trainer brings accelerate (DeepSpeed by `deepspeed: file.json`, several processes),
mixed precision, accumulation, clipping, schedules and checkpoints. trl's RewardTrainer, its subclass, is not: its
batches are chosen/rejected pairs of token ids with one logit, and ours are m restorations of a source (LQ and images)
with scores, ties and hallucination labels; of it would remain what Trainer gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from rewards.judges.base import Judge, Judged
from rewards.judges.losses import JudgeLoss, Targets, joint_loss

TARGETS = tuple(f.name for f in fields(Targets))


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast."""

    steps: int = 1000
    sources: int = 8  # a batch
    items: int = 8  # restorations of a source in a batch, at most
    lr: dict[str, float] = field(default_factory=dict)  # by part of the judge; required
    warmup: int = 20  # steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    bf16: bool = False
    accumulate: int = 1  # batches an optimiser step
    save_every: int = 0  # steps between checkpoints of the trainer; 0: none
    log_every: int = 20
    deepspeed: str | None = None  # DeepSpeed's json, handed to accelerate
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sources", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it is at least 1")
        if self.items < 2:
            raise ValueError(f"train.items is {self.items}; comparing needs at least 2 restorations of a source")


class JudgeTrainer(Trainer):
    def __init__(self, judge: Judge, dataset: Dataset, collate, folder: Path, config: TrainConfig, loss: JudgeLoss):
        self.loss_config, self.train_config = loss, config
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.history: list[dict[str, float]] = []
        saving: dict[str, Any] = {"save_strategy": "no"}
        if config.save_every:
            saving = {"save_strategy": "steps", "save_steps": config.save_every, "save_total_limit": 2}
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=config.steps, per_device_train_batch_size=config.sources,
            gradient_accumulation_steps=config.accumulate, learning_rate=1.0, weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip, warmup_steps=config.warmup, lr_scheduler_type="cosine", bf16=config.bf16,
            logging_steps=config.log_every, report_to="none", remove_unused_columns=False, dataloader_num_workers=0,
            use_cpu=not torch.cuda.is_available(), seed=config.seed, deepspeed=config.deepspeed, disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(), **saving,
        )  # fmt: skip
        super().__init__(model=judge, args=arguments, train_dataset=dataset, data_collator=collate)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `losses.joint_loss`."""
        targets = Targets(**{name: inputs.pop(name) for name in TARGETS})
        judged: Judged = model(**inputs)
        loss, parts = joint_loss(judged.quality_N, judged.hallucination_logit_N, targets, self.loss_config)
        for name, value in parts.items():
            self.parts[name].append(value)
        return (loss, judged) if return_outputs else loss

    def create_optimizer(self, model=None):
        """AdamW; each part of the judge at its rate. ValueError for a part without one."""
        parts = self.model.parameter_groups()
        rates = self.train_config.lr
        if set(rates) != set(parts):
            raise ValueError(
                f"train.lr has rates for {sorted(rates)}; this judge has the parts {sorted(parts)}: give each one"
            )
        groups = [{"params": parts[name], "lr": float(rates[name]), "initial_lr": float(rates[name])} for name in parts]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.train_config.weight_decay)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = {name: sum(values) / len(values) for name, values in self.parts.items() if values}
        self.parts.clear()
        self.history.append({**logs, **means, "step": float(self.state.global_step)})
        super().log({**logs, **{name: round(value, 5) for name, value in means.items()}}, start_time)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def collate_targets(rows: Sequence[Mapping[str, Any]], unit: float) -> dict[str, Tensor]:
    """Targets of sources, each a mapping with `score` [m], `hallucination` [m] and maybe `preference` [m, m] (all NaN where
    unknown). Missing preferences follow from the scores, one `unit` a logit."""
    source = torch.cat([torch.full((len(row["score"]),), i) for i, row in enumerate(rows)])
    score = torch.cat([row["score"] for row in rows]).float()
    given = torch.block_diag(*[row.get("preference", _unknown(len(row["score"]))).nan_to_num(-1.0) for row in rows])
    given = torch.where((given >= 0) & (source[:, None] == source[None]), given, torch.nan)
    from_scores = torch.sigmoid((score[:, None] - score[None]) / unit)
    preference = torch.where(given.isnan(), from_scores, given)
    preference = preference.masked_fill(source[:, None] != source[None], torch.nan)
    hallucination = torch.cat([row["hallucination"] for row in rows]).float()
    return asdict(Targets(source, preference, score, hallucination))


def _unknown(n: int) -> Tensor:
    return torch.full((n, n), torch.nan)
