"""Every shipped config of a family runs: the same file, with its weights, photos, sizes and judges made tiny.

The twin keeps what the config is about: family, algorithm, schedule, window, LoRA, checkpointing. What is replaced is named here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rewards.ll_score.model import LLScoreConfig, new_ll_score
from rlrestore.build import build_crew, check_parts, load_train_config
from rlrestore.config.files import read_yaml
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import StageTimes
from tests.tiny import iterate
from tests.tiny_pipelines import prompt_options, save_pipeline
from tests.tiny_qwen import save_tiny_qwen

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/families").glob("*.yaml"))
REPLACED_REWARDS = {"ssim_rgb": {"weight": 1.0}, "low_frequency": {"weight": 1.0}}  # where its own need weights


def tiny_rewards(rewards: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LL-Score stays, with a random judge of 0.1 M parameters; what needs weights that nobody can make here is replaced."""
    if not all(name.startswith("ll_score") for name in rewards):
        return REPLACED_REWARDS
    base = save_tiny_qwen(folder / "qwen")
    judge = new_ll_score(LLScoreConfig(str(base), lora_rank=8, lora_alpha=16, min_px=32 * 32, max_px=64 * 64))
    with torch.no_grad():
        for parameter in judge.parameter_groups()["heads"]:  # their last layers start at 0
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    judge.save(folder / "judge")
    return {name: {**term, "params": {"checkpoint": str(folder / "judge")}} for name, term in rewards.items()}


def twin(config: Path, folder: Path) -> TrainConfig:
    data: dict[str, Any] = read_yaml(config)
    kind = data["restorer"]["kind"]
    data["restorer"] |= {"weights": str(save_pipeline(kind, folder)), "precision": "float32", "lora_rank": 2}
    data["restorer"] |= prompt_options(kind, folder, short=True)
    if "controlnet" in data["restorer"]:
        data["restorer"]["controlnet"] = str(save_pipeline(kind, folder) / "controlnet")
    data["env"] = {"kind": "photos", "size": 32, "recipe": "mild"}
    data["rewards"], data["evaluate"] = tiny_rewards(data["rewards"], folder), {"tasks": 2, "samples": 1}
    samples = 2 * data["algorithm"].get("pairs", 1)
    data["rollout"] = {"groups": 2, "samples": samples, "batch": samples}
    data["engine"] |= {"kind": "torch", "micro_batch": samples}
    data["placement"] = {"kind": "local"}
    path = folder / config.name
    path.write_text(yaml.safe_dump(data))
    return load_train_config(path)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_twin_of_a_config_runs(config: Path, tmp_path: Path) -> None:
    tiny, real = twin(config, tmp_path), load_train_config(config)
    assert (tiny.algorithm, tiny.sampling, tiny.regularise) == (real.algorithm, real.sampling, real.regularise)
    env = check_parts(tiny)
    crew = build_crew(tiny, StageTimes())
    _, reports = iterate(crew, tiny, env, 0)
    assert len(reports[0].grad_norms) == crew.learner.algorithm.updates and min(reports[0].grad_norms) > 0
