"""Penalties against numbers by hand: a restorer whose latent is the picture and whose frozen start says v = 0."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrestore.algorithms.base import Visit
from rlrestore.config import RegulariseConfig
from rlrestore.regularisers import penalties

BATCH: Any = SimpleNamespace(condition=None)
POLICIES: Any = SimpleNamespace(
    reference_velocity=lambda z_t, t_B, condition: torch.zeros_like(z_t),
    restorer=SimpleNamespace(decode=lambda z_0, condition: z_0),
)
BOTH = RegulariseConfig(velocity=0.5, low_frequency=3.0)


def visit(v: Tensor, t: float) -> Visit:
    return Visit(torch.full_like(v, 0.5), torch.full((len(v),), t), v, None)


def test_brightness_is_low_frequency_and_weights_are_handed_on() -> None:
    v = torch.stack([torch.full((3, 64, 64), 0.1), torch.full((3, 64, 64), -0.2)])
    found = penalties(BOTH, POLICIES, BATCH, visit(v, 0.5))
    # x_0 = z_t - t v moves by 0.05 and 0.1; v - v_ref is 0.1 and 0.2 everywhere
    assert {name: weight for name, (weight, _) in found.items()} == {"velocity": 0.5, "low_frequency": 3.0}
    torch.testing.assert_close(found["low_frequency"][1], torch.tensor([0.05, 0.1]))
    torch.testing.assert_close(found["velocity"][1], torch.tensor([0.01, 0.04]))


def test_texture_costs_no_low_frequency() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    # alternates in every direction, so [1 2 1]/4 makes it 0; at the borders, which are repeated, a little is left
    checkers = 0.1 * (signs[:, None] * signs).expand(1, 3, 64, 64)
    found = penalties(BOTH, POLICIES, BATCH, visit(checkers, 1.0))
    assert float(found["low_frequency"][1]) < 0.005 * 0.1
    assert float(found["velocity"][1]) == pytest.approx(0.01)


def test_the_gradient_pulls_back_to_the_start() -> None:
    v = torch.full((1, 3, 64, 64), 0.1, requires_grad=True)
    penalties(RegulariseConfig(low_frequency=1.0), POLICIES, BATCH, visit(v, 0.8))["low_frequency"][1].sum().backward()
    # d mean|t v| / dv = t / (number of elements): a step against it makes v smaller everywhere
    assert v.grad is not None
    torch.testing.assert_close(v.grad.sum(), torch.tensor(0.8))
    assert (v.grad > 0).all()


def test_switched_off_it_does_not_ask_the_reference() -> None:
    assert penalties(RegulariseConfig(), SimpleNamespace(), BATCH, visit(torch.ones(1, 3, 8, 8), 0.5)) == {}  # type: ignore[arg-type]
