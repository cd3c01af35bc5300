"""`rlrestore export`: what diffusers opens alone gives the tuned pictures, and `rlrestore restore` opens it, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrestore.build import build_crew, check_parts
from rlrestore.commands.cache_prompts import run_cache_prompts
from rlrestore.commands.export import run_export
from rlrestore.commands.restore import load_restorer, run_restore
from rlrestore.crew import StageTimes
from rlrestore.diffusion.sampling import Chain, sample, seeded_noise
from rlrestore.errors import InputError
from rlrestore.restorers.pipeline import PipelineRestorer
from rlrestore.restorers.restoration import restore_pixels
from tests.pipeline_calls import CALLS, HEIGHT, STEPS, WIDTH, comparable, photos
from tests.tiny import train_tiny
from tests.tiny_pipelines import PROMPT, family_config, open_pipeline, save_pipeline

LIMIT = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(autouse=True)
def _comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    comparable(monkeypatch)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A whole run of a tiny Kontext."""
    return train_tiny(family_config(folder, "flux_kontext", "nft", ["engine.lr=0.05"]))[0]


def tuned(folder: Path, kind: str, **options: Any) -> Path:
    """A folder with an adapter that was not trained but moved: large enough to be seen."""
    overrides = [f"restorer.{key}={value}" for key, value in options.items()]
    config = family_config(folder, kind, "nft", overrides)
    check_parts(config)
    learner = build_crew(config, StageTimes()).learner
    generator = torch.Generator().manual_seed(0)
    for value in learner.ema.slices.values():
        value.add_(0.05 * torch.randn(value.shape, generator=generator))
    target = folder / f"tuned_{kind}_{'_'.join(map(str, options.values()))}"
    learner.export(target, "ema")
    return target


def pictures(restorer: PipelineRestorer) -> tuple[Tensor, Tensor]:
    condition = restorer.condition(photos())
    z_0, _ = sample(restorer, condition, [1, 2], Chain(tuple(restorer.times(STEPS, (HEIGHT, WIDTH)))))
    with torch.no_grad():
        return restorer.decode(z_0, condition), seeded_noise([1, 2], restorer.latent_shape(condition))[0]


def difference(pipe: Any, kind: str, checkpoint: Path) -> float:
    """Largest difference of a picture between diffusers' pipeline and ours."""
    restorer = load_restorer(checkpoint)
    assert isinstance(restorer, PipelineRestorer)
    images, noise = pictures(restorer)
    text = {name: value.expand(2, *value.shape[1:]) for name, value in restorer.prompt.items()}
    return float((CALLS[kind](pipe, photos(), noise, text, restorer) - images).abs().max())


@pytest.mark.parametrize("kind", ["flux_kontext", "qwen_image_edit", "sd3_controlnet", "sd_controlnet"])
def test_a_lora_is_loaded_by_the_pipeline(folder: Path, kind: str, tmp_path: Path) -> None:
    checkpoint = tuned(folder, kind, lora_alpha=4)  # rank 2: readers that lose alpha are off by 2
    run_export(checkpoint, tmp_path / "out", "lora", None, None)
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert tensors and all(value.numel() for value in tensors.values())
    pipe = open_pipeline(kind, save_pipeline(kind, folder))
    before = difference(pipe, kind, checkpoint)
    pipe.load_lora_weights(tmp_path / "out")
    assert difference(pipe, kind, checkpoint) < LIMIT < 100 * LIMIT < before


@pytest.mark.parametrize(("kind", "rank"), [("flux_kontext", 2), ("ldm_sr", 2), ("sd_controlnet", 0)])
def test_a_pipeline_is_opened_by_diffusers(folder: Path, kind: str, rank: int, tmp_path: Path) -> None:
    checkpoint = tuned(folder, kind, lora_rank=rank)
    run_export(checkpoint, tmp_path / "out", "pipeline", None, None)
    assert difference(open_pipeline(kind, tmp_path / "out"), kind, checkpoint) < LIMIT
    again = difference(open_pipeline(kind, tmp_path / "out"), kind, tmp_path / "out")  # our reading of the same folder
    assert again < LIMIT
    assert difference(open_pipeline(kind, save_pipeline(kind, folder)), kind, checkpoint) > 100 * LIMIT


def test_a_run_is_exported_with_its_card_and_restores_photos(run: Path, tmp_path: Path) -> None:
    run_export(run, tmp_path / "out", "lora", "apache-2.0", None)
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0" and header["base_model"].endswith("flux_kontext")
    result = json.loads((run / "result.json").read_text())["metrics"]["ssim_rgb"]
    assert f"{result['tuned']:.4f}" in card and "1 iterations of nft" in card
    assert (tmp_path / "out" / "config.resolved.yaml").read_text() == (run / "config.resolved.yaml").read_text()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 41, 3), dtype=np.uint8))
    photo.save(tmp_path / "in.png")
    options = {"seed": 0, "steps": 2, "samples": 1, "tile": 64, "overlap": 0, "overwrite": False}
    for name, checkpoint in (("a.png", run), ("b.png", tmp_path / "out")):
        run_restore(tmp_path / "in.png", tmp_path / name, checkpoint, **options)
    assert Image.open(tmp_path / "a.png").size == (41, 33)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("kind", ["flux_kontext", "sd3_controlnet", "sd_upscale"])
def test_a_family_restores_a_large_photo_in_tiles(folder: Path, kind: str) -> None:
    """Larger than one tile both ways, odd sides, and beyond SD3's positions (128 px a side)."""
    restorer = load_restorer(tuned(folder, kind))
    photo = np.random.default_rng(0).integers(0, 256, (75, 141, 3), dtype=np.uint8)
    options = {"seed": 0, "steps": 1, "samples": 1, "tile": 64, "overlap": 32}
    plain = restore_pixels(restorer, photo, **options)
    assert plain.shape == photo.shape and np.array_equal(plain, restore_pixels(restorer, photo, **options))
    restorer.colour_fix = "wavelet"
    fixed = restore_pixels(restorer, photo, **options)
    drift = [np.abs(image.mean((0, 1)) - photo.mean((0, 1))).max() for image in (plain, fixed)]
    assert drift[1] < drift[0]
    assert np.array_equal(restore_pixels(restorer, photo, **options, types=["haze"]), plain)


def test_steps_that_a_family_does_not_take_are_refused(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    options = {"seed": 0, "samples": 1, "tile": 64, "overlap": 0, "overwrite": False}
    with pytest.raises(InputError, match="--steps 8: 8 steps of a restorer that takes one: set steps to 1"):
        run_restore(tmp_path / "in.png", tmp_path / "out.png", tuned(folder, "one_step"), steps=8, **options)
    assert not (tmp_path / "out.png").exists()


def test_what_cannot_be_exported_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    whole = tuned(folder, "sd_controlnet", lora_rank=0)
    for source, target, form, push, message in (
        (run, tmp_path / "there", "lora", None, "exists already"),
        (run, tmp_path / "out", "gguf", None, "choose one of lora, pipeline"),
        (run, tmp_path / "out", "lora", "me/model", "add --licence"),
        (whole, tmp_path / "out", "lora", None, "use --format pipeline"),
        (tuned(folder, "ldm_sr"), tmp_path / "out", "lora", None, "loads no LoRA: use --format pipeline"),
        (tmp_path / "there", tmp_path / "out", "lora", None, "holds no restorer"),
    ):
        with pytest.raises(InputError, match=message):
            run_export(source, target, form, None, push)
        assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_a_cached_prompt_is_what_the_pipeline_says(folder: Path, tmp_path: Path) -> None:
    weights = save_pipeline("flux_kontext", folder)
    run_cache_prompts(str(weights), tmp_path / "prompt.safetensors", PROMPT, (), None, None)
    cached = load_file(tmp_path / "prompt.safetensors")
    with torch.no_grad():
        embeds, pooled, _ = open_pipeline("flux_kontext", weights).encode_prompt(PROMPT, None)
    assert torch.equal(cached["prompt_embeds"], embeds) and torch.equal(cached["pooled_prompt_embeds"], pooled)
    with pytest.raises(InputError, match="exists already"):
        run_cache_prompts(str(weights), tmp_path / "prompt.safetensors", PROMPT, (), None, None)
    with pytest.raises(InputError, match="no text encoder"):
        run_cache_prompts(
            str(save_pipeline("qwen_image_edit", folder)), tmp_path / "q.safetensors", PROMPT, (), None, None
        )
    save_file({"prompt_embeds": embeds}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="has no pooled_prompt_embeds"):
        check_parts(
            family_config(folder, "flux_kontext", "nft", [f"restorer.prompt_embeds={tmp_path / 'half.safetensors'}"])
        )
