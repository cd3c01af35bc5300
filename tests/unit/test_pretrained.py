"""What is no pipeline, another family's, or unsafe is refused before a tensor is read, with what to do."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rlrestore.build import RESTORERS, build_restorer, check_parts
from rlrestore.config.files import ConfigError, Plugin
from rlrestore.learning.optimiser import adamw8bit
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.pretrained import KIND_OF_PIPELINE, local_folder
from tests.tiny_pipelines import family_config, prompt_options, save_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrained")


def opened(kind: str, folder: Path, **options: object) -> Restorer:
    given = {
        "weights": str(save_pipeline(kind, folder)),
        "precision": "float32",
        **prompt_options(kind, folder),
        **options,
    }
    return build_restorer(Plugin(kind, RESTORERS[kind][0](**given)))


def copy_of(kind: str, folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(save_pipeline(kind, folder), target))


def test_every_pipeline_class_has_its_family() -> None:
    first = {family.pipelines[0]: kind for kind, (_, family) in RESTORERS.items() if kind != "embedded"}
    assert first == KIND_OF_PIPELINE


def test_a_folder_that_is_no_pipeline(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no pipeline in diffusers' format .* save_pretrained wrote"):
        opened("sd_controlnet", folder, weights=str(tmp_path))
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        opened("sd_controlnet", folder, weights="models/of/mine")


def test_another_familys_pipeline(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a StableDiffusionUpscalePipeline .* set restorer.kind=sd_upscale"):
        opened("flux_kontext", folder, weights=str(save_pipeline("sd_upscale", folder)))


def test_a_custom_pipeline_is_not_run(folder: Path, tmp_path: Path) -> None:
    target = copy_of("sd_controlnet", folder, tmp_path / "custom")
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Mine"]}))
    (target / "pipeline.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ConfigError, match="cannot use it"):
        opened("sd_controlnet", folder, weights=str(target))


def test_pickles_are_not_opened(folder: Path, tmp_path: Path) -> None:
    target = copy_of("sd_controlnet", folder, tmp_path / "pickled")
    (weights,) = (target / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({}, target / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"a pickle can run code .* safe_serialization=True"):
        opened("sd_controlnet", folder, weights=str(target))


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    target = copy_of("sd_controlnet", folder, tmp_path / "damaged")
    (weights,) = (target / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"vae cannot be loaded \(.*\): copy it again"):
        opened("sd_controlnet", folder, weights=str(target))


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_hub_id_needs_a_commit(revision: str | None) -> None:
    with pytest.raises(ValueError, match="40-character commit, because a branch moves"):
        local_folder("owner/name", revision)


def test_the_hub_out_of_reach() -> None:
    with pytest.raises(ValueError, match="could not be downloaded"):
        local_folder("owner/name", "0" * 40)


def test_a_photo_that_the_transformer_has_no_positions_for(folder: Path) -> None:
    restorer = opened("sd3_controlnet", folder)  # 32 positions of 2 cells of 2 px
    restorer.condition(torch.rand(1, 3, 128, 64))
    with pytest.raises(ValueError, match=r"132x64 px has no positions .* ends at 128 px a side: restore it in tiles"):
        restorer.condition(torch.rand(1, 3, 130, 64))


def test_a_vae_of_another_factor(folder: Path, tmp_path: Path) -> None:
    target = copy_of("sd_upscale", folder, tmp_path / "x2")
    shutil.rmtree(target / "vae")
    shutil.copytree(save_pipeline("sd_controlnet", folder) / "vae", target / "vae")
    with pytest.raises(ConfigError, match="works at 1/2 of the size and the upscaler needs 1/4"):
        opened("sd_upscale", folder, weights=str(target))


def test_a_size_that_is_no_multiple(folder: Path) -> None:
    """env.size 30 with cells of 4 px: the run would train on padding."""
    with pytest.raises(ConfigError, match="multiples of 4"):
        check_parts(family_config(folder, "sd3_controlnet", "nft", ["env.size=30"]))


def test_times_beyond_the_models_noise(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no noise above t=0.935958: set sampling.times, e.g. to its own \[0.9359576, "
    ):
        check_parts(family_config(folder, "sd_controlnet", "nft", ["sampling.times=[]"]))
    with pytest.raises(ConfigError, match=r"sampling.steps \+ 1 = 4 falling numbers"):
        family_config(folder, "sd_controlnet", "nft", ["sampling.times=[0.9, 0]"])


def test_one_step_restorers_refuse_trajectories(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes one step: set sampling\.steps=1"):
        check_parts(family_config(folder, "one_step", "nft", ["sampling.steps=2", "sampling.times=[]"]))
    steps = ["sampling.steps=2", "sampling.times=[1, 0.5, 0]"]
    with pytest.raises(ConfigError, match="is deterministic: choose a forward-process method such as nft"):
        check_parts(family_config(folder, "one_step", "grpo", steps))


@pytest.mark.parametrize("kind", ["flux_kontext", "sd_upscale"])
def test_odd_sizes_are_padded_and_cut_back(kind: str, folder: Path) -> None:
    restorer = opened(kind, folder)
    photo = torch.rand(1, 3, 37, 50)
    condition = restorer.condition(photo)
    z_0 = restorer.encode(photo, condition)
    assert tuple(z_0.shape[1:]) == restorer.latent_shape(condition)
    assert restorer.decode(z_0, condition).shape == photo.shape


def test_rows_of_a_batch_do_not_see_one_another(folder: Path) -> None:
    restorer = opened("sd_upscale", folder)
    photos = torch.rand(2, 3, 32, 32)
    both = restorer.condition(photos)
    z, t_B = torch.randn(2, *restorer.latent_shape(both)), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        together = restorer.velocity(z, t_B, both)
        for row in (0, 1):
            alone = restorer.velocity(z[row : row + 1], t_B[row : row + 1], restorer.condition(photos[row : row + 1]))
            assert float((alone - together[row : row + 1]).abs().max()) < 1e-4


def test_bfloat16_weights_are_not_trained_without_masters(folder: Path) -> None:
    whole = ["restorer.lora_rank=0", "restorer.precision=bfloat16"]
    with pytest.raises(
        ConfigError, match=r"without float32 masters \(engine.precision=float32\): set restorer.lora_rank"
    ):
        check_parts(family_config(folder, "sd_controlnet", "nft", whole))
    check_parts(
        family_config(
            folder,
            "sd_controlnet",
            "nft",
            [*whole, "engine.kind=deepspeed", "engine.zero=1", "engine.precision=bfloat16"],
        )
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.offload=optimiser"], "engine.offload=optimiser needs engine.kind=deepspeed, got torch"),
        (["engine.kind=deepspeed", "engine.zero=0", "engine.offload=optimiser"], "needs engine.zero >= 1, got 0"),
        (
            ["engine.kind=deepspeed", "engine.offload=weights"],
            "needs engine.zero=3, got 2: set it, or offload=optimiser",
        ),
        (["engine.kind=deepspeed", "engine.optimiser=adamw8bit"], "needs bitsandbytes: pip install bitsandbytes"),
        (["engine.optimiser=adamw9bit"], "engine.optimiser=adamw9bit is unknown"),
        (["restorer.colour_fix=sepia"], "restorer.colour_fix 'sepia' is unknown: choose one of adain, none, wavelet"),
    ],
)
def test_thrift_that_cannot_be_had(
    folder: Path, overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_parts(family_config(folder, "sd_controlnet", "nft", overrides))


def test_eight_bit_moments_come_from_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in under the package's name: it is not installed here, and runs on GPUs."""
    stand_in = ModuleType("bitsandbytes")
    stand_in.optim = SimpleNamespace(AdamW8bit=torch.optim.AdamW)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in.optim)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimiser = adamw8bit([parameter], 0.5, (0.9, 0.99), 0.1)
    assert optimiser.defaults["lr"] == 0.5 and optimiser.defaults["betas"] == (0.9, 0.99)
    assert optimiser.defaults["weight_decay"] == 0.1 and optimiser.param_groups[0]["params"] == [parameter]
