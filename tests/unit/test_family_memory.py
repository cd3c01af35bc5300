"""The memory that the head of each family's config promises is what `rlrestore.planning.memory` reckons today.

Parameters: diffusers' configs of the published checkpoints on the meta device. 1.5 GB for libraries and CUDA, a tenth of slack.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlrestore.build import load_train_config
from rlrestore.planning.memory import Copies, Network, Sharding, Transformer, saved_by_transformer, trainer_memory

FOLDER = Path(__file__).resolve().parents[2] / "configs/families"
M = 1_000_000
# config -> (frozen and trained parameters of the denoiser, VAE's, transformer or None for a UNet, whose activations are left out)
MODELS = {
    "flux_kontext_nft": (
        11_902 * M, 52.3 * M, 84 * M,
        Transformer((("flux_double", 19), ("flux_single", 38)), hidden=3072, tokens=512 + 2 * 1024),
    ),
    "one_step_nft": (866 * M, 6.6 * M, 84 * M, None),
    "qwen_image_edit_grpo_llscore": (
        20_430 * M, 94.4 * M, 127 * M, Transformer((("qwen", 60),), hidden=3072, tokens=64 + 2 * 1024),
    ),
    "sd2_controlnet_dpo": ((866 + 364) * M, 6.6 * M, 84 * M, None),
    "sd3_controlnet_grpo": (
        (2_243 + 500) * M, 23.9 * M, 84 * M, Transformer((("sd3", 24),), hidden=1536, tokens=333 + 1024),
    ),
}  # fmt: skip


def test_every_config_has_its_numbers() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_promise_is_the_formula(name: str) -> None:
    frozen, trained, beside, transformer = MODELS[name]
    config = load_train_config(FOLDER / f"{name}.yaml")
    copies = Copies(
        old=config.algorithm.kind == "nft",
        reference=config.regularise.asks_reference or config.algorithm.kind == "dpo",
    )
    saved = 0
    if transformer is not None:
        saved = saved_by_transformer(
            transformer, config.engine.micro_batch, lora=True, checkpointing=config.restorer.config.checkpointing
        )
    memory = trainer_memory(
        Network(int(frozen + trained), int(trained), lora=True, beside=beside),
        Sharding(config.engine.kind, config.engine.zero, config.placement.ranks),
        copies,
        saved=saved,
        process=1500 * M,
        slack=0.1,
    )
    promised = re.search(r"^# Memory: ([\d.]+) GB a rank", (FOLDER / f"{name}.yaml").read_text(), flags=re.M)
    assert promised is not None and float(promised[1]) == pytest.approx(memory.peak / 1e9, abs=0.051)
