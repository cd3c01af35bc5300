"""Colour fixes on numbers that can be derived, and that a picture in bands is the picture as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from envs.types import Task
from rewards.filters import atrous_low_pass
from rlrestore.iteration.rollout import to_pixels
from rlrestore.restorers.colour import (
    FIXES,
    adain,
    colour_drift_B,
    fixed,
    fixed_for_tasks,
    fixed_in_bands,
    mean_ab,
    wavelet,
)
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer
from rlrestore.restorers.restoration import restore_pixels


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_a_constant_cast_is_gone_and_detail_stays() -> None:
    photo = 0.3 + 0.3 * noise(1, 3, 40, 48)
    cast = photo + torch.tensor([0.1, 0.0, -0.1]).view(1, 3, 1, 1)
    for fix in (wavelet, adain):
        assert torch.allclose(fix(cast, photo), photo, atol=1e-5)
    result, lq = noise(1, 3, 64, 64, seed=1), noise(1, 3, 64, 64, seed=2)
    both = wavelet(result, lq)  # y - low(y) + low(lq)
    assert torch.allclose(both, result - atrous_low_pass(result) + atrous_low_pass(lq), atol=1e-6)
    channels = adain(result, lq)
    assert torch.allclose(channels.mean((2, 3)), lq.mean((2, 3)), atol=1e-5)
    assert torch.allclose(channels.std((2, 3)), lq.std((2, 3)), atol=1e-4)


def test_where_colour_is_what_is_wrong_it_is_left_alone() -> None:
    lq, image = noise(3, 16, 16), noise(2, 3, 16, 16, seed=1)
    tasks = [Task("a", lq, ("blur",)), Task("b", lq, ("blur", "haze"))]
    result = fixed_for_tasks("wavelet", image, tasks)
    assert torch.equal(result[0], fixed("wavelet", image[:1], lq[None])[0]) and not torch.equal(result[0], image[0])
    assert torch.equal(result[1], image[1])
    assert fixed_for_tasks("none", image, tasks) is image


def test_the_fix_has_a_gradient() -> None:
    image = noise(1, 3, 16, 16).requires_grad_(True)
    fixed_for_tasks("wavelet", image, [Task("a", noise(3, 16, 16, seed=1), ())]).sum().backward()
    assert image.grad is not None and bool(torch.isfinite(image.grad).all())


@pytest.mark.parametrize("kind", ["wavelet", "adain"])
def test_bands_are_the_whole(kind: str) -> None:
    image, lq = noise(3, 150, 37), (255 * noise(3, 150, 37, seed=1)).to(torch.uint8)
    whole = fixed(kind, image[None], lq[None].float() / 255)[0]
    parts = list(fixed_in_bands(kind, image, lq, band=40))
    assert [top for top, _ in parts] == [0, 40, 80, 120]
    assert torch.allclose(torch.cat([rows for _, rows in parts], dim=1), whole, atol=2e-6)


def test_drift_is_of_cielab() -> None:
    """sRGB red is (a, b) = (80.09, 67.20) under D65; every grey is at (0, 0)."""
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    grey = torch.full((1, 3, 2, 2), 0.5)
    assert torch.allclose(mean_ab(red)[0], torch.tensor([80.09, 67.20]), atol=0.02)
    assert torch.allclose(mean_ab(grey), torch.zeros(1, 2), atol=1e-3)
    assert float(colour_drift_B(red, grey)) == pytest.approx(float(torch.tensor([80.09, 67.20]).norm()), abs=0.03)
    assert float(colour_drift_B(grey, grey)) == 0


@pytest.mark.parametrize("kind", sorted(FIXES))
def test_restore_applies_what_training_applied(kind: str) -> None:
    """One tile: the same pixels as decode, fix, round of a rollout. An untrained restorer's first step is the photo: move it."""
    config = EmbeddedConfig(
        weights=None, precision="float32", unshuffle=2, mean_channels=(16, 16), flow_channels=(16, 32), groups=4
    )
    restorer = EmbeddedRestorer(config)
    with torch.no_grad():
        restorer.denoiser.conv_out.bias.add_(3.0)
    restorer.colour_fix = "none"
    photo = np.random.default_rng(0).integers(40, 200, (32, 40, 3), dtype=np.uint8)
    options = {"seed": 0, "steps": 1, "samples": 1, "tile": 64, "overlap": 16}
    plain = restore_pixels(restorer, photo, **options)
    restorer.colour_fix = kind
    seen = restore_pixels(restorer, photo, **options)
    lq = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    task = Task("photo", lq, ())
    expected = to_pixels(fixed_for_tasks(kind, torch.from_numpy(plain).permute(2, 0, 1)[None].float() / 255, [task]))[0]
    assert int((torch.from_numpy(seen).permute(2, 0, 1).int() - expected.int()).abs().max()) <= 1  # `plain` was rounded
    assert (kind == "none") == bool((seen == plain).all())
