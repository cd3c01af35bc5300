"""Native rewards and the pyiqa adapter.

Derived numbers, agreement with reference implementations, conformance, failures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from envs.types import Restoration, Task
from rewards.base import ImageReward, RewardSpec, Scores, checked_scores
from rewards.check import blurred, check_reward, noisy
from rewards.filters import atrous_low_pass, gaussian_blur, luma_ycbcr, luma_yiq
from rewards.nss import aggd_table, pooled_aggd
from rewards.penalties.consistency import noise_std
from rewards.penalties.tone import affine_fit, affine_grid_fit, grid_nodes
from rewards.registry import REWARDS, build_reward, reward_spec
from tests.faulty_rewards import FaultyParams, FaultyReward, fails

# with weights, servers, packages or a direction of their own: they have tests of their own
ELSEWHERE = {
    "anchored", "face_identity", "ll_score", "ll_score_hallucination", "no_op", "pyiqa", "remote", "text_change", "vlm_hallucination",
    "vlm_quality", "vlm_removal_fidelity",
}  # fmt: skip
NATIVE = sorted(set(REWARDS) - ELSEWHERE)


def grey(level: float, size: int = 64) -> Tensor:
    return torch.full((3, size, size), level)


def restoration(image: Tensor, lq: Tensor, gt: Tensor | None = None, types: tuple[str, ...] = ()) -> Restoration:
    return Restoration(Task("t", lq, types, gt=gt), image)


def one(
    kind: str, image: Tensor, lq: Tensor | None = None, gt: Tensor | None = None, types: tuple[str, ...] = ()
) -> float:
    scores = build_reward(kind).score([restoration(image, image if lq is None else lq, gt, types)])
    assert scores.reason_N == ("",)
    return scores.value_N.item()


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    """Four different 128 px crops of photographs that no model of ours was fitted on."""
    # read as files: importing scikit-learn takes longer than this whole module
    packages = {name: Path(find_spec(name).origin).parent for name in ("skimage", "sklearn")}  # type: ignore[union-attr, arg-type]
    pictures = [
        (packages["skimage"] / "data/astronaut.png", 0, 150),
        (packages["skimage"] / "data/chelsea.png", 20, 90),
        (packages["skimage"] / "data/coffee.png", 60, 150),
        (packages["sklearn"] / "datasets/images/china.jpg", 100, 200),
    ]
    crops = []
    for path, top, left in pictures:
        x = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float()[None] / 255
        # half-size area means: the wheels' photos carry JPEG noise of their own
        x = torch.nn.functional.avg_pool2d(x[..., top : top + 256, left : left + 256], 2)[0]
        crops.append((x * 255).round() / 255)
    return crops


@pytest.fixture(scope="module")
def items(photos: list[Tensor]) -> list[Restoration]:
    """A mildly degraded LQ and, as the result, something between it and the reference."""
    out = []
    for i, gt in enumerate(photos):
        lq = noisy(restoration(blurred(restoration(gt, gt), 1.0), gt), 8 / 255)
        out.append(
            Restoration(
                Task(f"photo{i}", lq, ("blur", "noise"), gt=gt), ((0.5 * lq + 0.5 * gt) * 255).round() / 255, seed=i
            )
        )
    return out


# --- reference metrics


def test_psnr_of_a_constant_error_is_its_square_in_decibels() -> None:
    # error 0.1 everywhere: mse 0.01, -10 log10(0.01) = 20 dB
    assert one("psnr_rgb", grey(0.6), gt=grey(0.5)) == pytest.approx(20.0, abs=1e-4)


def test_psnr_on_studio_luma_is_1_3219_db_above_full_swing_luma() -> None:
    # Y of YCbCr spans 219 of 255 levels: the same error is smaller by 219/255, i.e. 20 log10(255/219) = 1.3219 dB
    assert one("psnr_y", grey(0.6), gt=grey(0.5)) == pytest.approx(20 + 20 * math.log10(255 / 219), abs=1e-4)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    full = -10 * torch.log10(((luma_yiq(x) - luma_yiq(y)) ** 2).mean())
    studio = -10 * torch.log10(((luma_ycbcr(x) - luma_ycbcr(y)) ** 2).mean())
    assert (studio - full).item() == pytest.approx(1.3219, abs=2e-3)  # the two matrices agree to three digits


def test_identical_images_score_the_best_value() -> None:
    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = {
        "psnr_rgb": 80.0,
        "psnr_y": 80.0,
        "ssim_rgb": 1.0,
        "ssim_y": 1.0,
        "gmsd": 0.0,
    }  # 80 dB: the floor of the error is 1e-8
    for kind, value in wanted.items():
        assert one(kind, x, gt=x) == pytest.approx(value, abs=1e-4), kind


def test_ssim_of_two_greys_is_its_luminance_term() -> None:
    # no variance: SSIM = (2 ab + c1) / (a^2 + b^2 + c1) = (0.4 + 1e-4) / (0.8^2 + 0.25^2 ... ) with a = .8, b = .25, c1
    # = 1e-4
    wanted = (2 * 0.8 * 0.25 + 1e-4) / (0.8**2 + 0.25**2 + 1e-4)
    assert one("ssim_rgb", grey(0.8), gt=grey(0.25)) == pytest.approx(wanted, abs=1e-4)


def test_ssim_agrees_with_scikit_image(photos: list[Tensor]) -> None:
    from skimage.metrics import structural_similarity

    gt, x = photos[0], noisy(restoration(photos[0], photos[0]))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    rgb = structural_similarity(x.double().numpy(), gt.double().numpy(), channel_axis=0, **options)
    y = structural_similarity(
        luma_ycbcr(x[None])[0, 0].double().numpy(), luma_ycbcr(gt[None])[0, 0].double().numpy(), **options
    )
    assert one("ssim_rgb", x, gt=gt) == pytest.approx(rgb, abs=2e-5)
    assert one("ssim_y", x, gt=gt) == pytest.approx(y, abs=2e-5)


def test_metrics_agree_with_pyiqa(photos: list[Tensor]) -> None:
    pytest.importorskip("pyiqa")
    gt = photos[1]
    x = noisy(restoration(blurred(restoration(gt, gt), 1.0), gt), 8 / 255)
    # pyiqa rounds Y to 8 bits (a noise of 1/sqrt(12) levels), hence the tolerances on Y
    for ours, metric, tolerance in (
        ("psnr_rgb", "psnr", 1e-4),
        ("psnr_y", "psnry", 0.02),
        ("ssim_y", "ssim", 2e-3),
        ("gmsd", "gmsd", 1e-3),
    ):
        theirs = build_reward("pyiqa", {"metric": metric}).score([restoration(x, x, gt)])
        assert one(ours, x, gt=gt) == pytest.approx(theirs.value_N.item(), abs=tolerance), metric


# --- fidelity to the LQ


def test_low_frequency_of_a_constant_offset_is_the_offset(photos: list[Tensor]) -> None:
    # a low pass of unit gain with replicate padding keeps a constant
    lq = photos[0] * 0.5 + 0.2
    assert one("low_frequency", lq + 0.125, lq=lq) == pytest.approx(0.125, abs=1e-6)
    assert one("low_frequency", lq, lq=lq) == 0.0


def test_atrous_low_pass_is_a_gaussian_of_sigma_13() -> None:
    # each pass of [1 2 1]/4 at dilation d has variance d^2/2: (1 + 4 + 16 + 64 + 256)/2 = 170.5
    impulse = torch.zeros(1, 1, 129, 129)
    impulse[..., 64, 64] = 1
    low = atrous_low_pass(impulse)[0, 0]
    x = torch.arange(129.0) - 64
    assert low.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (low.sum(0) * x**2).sum().item() == pytest.approx(170.5, rel=1e-4)


def test_low_frequency_ignores_fine_texture(photos: list[Tensor]) -> None:
    board = (
        torch.arange(128)[:, None] + torch.arange(128)
    ) % 2 * 0.2 - 0.1  # a checkerboard of +-0.1: the first pass removes it
    lq = photos[0] * 0.5 + 0.2
    # replicate padding repeats a pixel at the border, so that a little is left there; inside, it is 0
    assert one("low_frequency", lq + board, lq=lq) < 0.001


def test_colour_may_change_for_haze_but_not_for_rain(photos: list[Tensor]) -> None:
    lq = photos[0] * 0.5 + 0.2
    warmer = lq * torch.tensor([1.1, 1.0, 0.9]).view(3, 1, 1) + 0.05
    for kind in ("low_frequency", "consistency"):
        assert one(kind, warmer, lq=lq, types=("haze",)) < 0.1 * one(kind, warmer, lq=lq, types=("rain",)), kind
    repainted = warmer.clone()
    repainted[:, 32:96, 32:96] = grey(0.9, 64)  # a licence for colour is none for content
    assert one("low_frequency", repainted, lq=lq, types=("haze",)) > 5 * one(
        "low_frequency", warmer, lq=lq, types=("haze",)
    )


def test_affine_fit_recovers_gain_and_offset_and_refuses_inversion() -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(affine_fit(x, 0.7 * x + 0.1), 0.7 * x + 0.1, atol=1e-4)
    assert torch.allclose(affine_fit(x, 1 - x), (1 - x).mean((2, 3), keepdim=True).expand_as(x), atol=1e-5)


def test_affine_grid_follows_a_veil_and_is_global_on_small_pictures() -> None:
    assert [grid_nodes(s, s) for s in (64, 255, 256, 512, 2048)] == [1, 1, 2, 4, 4]
    x = atrous_low_pass(torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)))[0] * 2
    veil = torch.linspace(1.0, 0.5, 256).view(1, 1, 256)  # gain falls from left to right: bilinear on two nodes
    residual = (affine_grid_fit(x, veil * x) - veil * x).abs().mean()
    assert residual < 0.2 * (affine_fit(x[None], (veil * x)[None])[0] - veil * x).abs().mean()


def test_noise_std_is_measured_through_texture(photos: list[Tensor]) -> None:
    x = photos[3] * 0.6 + 0.2
    dirty = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert noise_std(dirty[None]).mean().item() == pytest.approx(0.1, rel=0.15)
    assert noise_std(gaussian_blur(x, 2.0)[None] if x.dim() == 4 else gaussian_blur(x[None], 2.0)).max().item() < 0.005


def scored(kind: str, items: list[Restoration], images: list[Tensor]) -> Tensor:
    scores = build_reward(kind).score([replace(i, image=x) for i, x in zip(items, images, strict=True)])
    assert scores.valid_N.all()
    return scores.value_N


def test_consistency_does_not_pay_for_keeping_the_noise(items: list[Restoration], photos: list[Tensor]) -> None:
    as_gt = scored("consistency", items, photos)
    assert scored("consistency", items, [i.task.lq for i in items]).max() == 0
    assert as_gt.max() < 0.001  # a fifth of the scale: the true answer is about as good as a copy
    assert scored("consistency", items, photos[1:] + photos[:1]).min() > 0.05  # another scene


def test_consistency_sees_what_the_lq_does_not_support(items: list[Restoration], photos: list[Tensor]) -> None:
    as_gt = scored("consistency", items, photos)
    patched = [x.clone() for x in photos]
    for x, other in zip(patched, photos[1:] + photos[:1], strict=True):
        x[:, 40:72, 40:72] = other[:, 40:72, 40:72]
    worse = {
        "shifted": [x.roll((3, 3), (1, 2)) for x in photos],
        "blurrier than the lq": [gaussian_blur(x[None], 6.0)[0] for x in photos],
        "a patch of another scene": patched,
        # finer drifts of colour are for low_frequency, which has no dead zone
        "recoloured": [x + torch.tensor([0.12, 0.0, -0.12]).view(3, 1, 1) for x in photos],
    }
    for name, images in worse.items():
        assert (scored("consistency", items, images) > as_gt).all(), name


def test_consistency_forgives_what_falls_out_of_the_sky() -> None:
    # a bright flake on 1/64 of flat grey, spread by the 4 px blur: the worst tenth of the pixels holds most of it
    clean = grey(0.4, 128)
    snowy = clean.clone()
    snowy[:, 30:46, 30:46] = 1.0
    fallen = one("consistency", clean, lq=snowy, types=("snow",))
    assert fallen < 0.25 * one("consistency", clean, lq=snowy, types=("noise",))


# --- natural scene statistics


def test_aggd_ratio_of_a_gaussian_is_2_over_pi() -> None:
    # alpha = 2: Gamma(1)^2 / (Gamma(1/2) Gamma(3/2)) = 1 / (sqrt(pi) * sqrt(pi)/2) = 2/pi
    ratio, alpha = aggd_table()
    assert ratio[(alpha - 2).abs().argmin()].item() == pytest.approx(2 / math.pi, abs=1e-4)
    assert (ratio.diff() > 0).all()


def test_aggd_fit_recovers_a_gaussian() -> None:
    # N(0, s): alpha 2 and beta = s sqrt(2) on both sides, from beta = sigma sqrt(Gamma(1/2)/Gamma(3/2)) = sigma sqrt(2)
    x = 0.7 * torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    alpha, left, right = (t.item() for t in pooled_aggd(x, 512, 512))
    assert alpha == pytest.approx(2.0, rel=0.02)
    assert left == pytest.approx(0.7 * math.sqrt(2), rel=0.02) and right == pytest.approx(0.7 * math.sqrt(2), rel=0.02)


def test_nss_prefers_restoring_to_tricks(photos: list[Tensor]) -> None:
    lq = [noisy(restoration(blurred(restoration(x, x), 1.5), x), 12 / 255) for x in photos]
    start = scored("nss", [restoration(x, x) for x in photos], lq).mean()
    half = scored(
        "nss", [restoration(x, x) for x in photos], [(a + b) / 2 for a, b in zip(lq, photos, strict=True)]
    ).mean()
    best = scored("nss", [restoration(x, x) for x in photos], photos).mean()
    assert best < half < start
    for trick in ("more blur", "sharpening", "noise"):
        images = []
        for x in photos:
            blurry = gaussian_blur(x[None], 1.5)[0]
            images.append(
                {
                    "more blur": gaussian_blur(x[None], 6.0)[0],
                    "sharpening": (blurry + 6 * (blurry - gaussian_blur(blurry[None], 2.0)[0])).clamp(0, 1),
                    "noise": noisy(restoration(blurry, x), 20 / 255),
                }[trick]
            )
        assert scored("nss", [restoration(x, x) for x in photos], images).mean() > half, trick


def test_flat_pictures_are_scored_or_invalid_but_never_crash() -> None:
    for kind in ("niqe", "nss"):
        scores = build_reward(kind).score([restoration(grey(0.5, 128), grey(0.5, 128))])
        assert scores.valid_N.item() == scores.value_N.isfinite().item()


# --- conformance


@pytest.mark.parametrize("kind", NATIVE)
def test_every_native_reward_conforms(kind: str, items: list[Restoration]) -> None:
    check_reward(build_reward(kind), items)


@pytest.mark.parametrize("metric", ["gmsd", "piqe", "psnr"])
def test_pyiqa_metrics_without_download_conform(metric: str, items: list[Restoration]) -> None:
    pytest.importorskip("pyiqa")
    check_reward(build_reward("pyiqa", {"metric": metric}), items)


def test_the_conformance_test_notices_a_wrong_direction(items: list[Restoration]) -> None:
    reward = build_reward("psnr_rgb")
    reward.spec = replace(reward.spec, higher_is_better=False)
    with pytest.raises(AssertionError, match="rank below"):
        check_reward(reward, items)


# --- failures


class Brightness(ImageReward):
    """Mean brightness; `fault` says what goes wrong for dark images."""

    @classmethod
    def spec_for(cls, params: object) -> RewardSpec:
        return RewardSpec("brightness", "1", True, (0.0, 1.0), frozenset(), "quality", 0.1, False, True, "own code")

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        value = torch.stack([i.image.mean() for i in items])
        if isinstance(self.params, Exception) and (value < 0.1).any():
            raise self.params
        return value if isinstance(self.params, Exception) else torch.where(value < 0.1, self.params, value)


BRIGHT_DARK_BRIGHT = [restoration(grey(v), grey(v)) for v in (0.5, 0.0, 0.7)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (torch.tensor(math.nan), "non-finite"),
        (torch.tensor(math.inf), "non-finite"),
        (torch.tensor(1.5), "out of range"),
        (RuntimeError("disk on fire\nline two"), "data: RuntimeError: disk on fire"),
    ],
)
def test_a_failure_is_one_invalid_row_and_never_zero(fault: object, reason: str) -> None:
    scores = Brightness(fault).score(BRIGHT_DARK_BRIGHT)
    assert scores.reason_N == ("", reason, "")
    assert scores.valid_N.tolist() == [True, False, True]
    assert scores.value_N[[0, 2]].tolist() == pytest.approx([0.5, 0.7]) and scores.value_N[1].isnan()


@pytest.mark.parametrize(
    "error", [TypeError("a"), AttributeError("b"), KeyError("c"), AssertionError("d"), NotImplementedError("e")]
)
def test_programming_errors_are_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        Brightness(error).score(BRIGHT_DARK_BRIGHT)


def test_range_check_forgives_rounding_only() -> None:
    scores = checked_scores(torch.tensor([1.0 + 5e-6, 1.001, -0.001, 0.0]), (0.0, 1.0))
    assert scores.valid_N.tolist() == [True, False, False, True]


def test_missing_reference_and_wrong_size_are_data_failures() -> None:
    bare = restoration(grey(0.5), grey(0.5))
    wrong = restoration(grey(0.5), grey(0.5), gt=grey(0.5, 32))
    scores = build_reward("psnr_rgb").score([bare, wrong])
    assert not scores.valid_N.any()
    assert "no reference" in scores.reason_N[0] and "(3, 32, 32)" in scores.reason_N[1]


def test_mixed_sizes_keep_their_order() -> None:
    batch = [
        restoration(grey(0.6, s), grey(0.5, s), gt=grey(0.6 - e, s)) for s, e in ((64, 0.1), (32, 0.01), (64, 0.001))
    ]
    # errors of 1e-1, 1e-2, 1e-3: 20, 40, 60 dB
    assert build_reward("psnr_rgb").score(batch).value_N.tolist() == pytest.approx([20, 40, 60], abs=0.01)


def test_scores_refuse_ragged_rows() -> None:
    with pytest.raises(AssertionError):
        Scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), ("",))


def test_faulty_rewards_fail_for_the_stated_share_and_always_the_same() -> None:
    many = [Restoration(Task(f"id{i}", grey(0.5, 8), ()), grey(0.5, 8), seed=i) for i in range(400)]
    first = FaultyReward(FaultyParams("nan", rate=0.25)).score(many)
    again = FaultyReward(FaultyParams("raises", rate=0.25)).score(many)
    assert torch.equal(first.valid_N, again.valid_N)
    assert first.valid_N.tolist() == [not fails(item, 0.25) for item in many]
    assert 400 * 0.25 == pytest.approx(
        (~first.valid_N).sum().item(), abs=4 * math.sqrt(400 * 0.25 * 0.75)
    )  # 4 sigma of a binomial


# --- registry and pyiqa


def test_registry_is_sorted_and_complete() -> None:
    assert list(REWARDS) == sorted(REWARDS)
    for kind in NATIVE:
        assert reward_spec(kind).name == kind


def test_unknown_kinds_and_parameters_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="'low_frequency'"):
        build_reward("low_frequencies")
    with pytest.raises(ValueError, match="'sigma_px'"):
        build_reward("consistency", {"sigma_p": 2.0})
    with pytest.raises(ValueError, match="metric"):
        build_reward("pyiqa")


def test_pyiqa_names_the_missing_weights_and_where_to_put_them(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyiqa = pytest.importorskip("pyiqa")
    monkeypatch.setattr(
        pyiqa.utils.download_util, "DEFAULT_CACHE_DIR", str(tmp_path)
    )  # an empty cache, whatever this machine has
    with pytest.raises(ValueError) as error:
        build_reward("pyiqa", {"metric": "musiq"})
    for part in (
        "musiq_koniq_ckpt-e95806b9.pth",
        str(tmp_path),
        "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/",
        "TORCH_HOME",
    ):
        assert part in str(error.value)


def test_pyiqa_specs_come_from_its_own_table() -> None:
    pytest.importorskip("pyiqa")
    musiq, lpips, psnry = (reward_spec("pyiqa", {"metric": m}) for m in ("musiq", "lpips", "psnry"))
    assert (musiq.higher_is_better, musiq.needs, musiq.block) == (True, frozenset(), "quality")
    assert (lpips.higher_is_better, lpips.needs, lpips.block) == (False, frozenset({"gt"}), "fidelity")
    assert psnry.name == "pyiqa_psnry_ycbcr" and "Noncommercial" in psnry.licence
    with pytest.raises(ValueError, match="'musiq'"):
        reward_spec("pyiqa", {"metric": "muziq"})
    with pytest.raises(ValueError, match="single picture"):
        reward_spec("pyiqa", {"metric": "fid"})
