"""Normalisers on numbers worked out by hand; ties and masks."""

from __future__ import annotations

import pytest
import torch

from rewards.normalisers import NORMALISERS, normalised

T = torch.tensor
ALL = torch.ones(1, 4, dtype=torch.bool)


def of(
    name: str, values: list[list[float]], used: torch.Tensor | None = None, floor: float = 1e-3
) -> list[list[float]]:
    value = T(values, dtype=torch.float64)
    return normalised(name, value, torch.ones_like(value, dtype=torch.bool) if used is None else used, floor).tolist()


def test_group_z() -> None:
    # mean 2.5, std sqrt(1.25) = 1.118034: -1.5 / (std + 1e-4) = -1.341521
    assert of("group_z", [[1, 2, 3, 4]])[0] == pytest.approx([-1.341521, -0.447174, 0.447174, 1.341521], abs=1e-6)


def test_min_max_is_the_unit_interval_centred() -> None:
    # 0, .25, 1, .75 less their mean .5, over 1 + 1e-4 / 4
    assert of("min_max", [[1, 2, 5, 4]])[0] == pytest.approx([-0.5, -0.25, 0.5, 0.25], abs=2e-5)


def test_gaussian_cdf_uses_the_whole_batch() -> None:
    # batch mean 1, std 1: z -1, 1 | -1, 1, so Phi = .158655, .841345, and each group's mean is .5
    assert of("gaussian_cdf", [[0, 2], [0, 2]])[0] == pytest.approx([-0.341345, 0.341345], abs=1e-4)
    # batch mean 5, std 5: a group of tens is tied, whatever its level
    assert of("gaussian_cdf", [[0, 0], [10, 10]]) == [[0, 0], [0, 0]]


@pytest.mark.parametrize("name", sorted(NORMALISERS))
def test_ties_are_zero_and_the_floor_keeps_noise_small(name: str) -> None:
    assert of(name, [[3, 3, 3, 3]])[0] == [0, 0, 0, 0]
    noise = of(name, [[0, 1e-6, 0, 1e-6]], floor=0.1)[0]
    assert max(map(abs, noise)) < 1e-5


@pytest.mark.parametrize("name", sorted(NORMALISERS))
def test_what_is_not_used_is_never_read(name: str) -> None:
    used = T([[True, True, True, False]])
    one, other = (of(name, [[1, 2, 3, hidden]], used)[0] for hidden in (-1e3, 7e3))
    assert one == other and one[3] == 0 and sum(one) == pytest.approx(0, abs=1e-12)
    assert one[0] < one[1] < one[2]


@pytest.mark.parametrize("name", sorted(NORMALISERS))
def test_a_group_of_one_says_nothing(name: str) -> None:
    assert of(name, [[5.0, 1.0]], T([[True, False]]))[0] == [0, 0]
