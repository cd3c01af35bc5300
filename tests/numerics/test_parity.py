"""Our sampling is the pipeline's own `__call__`: same weights, photo, noise, times and guidance give the same picture.

This is the proof that conditioning, packing, time, schedule and decoding are right, one family after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlrestore.build import RESTORERS, build_restorer
from rlrestore.config.files import Plugin
from rlrestore.diffusion.sampling import Chain, sample, seeded_noise
from rlrestore.restorers.base import Restorer
from tests.pipeline_calls import CALLS, HEIGHT, STEPS, WIDTH, comparable, photos
from tests.tiny_pipelines import PIPELINES, open_pipeline, prompt_options, save_pipeline

SEEDS = [11, 12]
LIMIT = 1e-4  # of a picture in [0, 1]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(autouse=True)
def _comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    comparable(monkeypatch)


def restorer_of(kind: str, folder: Path, **options: Any) -> Restorer:
    config = RESTORERS[kind][0](
        weights=str(save_pipeline(kind, folder)),
        precision="float32",
        lora_rank=2,
        **prompt_options(kind, folder),
        **options,
    )
    return build_restorer(Plugin(kind, config))


def ours(restorer: Restorer, lq: Tensor) -> tuple[Tensor, Tensor]:
    """(pictures, the noise that they started from)."""
    condition = restorer.condition(lq)
    times = restorer.times(1 if restorer.one_step else STEPS, (HEIGHT, WIDTH))
    z_0, _ = sample(restorer, condition, SEEDS, Chain(tuple(times)))
    with torch.no_grad():
        images = restorer.decode(z_0, condition)
    return images, seeded_noise(SEEDS, restorer.latent_shape(condition))[0]


def test_every_family_is_compared() -> None:
    assert set(CALLS) == set(PIPELINES) == set(RESTORERS) - {"embedded"}


@pytest.mark.parametrize("kind", sorted(CALLS))
def test_parity(kind: str, folder: Path) -> None:
    restorer, lq = restorer_of(kind, folder), photos()
    images, noise = ours(restorer, lq)
    pipe = open_pipeline(kind, save_pipeline(kind, folder))
    text = {name: value.expand(2, *value.shape[1:]) for name, value in getattr(restorer, "prompt", {}).items()}
    theirs = CALLS[kind](pipe, lq, noise, text, restorer)
    error = float((images - theirs).abs().max())
    print(f"{kind}: max abs error {error:.1e}")
    assert error < LIMIT
    # the comparison can fail: another photo, or another prompt, gives another picture by far more than the limit
    assert float((ours(restorer, lq.flip(0))[0] - theirs).abs().max()) > 20 * LIMIT


@pytest.mark.parametrize("kind", ["qwen_image_edit", "sd_controlnet"])
def test_parity_with_guidance(kind: str, folder: Path) -> None:
    """Qwen keeps the norm of each token, Stable Diffusion does not."""
    negative = folder / f"negative_{kind}.safetensors"
    tokens = 6 if kind == "qwen_image_edit" else 77
    save_file({"prompt_embeds": torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(9))}, negative)
    restorer = restorer_of(kind, folder, cfg=3.0, negative_prompt_embeds=str(negative))
    images, noise = ours(restorer, photos())
    pipe = open_pipeline(kind, save_pipeline(kind, folder))
    given = {**restorer.prompt, "negative_prompt_embeds": restorer.negative["prompt_embeds"]}
    text = {name: value.expand(2, *value.shape[1:]) for name, value in given.items()}
    assert float((images - CALLS[kind](pipe, photos(), noise, text, restorer)).abs().max()) < LIMIT
    assert float((ours(restorer_of(kind, folder), photos())[0] - images).abs().max()) > 20 * LIMIT
