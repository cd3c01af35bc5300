"""Every shipped config of a family runs: the same file, with its weights, photos, sizes and judges made tiny.

The twin keeps what the config is about: family, algorithm, schedule, window, LoRA, checkpointing. What is replaced is named here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlrestore.build import build_crew, check_parts, load_train_config
from rlrestore.config import TrainConfig
from rlrestore.config_files import read_yaml
from rlrestore.crew import StageTimes
from tests.tiny import iterate
from tests.tiny_pipelines import prompt_options, save_pipeline

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/families").glob("*.yaml"))
REPLACED_REWARDS = {"ssim_rgb": {"weight": 1.0}, "low_frequency": {"weight": 1.0}}  # the config's own need weights


def twin(config: Path, folder: Path) -> TrainConfig:
    data: dict[str, Any] = read_yaml(config)
    kind = data["restorer"]["kind"]
    data["restorer"] |= {"weights": str(save_pipeline(kind, folder)), "precision": "float32", "lora_rank": 2}
    data["restorer"] |= prompt_options(kind, folder, short=True)
    if "controlnet" in data["restorer"]:
        data["restorer"]["controlnet"] = str(save_pipeline(kind, folder) / "controlnet")
    data["env"] = {"kind": "photos", "size": 32, "recipe": "mild"}
    data["rewards"], data["evaluate"] = REPLACED_REWARDS, {"tasks": 2, "samples": 1}
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
