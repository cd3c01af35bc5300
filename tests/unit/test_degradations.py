"""Degradations: numbers that can be derived, degenerate recipes, and that a generator decides every byte."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from envs.degradations import DEGRADATIONS
from envs.degradations.base import apply_to_batch
from envs.degradations.capture import GAMMA, low_light, old_photo
from envs.degradations.ggt import CATEGORIES, EFFECTS
from envs.degradations.jpeg import from_uint8_hwc, jpeg, to_uint8_hwc
from envs.degradations.kernels import blur, gaussian_kernel, plateau_kernel, sinc_kernel
from envs.degradations.noise import gaussian_noise, poisson_noise
from envs.degradations.realesrgan import SECOND_STAGE, Recipe, Stage, degrade
from envs.degradations.resize import MODES, resize
from envs.degradations.scenery import line_kernel, pseudo_depth
from envs.degradations.weather import haze, rain, scatter, snow
from envs.rng import generator_for

NOTHING = Stage(blur_prob=0.0, resize_probs=(0.0, 0.0, 1.0), noise_prob=0.0, jpeg_prob=0.0)
IDENTITY = Recipe(first=NOTHING, second=NOTHING, final_sinc_prob=0.0, scale=1)


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """[3, 96, 96] of a real photograph: a face and its background."""
    from skimage import data

    return from_uint8_hwc(data.astronaut()[20:116, 180:276])


def psnr(left: Tensor, right: Tensor) -> float:
    return -10.0 * math.log10(float(((left - right) ** 2).mean()) + 1e-12)


# --- generators -------------------------------------------------------------------------------------------------------


def test_generators_depend_on_every_counter() -> None:
    places = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1)]
    draws = {generator_for(seed, *place).integers(2**63) for seed in (0, 1) for place in places}
    assert len(draws) == 2 * len(places)  # all different
    assert generator_for(5, 6, 7).random() == generator_for(5, 6, 7).random()


def test_generators_refuse_what_would_collide() -> None:
    with pytest.raises(ValueError, match="at most 3"):
        generator_for(0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="in \\[0, 2"):
        generator_for(-1)


# --- kernels and blur -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 13, 21])
def test_kernels_sum_to_one_and_are_symmetric(size: int) -> None:
    kernels = [
        gaussian_kernel(size, 2.0, 2.0),
        gaussian_kernel(size, 3.0, 0.3, 0.7, 4.0),
        plateau_kernel(size, 2.0, 0.5, -1.0, 1.5),
        sinc_kernel(size, math.pi / 3),
        sinc_kernel(size, math.pi),
    ]
    for kernel in kernels:
        assert kernel.shape == (size, size)
        assert float(kernel.sum()) == pytest.approx(1.0, abs=1e-5)
        torch.testing.assert_close(kernel, kernel.flip(0, 1))  # q(-u, -v) = q(u, v)


def test_gaussian_kernel_values() -> None:
    # exp(-q/2) with q = u^2 / sx^2 + v^2 / sy^2, theta 0, sx = 2, sy = 1: neighbours at u = 1 and v = 1 relative to the
    # centre are exp(-1/8) and exp(-1/2). A quarter turn exchanges them. beta = 2 at u = 1: exp(-(1/4)^2 / 2).
    kernel = gaussian_kernel(7, 2.0, 1.0)
    assert float(kernel[3, 4] / kernel[3, 3]) == pytest.approx(math.exp(-1 / 8), rel=1e-5)
    assert float(kernel[4, 3] / kernel[3, 3]) == pytest.approx(math.exp(-1 / 2), rel=1e-5)
    torch.testing.assert_close(gaussian_kernel(7, 2.0, 1.0, math.pi / 2), kernel.T, atol=1e-6, rtol=1e-4)
    squared = gaussian_kernel(7, 2.0, 2.0, 0.0, 2.0)
    assert float(squared[3, 4] / squared[3, 3]) == pytest.approx(math.exp(-1 / 32), rel=1e-5)


def test_plateau_kernel_values() -> None:
    # 1 / (1 + q^beta): at u = 1, sigma 2, beta 1: 1 / (1 + 1/4) = 0.8 of the centre; at q = 1 always 1/2.
    kernel = plateau_kernel(7, 2.0, 2.0, 0.0, 1.0)
    assert float(kernel[3, 4] / kernel[3, 3]) == pytest.approx(0.8, rel=1e-5)
    assert float(kernel[3, 5] / kernel[3, 3]) == pytest.approx(0.5, rel=1e-5)


def test_sinc_kernel_ratio() -> None:
    # Unnormalised: centre w^2 / (4 pi), at distance 1 w J1(w) / (2 pi): ratio 2 J1(w) / w. J1(2) = 0.576725.
    kernel = sinc_kernel(13, 2.0)
    assert float(kernel[6, 7] / kernel[6, 6]) == pytest.approx(0.576725, rel=1e-4)


def test_blur_is_a_convolution_with_reflected_borders(photo: Tensor) -> None:
    kernel = gaussian_kernel(9, 2.5, 0.8, 0.4)
    padded = torch.nn.functional.pad(photo[:, None], (4, 4, 4, 4), mode="reflect")
    direct = torch.nn.functional.conv2d(padded, kernel[None, None])[:, 0]  # symmetric kernel: no flip needed
    torch.testing.assert_close(blur(photo, kernel), direct, atol=1e-5, rtol=0)


def test_blur_is_not_mirrored() -> None:
    # Convolving one bright pixel gives the kernel itself, also an asymmetric one.
    kernel = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.2, 0.7], [0.0, 0.0, 0.1]])
    spot = torch.zeros(3, 9, 9)
    spot[:, 4, 4] = 1.0
    torch.testing.assert_close(blur(spot, kernel)[0, 3:6, 3:6], kernel, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [1, 5, 12])
def test_blur_keeps_a_constant_even_when_smaller_than_the_kernel(side: int) -> None:
    flat = torch.full((3, side, side), 0.25)
    torch.testing.assert_close(blur(flat, sinc_kernel(21, math.pi / 2)), flat, atol=1e-5, rtol=0)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_standard_deviation(gray: bool) -> None:
    flat = torch.full((3, 256, 256), 0.5)
    noise = gaussian_noise(flat, 20.0, gray, generator_for(1)) - flat
    # 65,536 samples a channel: the estimate's relative error is 1 / sqrt(2 * 65,536) = 0.28 %; 6 sigma of the clamp
    # away
    for channel in noise:
        assert float(channel.std()) == pytest.approx(20.0 / 255.0, rel=0.03)
        assert abs(float(channel.mean())) < 4 * (20.0 / 255.0) / 256  # 4 standard errors
    assert torch.equal(noise[0], noise[1]) == gray


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_has_its_standard_deviation(gray: bool) -> None:
    # All 256 levels are present, so v = 256 and the noise at intensity I has std scale * sqrt(I / 256).
    ramp = (torch.arange(256, dtype=torch.float32) / 255.0).repeat(512, 1).expand(3, 512, 256).contiguous()
    noise = poisson_noise(ramp, 1.0, gray, generator_for(2)) - ramp
    for level in (20, 100, 160):  # 20 and 100 below and above the switch of the sampler at a mean of 32
        expected = math.sqrt(level / 255.0 / 256.0)
        # 9 columns of 512 rows are 4,608 samples: the relative error of a std is 1 / sqrt(9,216) = 1 %; 3 of them
        assert float(noise[0, :, level - 4 : level + 5].std()) == pytest.approx(expected, rel=0.03)
    assert torch.allclose(noise[0], noise[1], atol=1e-6) == gray


def test_poisson_counts_distinct_values() -> None:
    # One value (0.5 rounds to 128/255): v = 2^0 = 1, so Poisson(0.502)/1: noise std is sqrt(0.502) = 0.7085 before
    # clamping. Two values: v = 2. With scale 0.1 nothing is clamped: std 0.1 * sqrt(I / v).
    flat = torch.full((3, 256, 256), 128 / 255)
    one = poisson_noise(flat, 0.1, False, generator_for(3)) - flat
    assert float(one.std()) == pytest.approx(0.1 * math.sqrt(128 / 255), rel=0.03)
    flat[0, 0, 0] = 0.0
    two = (poisson_noise(flat, 0.1, False, generator_for(3)) - flat)[1:]
    assert float(two.std()) == pytest.approx(0.1 * math.sqrt(128 / 255 / 2), rel=0.03)


def test_black_has_no_poisson_noise() -> None:
    assert float(poisson_noise(torch.zeros(3, 16, 16), 3.0, False, generator_for(4)).abs().max()) == 0.0


# --- resize and JPEG --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_resize_keeps_size_and_constants(mode: str, photo: Tensor) -> None:
    assert resize(photo, 96, 96, mode) is photo
    flat = torch.full((3, 20, 20), 0.3)
    torch.testing.assert_close(resize(flat, 7, 33, mode), torch.full((3, 7, 33), 0.3), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="mode"):
        resize(flat, 7, 7, "nearest")


def test_area_resize_averages() -> None:
    image = torch.tensor([[0.0, 1.0], [0.5, 0.1]]).expand(3, 2, 2)
    assert resize(image, 1, 1, "area").flatten().tolist() == pytest.approx([0.4] * 3)  # (0 + 1 + 0.5 + 0.1) / 4


def test_eight_bit_round_trip_is_exact() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(to_uint8_hwc(from_uint8_hwc(levels)), levels)


def test_jpeg_quality_orders_psnr(photo: Tensor) -> None:
    values = [psnr(jpeg(photo, quality), photo) for quality in (10, 30, 60, 90)]
    assert all(low < high for low, high in pairwise(values))
    with pytest.raises(ValueError, match="quality"):
        jpeg(photo, 0)


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
def test_same_generator_same_bytes(name: str, scale: int, photo: Tensor) -> None:
    recipe = replace(DEGRADATIONS[name], scale=scale)
    before = photo.clone()
    first, again, other = (recipe.apply(photo, generator_for(7, draw)) for draw in (1, 1, 2))
    assert torch.equal(first.lq, again.lq)
    assert first.record == again.record
    assert not torch.equal(first.lq, other.lq)
    assert torch.equal(photo, before)  # the input is left alone
    assert first.lq.shape == photo.shape
    assert torch.equal(torch.round(first.lq * 255.0).div(255.0), first.lq)  # on the 8-bit grid
    assert first.record["scale"] == scale
    assert set(first.types) <= {"blur", "noise", "compression", "sr", *CATEGORIES}
    batch, each = apply_to_batch(recipe, torch.stack([photo.flip(2), photo]), [generator_for(7, d) for d in (2, 1)])
    assert torch.equal(batch[1], first.lq)
    assert each[1].record == first.record


def test_the_identity_recipe_changes_nothing(photo: Tensor) -> None:
    result = degrade(photo, generator_for(0), IDENTITY)
    assert torch.equal(result.lq, photo)
    assert result.types == ()


@pytest.mark.parametrize(
    ("first", "types"),
    [
        (replace(NOTHING, blur_prob=1.0), ("blur",)),
        (replace(NOTHING, noise_prob=1.0), ("noise",)),
        (replace(NOTHING, jpeg_prob=1.0), ("compression",)),
        (replace(NOTHING, resize_probs=(0.0, 1.0, 0.0)), ("sr",)),
    ],
)
def test_each_step_alone_is_named(first: Stage, types: tuple[str, ...], photo: Tensor) -> None:
    result = degrade(photo, generator_for(0), replace(IDENTITY, first=first))
    assert result.types == types
    assert not torch.equal(result.lq, photo)


def test_scale_alone_is_a_bicubic_round_trip_of_the_area_mean() -> None:
    # Blocks of 4x4 with one value each survive the way down by area exactly; a constant survives the way up as well.
    flat = torch.full((3, 32, 32), 51 / 255)
    result = degrade(flat, generator_for(0), replace(IDENTITY, scale=4))
    assert torch.equal(result.lq, flat)
    assert result.types == ("sr",)


def test_severity_lowers_psnr(photo: Tensor) -> None:
    def mean_psnr(severity: float) -> float:
        recipe = replace(DEGRADATIONS["realesrgan"], scale=1, severity=severity)
        return float(np.mean([psnr(degrade(photo, generator_for(8, i), recipe).lq, photo) for i in range(12)]))

    values = [mean_psnr(severity) for severity in (0.0, 0.3, 0.6, 1.0)]
    assert all(mild > strong + 0.5 for mild, strong in pairwise(values)), values
    assert values[0] > 32.0  # the mild ends: sigma 0.2 px, noise 1/255, quality 95, no resize


def test_published_ranges_are_drawn_from() -> None:
    """Drawn parameters lie in the published ranges and use most of them; frequencies are as published."""
    grey = torch.full((3, 12, 12), 0.5)
    records = [degrade(grey, generator_for(9, i), DEGRADATIONS["realesrgan"]).record for i in range(400)]

    def values(key: str) -> np.ndarray:
        return np.array([record[key] for record in records if key in record])

    for key, low, high in [
        ("blur1_sigma_x_px", 0.2, 3.0),
        ("blur2_sigma_x_px", 0.2, 1.5),
        ("resize1_factor", 0.15, 1.5),
        ("resize2_factor", 0.3, 1.2),
        ("noise1_sigma_255", 1.0, 30.0),
        ("noise2_poisson_scale", 0.05, 2.5),
        ("jpeg1_quality", 30.0, 95.0),
    ]:
        drawn = values(key)
        assert drawn.min() >= low, key
        assert drawn.max() <= high, key
        assert drawn.max() - drawn.min() > 0.9 * (high - low), key
    assert set(values("blur1_size_px")) == set(range(7, 22, 2))
    # n = 400: four standard errors are 4 * sqrt(p (1 - p) / 400)
    for share, p in [
        (len(values("blur2_size_px")) / 400, 0.8),
        (len(values("blur1_omega")) / 400, 0.1),
        (len(values("noise1_sigma_255")) / 400, 0.5),
        (len(values("sinc_omega")) / 400, 0.8),
        (float(np.mean(values("resize1_factor") > 1.0)), 0.2),
        (float(np.mean(values("resize1_factor") < 1.0)), 0.7),
    ]:
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 400)


def test_first_order_skips_the_second_round_half_of_the_time() -> None:
    grey = torch.full((3, 12, 12), 0.5)
    second = [
        "resize2_factor" in degrade(grey, generator_for(10, i), DEGRADATIONS["first_order"]).record for i in range(200)
    ]
    assert abs(np.mean(second) - 0.5) < 4 * math.sqrt(0.25 / 200)
    assert DEGRADATIONS["first_order"].second == replace(SECOND_STAGE, kernel_size=(7, 15))


def test_recipes_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="scale"):
        Recipe(scale=0)
    with pytest.raises(ValueError, match="severity"):
        Recipe(severity=1.5)
    with pytest.raises(ValueError, match="sum to 1"):
        Recipe(first=Stage(resize_probs=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize("side", [8, 17])
def test_small_and_odd_sizes_work(side: int) -> None:
    image = torch.rand(3, side, side + 3)
    for i in range(5):
        assert degrade(image, generator_for(11, i), DEGRADATIONS["realesrgan"]).lq.shape == image.shape


# --- the categories of GGT-100K ---------------------------------------------------------------------------------------


def test_scattering() -> None:
    # J = 0.2, t = 0.25, A = 0.9: 0.2 * 0.25 + 0.9 * 0.75 = 0.725. t = 1 is the identity, t = 0 the airlight.
    image, air = torch.full((3, 2, 2), 0.2), torch.full((3,), 0.9)
    assert float(scatter(image, torch.full((2, 2), 0.25), air).mean()) == pytest.approx(0.725, abs=1e-6)
    assert torch.equal(scatter(image, torch.ones(2, 2), air), image)
    assert float(scatter(image, torch.zeros(2, 2), air).mean()) == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_severity_of_an_effect(name: str, photo: Tensor) -> None:
    def mean_psnr(severity: float) -> float:
        results = [EFFECTS[name](photo, generator_for(3, i), severity)[0] for i in range(6)]
        return float(np.mean([psnr(result, photo) for result in results]))

    values = [mean_psnr(severity) for severity in (0.0, 0.25, 0.6, 1.0)]
    assert values[0] > 80.0, "severity 0 changes nothing but rounding"
    assert all(mild > strong + 0.5 for mild, strong in pairwise(values)), values


def test_haze_hides_what_is_far_and_is_brighter(photo: Tensor) -> None:
    ramp = torch.zeros(3, 64, 64)  # black: what is seen is the airlight, times 1 - t
    result, record = haze(ramp, generator_for(5), 1.0)
    assert float(result[:, :16].mean()) > float(result[:, -16:].mean()) + 0.1  # the top is far
    assert record["haze_b"] == pytest.approx(0.6 + 1.2 * generator_for(5).random())  # the first draw, U(.6, 1.8)
    seen = 1.0 - float((result.mean(0) / record["haze_airlight"]).mean())
    assert seen == pytest.approx(record["haze_transmission"], abs=0.01)


def test_low_light_has_the_mean_of_its_exposure() -> None:
    # Linear light J e; Poisson noise keeps the mean. J = 0.5^2.2 = 0.2176 on average over 64 x 64 pixels a channel.
    image = torch.full((3, 64, 64), 0.5)
    dark, record = low_light(image, generator_for(1), 1.0)
    for channel, name in enumerate("rgb"):
        expected = 0.5**GAMMA * record["lowlight_exposure"] * record[f"lowlight_gain_{name}"]
        assert float((dark[channel] ** GAMMA).mean()) == pytest.approx(expected, rel=0.05)
    assert 0.03 <= record["lowlight_exposure"] <= 0.3


def test_rain_and_snow_brighten_and_count_by_area(photo: Tensor) -> None:
    small, large = torch.zeros(3, 64, 64), torch.zeros(3, 128, 128)
    for effect, key in ((rain, "rain_streaks"), (snow, "snow_flakes")):
        bright, few = effect(small, generator_for(2), 1.0)
        _, many = effect(large, generator_for(2), 1.0)
        assert float(bright.max()) > 0.4
        assert many[key] >= 3 * few[key] > 0


def test_old_photos_of_two_tones_have_one_colour() -> None:
    # Red grows to the right, blue downwards: uncorrelated. In grey and sepia both follow the luminance.
    ramp = torch.linspace(0.1, 0.9, 96)
    image = torch.stack([ramp.expand(96, 96), torch.full((96, 96), 0.5), ramp[:, None].expand(96, 96)])
    for draw in range(12):
        result, record = old_photo(image, generator_for(4, draw), 1.0)
        together = float(torch.corrcoef(result[[0, 2]].flatten(1))[0, 1])
        assert (together > 0.85) == (record["old_tone"] >= 2.0), (draw, together, record)


def test_a_line_kernel_blurs_along_its_line() -> None:
    kernel = line_kernel(9.0, 0.0)
    assert float(kernel.sum()) == pytest.approx(1.0, abs=1e-6)
    assert int((kernel > 0).sum()) == 9  # one row of nine pixels, each 1/9
    torch.testing.assert_close(line_kernel(9.0, math.pi / 2), kernel.T, atol=1e-5, rtol=0)


def test_depth_grows_upwards(photo: Tensor) -> None:
    depth = pseudo_depth(photo, generator_for(0))
    assert depth.shape == photo.shape[1:]
    assert 0.0 <= float(depth.min()) <= float(depth.max()) <= 1.0
    assert float(depth[:24].mean()) > float(depth[-24:].mean()) + 0.2


def test_ggt_draws_every_category(photo: Tensor) -> None:
    done = [DEGRADATIONS["ggt"].apply(photo, generator_for(6, i)) for i in range(60)]
    assert {CATEGORIES[int(item.record["category"])] for item in done} == set(CATEGORIES)
    assert all(item.types[0] == CATEGORIES[int(item.record["category"])] for item in done)
