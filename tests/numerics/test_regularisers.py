"""Penalties against numbers by hand: a restorer whose latent is the picture and whose frozen start says v = 0."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrestore.algorithms.base import Point, Visit
from rlrestore.config.sections import RegulariseConfig
from rlrestore.learning.regularisers import SMALL, penalties
from rlrestore.types import Row

BATCH: Any = SimpleNamespace(condition=None)
POLICIES: Any = SimpleNamespace(
    reference_velocity=lambda z_t, t_B, condition: torch.zeros_like(z_t),
    restorer=SimpleNamespace(decode=lambda z_0, condition: z_0),
)
POINT = Point(0.5, 0, 7)
BOTH = RegulariseConfig(velocity=0.5, low_frequency=3.0)


def visit(v: Tensor, t: float) -> Visit:
    return Visit(torch.full_like(v, 0.5), torch.full((len(v),), t), v, None)


def test_brightness_is_low_frequency_and_weights_are_handed_on() -> None:
    v = torch.stack([torch.full((3, 64, 64), 0.1), torch.full((3, 64, 64), -0.2)])
    found = penalties(BOTH, POLICIES, BATCH, POINT, visit(v, 0.5))
    # x_0 = z_t - t v moves by 0.05 and 0.1; v - v_ref is 0.1 and 0.2 everywhere
    assert {name: weight for name, (weight, _) in found.items()} == {"velocity": 0.5, "low_frequency": 3.0}
    torch.testing.assert_close(found["low_frequency"][1], torch.tensor([0.05, 0.1]) - SMALL / 2)
    torch.testing.assert_close(found["velocity"][1], torch.tensor([0.01, 0.04]))


def test_texture_costs_no_low_frequency() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    # alternates in every direction, so [1 2 1]/4 makes it 0; at the borders, which are repeated, a little is left
    checkers = 0.1 * (signs[:, None] * signs).expand(1, 3, 64, 64)
    found = penalties(BOTH, POLICIES, BATCH, POINT, visit(checkers, 1.0))
    assert float(found["low_frequency"][1]) < 0.005 * 0.1
    assert float(found["velocity"][1]) == pytest.approx(0.01)


def test_the_gradient_pulls_back_to_the_start() -> None:
    v = torch.full((1, 3, 64, 64), 0.1, requires_grad=True)
    penalties(RegulariseConfig(low_frequency=1.0), POLICIES, BATCH, POINT, visit(v, 0.8))["low_frequency"][
        1
    ].sum().backward()
    # d mean|t v| / dv = t / (number of elements): a step against it makes v smaller everywhere
    assert v.grad is not None
    torch.testing.assert_close(v.grad.sum(), torch.tensor(0.8))
    assert (v.grad > 0).all()


def test_near_the_start_the_gradient_of_low_frequency_shrinks_with_the_distance() -> None:
    v = torch.full((1, 3, 64, 64), 0.1 * SMALL, requires_grad=True)
    found = penalties(RegulariseConfig(low_frequency=1.0), POLICIES, BATCH, POINT, visit(v, 1.0))["low_frequency"][1]
    found.sum().backward()
    torch.testing.assert_close(found, torch.tensor([0.1**2 * SMALL / 2]))  # d^2 / (2 SMALL)
    assert v.grad is not None
    torch.testing.assert_close(v.grad.sum(), torch.tensor(0.1))  # d / SMALL


def test_switched_off_it_does_not_ask_the_reference() -> None:
    assert penalties(RegulariseConfig(), SimpleNamespace(), BATCH, POINT, visit(torch.ones(1, 3, 8, 8), 0.5)) == {}  # type: ignore[arg-type]


# -- references ----------------------------------------------------------------------------------------------------


def supervised(velocity: Any, point: Point = POINT) -> Tensor:
    """Two rows of one photo with a reference of 0.5 everywhere, and one of a photo without."""
    with_gt, without = (SimpleNamespace(gt=gt, lq=torch.zeros(3, 8, 8)) for gt in (torch.full((3, 8, 8), 0.5), None))
    batch: Any = SimpleNamespace(
        condition=None, z_0=torch.zeros(3, 3, 8, 8), tasks_B=(with_gt, with_gt, without),
        rows_B=(Row(0, 0, 1), Row(0, 1, 2), Row(1, 0, 3)),
    )  # fmt: skip
    restorer = SimpleNamespace(
        encode=lambda image, condition: image, endpoint=lambda noise, condition: noise, training_time=lambda t: t
    )
    policies: Any = SimpleNamespace(restorer=restorer, velocity=velocity)
    return penalties(RegulariseConfig(supervised=2.0), policies, batch, point, visit(torch.ones(3, 3, 8, 8), 0.5))[
        "supervised"
    ][1]


def test_the_exact_velocity_of_the_reference_costs_nothing() -> None:
    # z_t = (1 - t) z_0 + t eps, so eps - z_0 = (z_t - z_0) / t
    def exact(z_t: Tensor, t_B: Tensor, condition: Any) -> Tensor:
        return (z_t - 0.5) / t_B.view(-1, 1, 1, 1)

    torch.testing.assert_close(supervised(exact), torch.zeros(3), atol=1e-9, rtol=0)
    off = supervised(lambda *arguments: exact(*arguments) + 0.1)
    torch.testing.assert_close(off, torch.tensor([0.01, 0.01, 0.0]))  # no reference, no cost


def test_each_row_and_point_has_noise_of_its_own() -> None:
    seen: list[Tensor] = []

    def record(z_t: Tensor, t_B: Tensor, condition: Any) -> Tensor:
        seen.append(t_B)
        return torch.zeros_like(z_t)

    first, again, other = (supervised(record, point) for point in (POINT, POINT, Point(0.5, 1, 7)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({float(t) for t in torch.cat([seen[0], seen[2]])}) == 6
