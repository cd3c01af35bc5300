"""The embedded judge: measurements, files, arena, training; and the planted faults of the arena."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from envs.faults import FAULTS, plant
from envs.rng import generator_for
from rewards.composite import composite, gradient_similarity, texture_error
from rewards.embedded_judge.arena import ArenaCollator, ArenaSequence, read_arena
from rewards.embedded_judge.estimator import Estimator, EstimatorConfig
from rewards.embedded_judge.evaluate import arena_report
from rewards.embedded_judge.features import CHANNELS, cell_features
from rewards.embedded_judge.judge import PACKAGED, TrainableJudge, load_judge, save_judge
from rewards.embedded_judge.network import EmbeddedJudge, JudgeConfig
from rewards.filters import gaussian_blur
from rewards.judges.losses import JudgeLoss
from rewards.judges.report import Judgement
from rewards.judges.trainer import JudgeTrainer, TrainConfig
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def small_judge() -> EmbeddedJudge:
    torch.manual_seed(0)
    return EmbeddedJudge(JudgeConfig(8, 1, 0.0, 2), Estimator(EstimatorConfig(4, (8, 8, 8), 8, 1, 1, 4)))


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    """Two sources with four policy samples, a noisy and a faulty picture each."""
    tensors, rows = {}, []
    for i in range(2):
        gt = gaussian_blur(noise(i, 1, 3, 48, 48), 2.0)
        levels = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.2, 0.02]).view(-1, 1, 1, 1)
        images = (gt + levels * (noise(9 + i, 6, 3, 48, 48) - 0.5)).clamp(0, 1)
        images[5, :, 10:30, 10:30] = 0
        tensors[f"{i}/composite"] = composite(images, gt.expand_as(images))
        for name, value in (("lq", images[4]), ("gt", gt[0]), ("images", images)):
            tensors[f"{i}/{name}"] = (value * 255).round().to(torch.uint8)
        rows.append({"id": f"s{i}", "hands": ["policy"] * 4 + ["grain", "faulty"], "faults": [""] * 5 + ["erase"]})
    save_file(tensors, tmp_path / "0000.safetensors", metadata={"sources": json.dumps(rows)})
    return tmp_path


def test_nothing_differs_from_evidence_that_is_met() -> None:
    # x = m: no change energy (log of the floor), no drift from m, no surprise (log 1e-3), whatever the LQ is
    x, lq = noise(0, 1, 3, 48, 40), noise(1, 1, 3, 48, 40)
    f = cell_features(x, lq, x, torch.full_like(x, -3.0))[0]
    assert f.shape == (CHANNELS, 6, 5)
    assert torch.allclose(f[3], torch.full((6, 5), (float(np.log(1e-6)) + 8) / 3), atol=0.05)
    drift_m, surprise = f[24:27], f[30]
    assert drift_m.abs().max() == 0 and torch.allclose(surprise, torch.tensor(1e-3).log())


def test_measurements_see_kept_noise_and_sharpening() -> None:
    m = gaussian_blur(noise(2, 1, 3, 64, 64), 1.5)
    grain = 0.05 * (noise(3, 1, 3, 64, 64) - 0.5)
    spread = torch.full_like(m, -3.0)
    kept = cell_features(m + grain, m + grain, m, spread)[0, 6].mean()
    other = cell_features(m + grain.flip(3), m + grain, m, spread)[0, 6].mean()
    assert kept > 0.9 and other.abs() < 0.3  # correlation of x - m with l - m
    sharp = cell_features(m + 2 * (m - gaussian_blur(m, 1.0)), m, m, spread)[0, 5].mean()
    assert sharp > 0.5


def test_measurements_turn_with_the_pictures() -> None:
    four = [noise(seed, 1, 3, 48, 48) for seed in range(4)]
    turned = cell_features(*(z.rot90(1, (-2, -1)) for z in four))
    # the likeness of x - m and m divides by small energies: float32 leaves 1e-4
    assert torch.allclose(cell_features(*four).rot90(1, (-2, -1)), turned, atol=1e-2)


def test_a_filtered_lq_is_seen_through() -> None:
    # x = (lq + m) / 2: every band of both weighs 0.5 and nothing is left
    lq, m = noise(0, 1, 3, 64, 64), gaussian_blur(noise(1, 1, 3, 64, 64), 1.0)
    f = cell_features((lq + m) / 2, lq, m, torch.full_like(m, -3.0))[0].mean((1, 2))
    assert torch.allclose(f[-9:-1], torch.full((8,), 0.5), atol=0.01)
    assert f[-1] == pytest.approx((float(np.log(1e-6)) + 8) / 3, abs=0.05)


def test_gradients_are_finite_where_nothing_happens() -> None:
    judge = small_judge().eval()
    flat = torch.full((2, 3, 48, 48), 0.5, requires_grad=True)
    torch.stack(judge(torch.full((3, 48, 48), 0.5), flat)).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_the_packaged_estimator_is_the_packaged_restorers_mean() -> None:
    restorer = EmbeddedRestorer(EmbeddedConfig(precision="float32"))
    lq = noise(0, 1, 3, 45, 61)
    condition = restorer.condition(lq)
    mean, _ = load_judge(PACKAGED).estimator(lq)
    assert torch.allclose(mean, restorer.decode(torch.zeros_like(condition.mean), condition), atol=1e-5)


def test_sizes() -> None:
    judge = small_judge().eval()
    with torch.no_grad():
        quality, logit = judge(noise(0, 3, 45, 61), noise(1, 2, 3, 45, 61))
    assert quality.shape == logit.shape == (2,) and quality.isfinite().all()
    with pytest.raises(ValueError, match="at least 32 px, got 24x40"):
        judge(noise(0, 3, 24, 40), noise(1, 1, 3, 24, 40))


def test_saved_is_loaded_and_damage_is_named(tmp_path: Path) -> None:
    save_judge(small_judge(), tmp_path)
    lq, images = noise(0, 3, 48, 48), noise(1, 2, 3, 48, 48)
    one, two = load_judge(tmp_path), load_judge(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one(lq, images), two(lq, images), strict=True))
    again = tmp_path / "again"
    again.mkdir()
    save_judge(one, again)
    assert torch.equal(load_judge(again)(lq, images)[0], one(lq, images)[0])
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        load_judge(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_judge(tmp_path / "nowhere")


def test_training_orders_the_arena_and_leaves_the_estimator(arena: Path, tmp_path: Path) -> None:
    judge, sources = small_judge(), read_arena(arena)
    before = {name: p.clone() for name, p in judge.estimator.state_dict().items()}
    config = TrainConfig(steps=80, sources=2, items=6, lr={"heads": 1e-2}, warmup=2)
    dataset = ArenaSequence(sources, judge, 6, 160, 0)
    loss = JudgeLoss(unit=0.5, rank_form="cross_entropy")
    JudgeTrainer(TrainableJudge(judge), dataset, ArenaCollator(0.5), tmp_path / "t", config, loss).train()
    assert all(torch.equal(before[name], p) for name, p in judge.estimator.state_dict().items())
    judge.eval()
    judgements = []
    for s in sources:
        with torch.no_grad():
            quality, logit = (z.numpy() for z in judge(s.lq / 255, s.images / 255))
        judgements.append(
            Judgement(s.id, "arena", s.hands, quality, s.score.numpy(), logit, s.hallucinated.numpy(), s.faults)
        )
    report = arena_report(judgements)
    assert report["hands"]["srcc"] > 0.9 and report["faults"]["auroc"] == 1.0, report
    assert report["group"]["sources"] == 2 and report["faults"]["auroc/erase"] == 1.0


def test_items_are_a_function_of_their_index(arena: Path) -> None:
    sequence = ArenaSequence(read_arena(arena), small_judge(), 4, 10, 3)
    assert torch.equal(sequence[7]["features"], sequence[7]["features"])
    assert sequence[1]["hallucination"].sum() == 0  # odd ones are the policy's group


def test_no_arena_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no arena"):
        read_arena(tmp_path)


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_faults_are_visible_repeatable_and_on_the_grid(kind: str) -> None:
    image, other = gaussian_blur(noise(0, 1, 3, 64, 64), 2.0)[0], noise(1, 3, 64, 64)
    one, two = (plant(image, other, generator_for(5, 1), kind) for _ in range(2))
    assert torch.equal(one, two) and torch.equal((one * 255).round() / 255, one)
    changed = ((one - image).abs().amax(0) > 2 / 255).float().mean()
    assert 0.003 < changed, f"{kind} changes {float(changed):.2%} of the picture"
    if kind != "colour":
        assert changed < 0.6


def test_composite_dislikes_noise_and_smoothing() -> None:
    gt = gaussian_blur(noise(0, 1, 3, 64, 64), 1.0)
    worse = torch.cat([gt + 0.05 * (noise(1, 1, 3, 64, 64) - 0.5), gaussian_blur(gt, 1.0)])
    best = composite(gt, gt)
    # PSNR 80 / 2 + SSIM 1 / 0.08 + 1 / 0.04 - 0 = 77.5
    assert best.item() == pytest.approx(77.5, abs=1e-3)
    assert (composite(worse, gt.expand_as(worse)) < best - 5).all()
    assert texture_error(gt, gt).item() == 0 and gradient_similarity(gt, gt).item() == pytest.approx(1.0)
    # half the amplitude everywhere: log 4 = 1.386 a band where energies are far above the floor
    strong = noise(0, 1, 3, 64, 64)
    assert texture_error(0.5 * strong, strong).item() == pytest.approx(1.386, abs=0.02)
