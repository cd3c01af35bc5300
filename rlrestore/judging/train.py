"""Training and measuring judges (`rlrestore judge`): from a config to a folder with a judge and its numbers.

Out: `runs/<name>/judge/` (what rewards and `rlrestore judge eval` open), `config.resolved.yaml`, `train.jsonl`,
`result.json`. The folder is written under a temporary name; one that exists is never replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from rewards.embedded_judge.arena import ArenaCollator, ArenaSequence, read_arena
from rewards.embedded_judge.evaluate import arena_report, judge_arena
from rewards.embedded_judge.judge import TrainableJudge, new_judge, save_judge
from rewards.embedded_judge.network import JudgeConfig
from rewards.embedded_judge.reward import EmbeddedJudgeParams, JudgeHallucination, JudgeQuality
from rewards.judges.losses import JudgeLoss
from rewards.judges.trainer import JudgeTrainer, TrainConfig
from rewards.penalties.anchor import FACTS, AnchorConfig, Anchored, AnchoredParams, save_anchor, train_anchor
from rewards.penalties.backbones import EFFICIENTNET
from rewards.registry import build_reward
from rlrestore.config.files import ConfigError, dump, read_yaml, typed


@dataclass
class JudgeRunConfig:
    name: str = MISSING  # the run is runs/<name>
    root: str = "runs"


@dataclass
class EmbeddedJudgeSection:
    """`judge: {kind: embedded}`: the small judge, on a photo arena (scripts/make_arena.py)."""

    arena: str = "data/arena/train"
    test: str | None = "data/arena/test"  # null: do not measure
    restorer: str = "rlrestore/restorers/weights/embedded"  # its mean network is copied as the judge's evidence
    hidden: int = JudgeConfig.hidden
    layers: int = JudgeConfig.layers
    dropout: float = JudgeConfig.dropout
    members: int = JudgeConfig.members


@dataclass
class LLScoreSection:
    """`judge: {kind: ll_score}`: a Qwen3-VL on LL-Bench."""

    base: str = MISSING  # folder or hub id of a Qwen3-VL checkpoint
    bench: str = MISSING  # folder of LL-Bench
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)  # logical column -> name in the CSV
    held_out: float = 0.1  # of the sources, for result.json
    held_out_models: tuple[str, ...] = ()  # restorers that training never sees
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    min_px: int = 256 * 256
    max_px: int = 512 * 512
    dtype: str = "float32"


@dataclass
class AnchorSection:
    """`judge: {kind: anchor}`: the consistency head of the reward `anchored`, on a photo arena."""

    arena: str = "data/arena/train"
    test: str | None = "data/arena/test"  # null: do not measure
    backbone: str = EFFICIENTNET
    worst: float = 0.25
    fault_weight: float = 1.0


@dataclass
class JudgeTrainConfig:
    run: JudgeRunConfig
    judge: Any
    loss: JudgeLoss = field(default_factory=JudgeLoss)
    train: TrainConfig = field(default_factory=TrainConfig)


SECTIONS = {"judge": {"anchor": AnchorSection, "embedded": EmbeddedJudgeSection, "ll_score": LLScoreSection}}


def load_judge_config(path: str | Path, overrides: Sequence[str] = ()) -> JudgeTrainConfig:
    return typed(JudgeTrainConfig, read_yaml(path, overrides), SECTIONS, str(path))


def train_judge(config: JudgeTrainConfig) -> Path:
    """The finished folder. ConfigError for what the user has to mend."""
    folder = Path(config.run.root) / config.run.name
    if folder.exists():
        raise ConfigError(f"{folder} exists already: choose another run.name, or move it away")
    working = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    (working / "judge").mkdir(parents=True)
    (working / "config.resolved.yaml").write_text(dump(config), "utf-8")
    try:
        result = {"anchor": _train_anchor, "embedded": _train_embedded, "ll_score": _train_ll_score}[config.judge.kind](
            config, working
        )
    except ValueError as error:
        raise ConfigError(f"judge: {error}") from error
    (working / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    working.rename(folder)
    return folder


def _fit(trainer: JudgeTrainer, folder: Path) -> None:
    trainer.train()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in trainer.history)


def _train_embedded(config: JudgeTrainConfig, folder: Path) -> dict[str, Any]:
    section: EmbeddedJudgeSection = config.judge.config
    sources = read_arena(Path(section.arena))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        made = JudgeConfig(section.hidden, section.layers, section.dropout, section.members)
        judge = new_judge(made, Path(section.restorer))
    train = config.train
    length = train.steps * train.sources * train.accumulate
    dataset = ArenaSequence(sources, judge, train.items, length, train.seed)
    collate = ArenaCollator(config.loss.unit)
    _fit(JudgeTrainer(TrainableJudge(judge), dataset, collate, folder / "trainer", train, config.loss), folder)
    save_judge(judge, folder / "judge")
    result: dict[str, Any] = {"sources": len(sources)}
    return result | (evaluate_embedded(folder / "judge", Path(section.test), ()) if section.test else {})


def evaluate_embedded(judge: Path, test: Path, baselines: Sequence[str] = ("nss", "niqe")) -> dict[str, Any]:
    """The judge and some no-reference rewards beside it on a test arena."""
    sources = read_arena(test)
    params = EmbeddedJudgeParams(weights=str(judge))
    heads = JudgeQuality(params), JudgeHallucination(params)
    report = {"judge": arena_report(judge_arena(sources, *heads))}
    return report | {name: arena_report(judge_arena(sources, build_reward(name))) for name in baselines}


def _train_anchor(config: JudgeTrainConfig, folder: Path) -> dict[str, Any]:
    section: AnchorSection = config.judge.config
    train = config.train
    if set(train.lr) != {"head"}:
        raise ConfigError(f"train.lr has rates for {sorted(train.lr)}; an anchor has the part head: lr: {{head: 1e-3}}")
    sources = read_arena(Path(section.arena))
    made = AnchorConfig(section.backbone, section.worst, section.fault_weight)
    anchor, losses = train_anchor(sources, made, train.steps, train.sources, train.lr["head"], train.seed)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, start=1))
    save_anchor(anchor, folder / "judge")
    result: dict[str, Any] = {"sources": len(sources), "loss": sum(losses[-20:]) / len(losses[-20:])}
    return result | (evaluate_anchor(folder / "judge", Path(section.test)) if section.test else {})


def evaluate_anchor(judge: Path, test: Path) -> dict[str, Any]:
    """The head and an untrained distance beside it: what each makes of planted faults and of quality."""
    sources, anchored = read_arena(test), Anchored(AnchoredParams(str(judge)))
    return {
        "anchored": arena_report(judge_arena(sources, anchored)),
        "semantic": arena_report(judge_arena(sources, build_reward("semantic"))),
    }


def _train_ll_score(config: JudgeTrainConfig, folder: Path) -> dict[str, Any]:
    from rewards.ll_score.train import train_ll_score

    section: LLScoreSection = config.judge.config
    values = {name: getattr(section, name) for name in ("columns", "held_out", "held_out_models")}
    model = {key: value for key, value in vars(section).items() if key not in (*values, "bench")}

    def fit(judge: Any, dataset: Any, collate: Any) -> None:
        _fit(JudgeTrainer(judge, dataset, collate, folder / "trainer", config.train, config.loss), folder)

    return train_ll_score(Path(section.bench), model, values, config.train, config.loss, fit, folder / "judge")


def evaluate_judge(judge: Path, data: Path) -> dict[str, Any]:
    """A trained judge of either kind on data of its kind: a test arena, or a folder with LL-Bench (all of its sources).

    ValueError if one of them is something else.
    """
    if (judge / "heads.safetensors").is_file():
        from rewards.ll_score.llbench import read_llbench
        from rewards.ll_score.model import load_ll_score
        from rewards.ll_score.train import bench_report, judge_bench

        return bench_report(judge_bench(load_ll_score(judge), read_llbench(data)))
    return evaluate_anchor(judge, data) if (judge / FACTS).is_file() else evaluate_embedded(judge, data)
