"""LoRA on the families: what a step moves, what copies of the policy are, and that sampling and training agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from envs.registry import ENVS
from rlrestore.actors.workers import RolloutWorker
from rlrestore.build import RESTORERS, build_crew, check_parts
from rlrestore.config.files import ConfigError, Plugin
from rlrestore.crew import LocalCrew, StageTimes
from rlrestore.diffusion.sampling import Chain, sample
from rlrestore.iteration.stages import make_chunks, rollout_chain
from rlrestore.learning.weights import SyncError
from rlrestore.restorers.lora import matched_modules
from rlrestore.types import UpdateReport
from tests.tiny import iterate
from tests.tiny_pipelines import family_config

IDENTITY = 1e-5
MULTI_STEP = sorted(set(RESTORERS) - {"embedded", "one_step"})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def one_iteration(
    folder: Path, kind: str, algorithm: str, overrides: tuple[str, ...] = ()
) -> tuple[LocalCrew, dict[str, Tensor], list[UpdateReport]]:
    """(crew after an iteration, every parameter and buffer before it, reports)."""
    config = family_config(folder, kind, algorithm, overrides)
    env = check_parts(config)
    crew = build_crew(config, StageTimes())
    assert isinstance(crew, LocalCrew)
    before = {name: value.clone() for name, value in everything(crew).items()}
    _, reports = iterate(crew, config, env, 0)
    return crew, before, reports


def everything(crew: LocalCrew) -> dict[str, Tensor]:
    restorer = crew.learner.restorer
    return {**restorer.denoiser.state_dict(), **{f"vae.{k}": v for k, v in restorer.vae.state_dict().items()}}


def moved(crew: LocalCrew, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in everything(crew).items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("kind", MULTI_STEP)
def test_grpo_moves_the_adapter_alone_and_is_on_policy(folder: Path, kind: str) -> None:
    crew, before, reports = one_iteration(folder, kind, "grpo")
    assert reports[0].maxima["ratio_deviation_max_on_policy"] < IDENTITY
    assert reports[0].grad_norms[0] > 0
    # B is 0 at the start, so A has no gradient in the first step and B has; but for the last block's text stream, whose
    # queries and output no picture depends on
    adapter = {name for name in before if ".lora_B.default." in name}
    assert moved(crew, before) <= adapter
    assert all("add_q_proj" in name or "to_add_out" in name for name in adapter - moved(crew, before))
    assert set(crew.learner.weights("current")) == {name for name in before if ".lora_" in name and ".default." in name}


NFT_DEFAULT = ("flux_kontext", "one_step", "sd_controlnet")  # the others are slow tests; two ranks have them all, too


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in NFT_DEFAULT else pytest.mark.slow)
        for kind in sorted(set(RESTORERS) - {"embedded"})
    ],
)
def test_nft_moves_the_adapter_and_its_slow_copy(folder: Path, kind: str) -> None:
    crew, before, reports = one_iteration(folder, kind, "nft")
    assert reports[0].grad_norms[0] > 0
    current = {name for name in before if ".lora_B.default." in name}
    assert moved(crew, before) == current | {name.replace("default", "old") for name in current}


@pytest.mark.parametrize("kind", ["flux_kontext", "sd_controlnet"])
def test_a_bfloat16_base_has_a_float32_adapter_and_is_on_policy(folder: Path, kind: str) -> None:
    """The default precision. Sampling and replay run the same kernels, so that rounding cancels."""
    crew, before, reports = one_iteration(folder, kind, "grpo", ("restorer.precision=bfloat16",))
    assert reports[0].maxima["ratio_deviation_max_on_policy"] < IDENTITY and reports[0].grad_norms[0] > 0
    dtypes = {name: value.dtype for name, value in crew.learner.restorer.denoiser.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" not in name} == {torch.bfloat16}
    assert moved(crew, before) <= {name for name in before if ".lora_B.default." in name}


def test_dpo_with_a_reference_adapter(folder: Path) -> None:
    crew, before, reports = one_iteration(folder, "sd_controlnet", "dpo")
    assert reports[0].grad_norms[0] > 0
    assert moved(crew, before) == {name for name in before if ".lora_B.default." in name}
    assert any(".reference." in name for name in before)


def test_copies_are_adapters_of_one_network(folder: Path) -> None:
    """Each policy answers with its own adapter, whatever was asked before, and flags of training stay as they are."""
    crew, _, _ = one_iteration(folder, "flux_kontext", "nft", ("regularise.velocity=0.1",))
    learner, restorer = crew.learner, crew.learner.restorer
    size = sum(p.numel() for p in learner.scratch.parameters())
    assert size == learner.trained
    assert learner.scratch.network is learner.old.network is learner.reference.network is restorer.denoiser
    condition = restorer.condition(torch.rand(1, 3, 32, 32))
    z, t_B = torch.randn(1, *restorer.latent_shape(condition)), torch.tensor([0.5])
    with torch.no_grad():
        for parameter in learner.scratch.parameters():
            parameter.add_(0.1)
        answers = [
            restorer.velocity(z, t_B, condition, net)
            for net in (None, learner.scratch, learner.reference, None, learner.scratch)
        ]
    assert torch.equal(answers[0], answers[3]) and torch.equal(answers[1], answers[4])
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    assert {n for n, p in restorer.denoiser.named_parameters() if p.requires_grad} == set(learner.base.shapes)
    assert all(".default." in name for name in learner.base.shapes)


def test_the_reference_is_the_network_without_its_adapter(folder: Path) -> None:
    """B = 0 at the start: the copied adapter and the bare network are one policy."""
    crew, _, _ = one_iteration(folder, "sd3_controlnet", "grpo", ("regularise.velocity=0.1",))
    restorer = crew.learner.restorer
    condition = restorer.condition(torch.rand(1, 3, 32, 32))
    z, t_B = torch.randn(1, *restorer.latent_shape(condition)), torch.tensor([0.5])
    with torch.no_grad():
        reference = restorer.velocity(z, t_B, condition, crew.learner.reference)
        restorer.denoiser.transformer.disable_adapters()
        assert torch.equal(reference, restorer.velocity(z, t_B, condition))


def test_checkpointing_changes_nothing(folder: Path) -> None:
    plain = one_iteration(folder, "flux_kontext", "grpo")[0]
    thrifty = one_iteration(folder, "flux_kontext", "grpo", ("restorer.checkpointing=true",))[0]
    assert thrifty.learner.restorer.denoiser.transformer.is_gradient_checkpointing
    for name, value in plain.learner.weights("current").items():
        assert torch.equal(value, thrifty.learner.weights("current")[name]), name


def test_a_saved_adapter_is_opened_again(folder: Path, tmp_path: Path) -> None:
    crew, _, _ = one_iteration(folder, "flux_kontext", "grpo")
    learner = crew.learner
    learner.export(tmp_path / "saved", "current")
    kind = learner.restorer.kind
    config = family_config(folder, kind, "grpo", (f"restorer.weights={tmp_path / 'saved'}", "restorer.lora_rank=7"))
    again = build_crew(config, StageTimes()).learner.restorer
    assert again.config.lora_rank == 2  # the folder brings its own config
    condition = again.condition(torch.rand(1, 3, 32, 32))
    chain = Chain(tuple(again.times(2, (32, 32))))
    ours, theirs = (sample(restorer, condition, [3], chain)[0] for restorer in (learner.restorer, again))
    assert torch.equal(ours, theirs)


def test_a_target_that_matches_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no linear or convolution layer is called 'to_qq'"):
        one_iteration(folder, "flux_kontext", "grpo", ("restorer.lora_targets=[to_q, to_qq]",))


def test_targets_are_ends_of_names() -> None:
    net = torch.nn.ModuleDict(
        {"attn": torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)}), "to_q_norm": torch.nn.Linear(2, 2)}
    )
    assert matched_modules(net, ["to_q"]) == ["attn.to_q"]
    assert matched_modules(net, [r"attn\.to_\w"]) == ["attn.to_q"]


OVERFIT_DEFAULT = ("flux_kontext", "one_step", "sd_upscale")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in OVERFIT_DEFAULT else pytest.mark.slow)
        for kind in sorted(set(RESTORERS) - {"embedded"})
    ],
)
def test_supervised_training_fits_two_pairs_through_the_adapter(folder: Path, kind: str) -> None:
    """Adam on one fixed draw of times and noise: the loss falls, and nothing but the adapter moves."""
    restorer = build_crew(family_config(folder, kind, "nft", ("restorer.lora_rank=8",)), StageTimes()).learner.restorer
    before = {name: value.clone() for name, value in restorer.denoiser.state_dict().items()}
    (module,) = restorer.supervised_modules().values()
    optimiser = torch.optim.Adam(list(module.requires_grad_(True).parameters()), lr=0.01)
    photos = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(12):
        loss, _ = restorer.supervised_loss(
            photos[:2], photos[2:], torch.tensor([0.3, 0.8]), torch.Generator().manual_seed(2)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0], losses
    after = restorer.denoiser.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} <= {
        name for name in before if ".default." in name
    }


def test_a_rollout_worker_serves_the_published_adapter(folder: Path) -> None:
    """Placement `separate`: only the adapter travels, is checked, and gives the trainer's own pictures."""
    config = family_config(folder, "sd_controlnet", "grpo")
    env = check_parts(config)
    crew = build_crew(config, StageTimes())
    iterate(crew, config, env, 0)
    published = crew.learner.publish("behaviour")
    worker = RolloutWorker()
    worker.setup(config.restorer, (), 1, 1)
    assert worker.receive(published) == (1, published.sha256)
    base = sum(value.numel() for value in worker.network.parameters())
    assert len(published.blob) < 0.2 * 4 * base
    chain = rollout_chain(config.sampling, 0, 1, crew.learner.algorithm)
    (chunk,) = make_chunks(env.draw(1, 2), 2, 4, 0, 1)
    images, _ = worker.sample(chunk, chain, 1)
    assert torch.equal(images.pixels, crew.learner.sample(chunk, chain).pixels)
    with pytest.raises(SyncError, match="older than version 1"):
        worker.receive(replace(published, version=0))
    with pytest.raises(SyncError, match="have sha256"):
        worker.receive(replace(published, blob=published.blob[:-1] + b"x"))
    with pytest.raises(SyncError, match="holds weights version 1, version 2 was asked for"):
        worker.sample(chunk, chain, 2)


def test_photos_of_any_size_are_trained_on_whole(folder: Path, tmp_path: Path) -> None:
    """A group has one size; odd sides are padded inside and cut back, and rollout and replay still agree."""
    for name in ("lq", "gt"):
        (tmp_path / name).mkdir()
    for index in range(16):
        height, width = ((37, 50), (64, 32))[index % 2]
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for name in ("lq", "gt"):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    plain = family_config(
        folder, "flux_kontext", "grpo", ("rollout.batch=2", "engine.micro_batch=2", "rollout.groups=4")
    )
    schema = ENVS["paired"][0]
    folders = {"lq_dir": str(tmp_path / "lq"), "gt_dir": str(tmp_path / "gt")}
    whole = Plugin("paired", schema(**folders, size=None, held_out_fraction=0.3))
    config = replace(plain, env=whole)
    env = check_parts(config)
    mixed = next(i for i in range(20) if len({task.lq.shape for task in env.draw(i, 4)}) == 2)
    crew = build_crew(config, StageTimes())
    scored, reports = iterate(crew, config, env, mixed)
    assert all(part.images.pixels.shape[-2:] == part.chunk.tasks_of(slice(1))[0].lq.shape[-2:] for part in scored)
    assert reports[0].maxima["ratio_deviation_max_on_policy"] < IDENTITY and reports[0].grad_norms[0] > 0
    with pytest.raises(ConfigError, match=r"photos may have several sizes, and rollout\.batch=4 mixes groups"):
        check_parts(replace(config, rollout=replace(config.rollout, batch=4)))
