"""Policy-gradient and forward-process losses on numbers that can be worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from rlrestore.algorithms.objectives import (
    awm_loss_N,
    awm_weighted_N,
    clip_flags_N,
    dgpo_loss_N,
    dppo_loss_N,
    ema_decay,
    guard_log_ratio_N,
    nft_loss_N,
    old_policy_decay,
    ppo_clip_loss_N,
    velocity_mse_N,
)
from rlrestore.diffusion.kernels import gaussian_kl_mean, log_ratio_mean

LOG_RATIO = torch.tensor([2e-4, -2e-4, 5e-5, 2e-4, -2e-4])
ADVANTAGE = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0])


def close(actual: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def test_ppo_clip_by_hand():
    # rho = 1.00020002 .99980002 1.00005 1.00020002 .99980002; clip 1e-4 binds for the 1st (above) and the 5th (below)
    loss = ppo_clip_loss_N(LOG_RATIO.double(), ADVANTAGE.double(), 1e-4, 1e-4)
    close(loss, [-1.0001, -0.99980002, -1.00005, 2.00040004, 1.9998], atol=1e-8)
    assert loss.mean().item() == pytest.approx(0.20005, abs=1e-8)


def test_ppo_gradient_is_zero_exactly_where_the_clip_helps():
    log_ratio = LOG_RATIO.clone().requires_grad_()
    ppo_clip_loss_N(log_ratio, ADVANTAGE, 1e-4, 1e-4).sum().backward()
    flows = log_ratio.grad != 0
    assert flows.tolist() == [False, True, True, True, False]
    # where it flows it is -A rho
    torch.testing.assert_close(log_ratio.grad[flows], (-ADVANTAGE * LOG_RATIO.exp())[flows])


def test_ppo_on_policy_is_reinforce():
    # rho = 1: the two branches of the max are equal, and the gradient must still be -A, not half of it
    log_ratio = torch.zeros(5, requires_grad=True)
    loss = ppo_clip_loss_N(log_ratio, ADVANTAGE, 1e-4, 1e-4)
    assert torch.equal(loss, -ADVANTAGE)
    loss.sum().backward()
    assert torch.equal(log_ratio.grad, -ADVANTAGE)


def test_ppo_clip_is_sharp_in_float32():
    # 1 % on either side of a clip range of 1e-5: 1e-7 apart, where the float32 numbers around 1 are 1.2e-7 apart
    for sign in (1.0, -1.0):
        log_ratio = torch.tensor([sign * 0.99e-5, sign * 1.01e-5], requires_grad=True)
        ppo_clip_loss_N(log_ratio, torch.full((2,), sign), 1e-5, 1e-5).sum().backward()
        assert (log_ratio.grad != 0).tolist() == [True, False]


def test_ppo_clip_may_be_wider_above_than_below():
    # ratios .997, .9985, 1.0015, 1.003 against [1 - .001, 1 + .002]: A > 0 is bounded above, A < 0 below
    log_ratio = torch.tensor([0.997, 0.9985, 1.0015, 1.003]).log().requires_grad_()
    for sign, bounded in ((1.0, [False, False, False, True]), (-1.0, [True, True, False, False])):
        loss = ppo_clip_loss_N(log_ratio, torch.full((4,), sign), clip_lo=1e-3, clip_hi=2e-3)
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert (gradient == 0).tolist() == bounded
    high_N, low_N, _ = clip_flags_N(log_ratio, torch.ones(4), 1e-3, 2e-3)
    assert (high_N.mean(), low_N.mean()) == (0.25, 0.5)


def test_clip_flags_by_hand():
    high_N, low_N, blocked_N = clip_flags_N(LOG_RATIO, ADVANTAGE, 1e-4, 1e-4)
    assert high_N.tolist() == [1, 0, 0, 1, 0]
    assert low_N.tolist() == [0, 1, 0, 0, 1]
    assert blocked_N.tolist() == [1, 0, 0, 0, 1]  # high with A > 0, low with A < 0


@pytest.mark.parametrize("bad", [(0.0, 1e-4), (1e-4, 0.0), (1.5, 1e-4), (math.nan, 1e-4)])
def test_ppo_refuses_an_empty_clip_range(bad):
    with pytest.raises(ValueError, match="clip"):
        ppo_clip_loss_N(LOG_RATIO, ADVANTAGE, *bad)


# ---- DiffusionNFT: x_t = (1-t) x0 + t eps, v* = eps - x0 = (-.8, 1.1), v_old - v* = (.1, -.3)

X0 = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
EPS = torch.tensor([[0.2, 0.6]], dtype=torch.float64)
T_N = torch.tensor([0.5], dtype=torch.float64)
X_T = 0.5 * X0 + 0.5 * EPS
V_OLD = torch.tensor([[-0.7, 0.8]], dtype=torch.float64)


def nft(v: Tensor, advantage: float, beta: float, adaptive: bool = True) -> tuple[Tensor, Tensor]:
    v = v.clone().requires_grad_()
    loss = nft_loss_N(v, V_OLD, X_T, X0, T_N, torch.tensor([advantage], dtype=torch.float64), beta, adaptive)
    loss.sum().backward()
    return loss.detach(), v.grad


@pytest.mark.parametrize(
    ("advantage", "beta", "loss", "gradient"),
    [
        # on-policy x+ - x0 = -(.05, -.15): mean square .0125, w = .1, so L = 5 * .125 / b whatever A is;
        # gradient A (t^2/w) grad err = A * 2.5 * (.1, -.3)
        (2.0, 1.0, 0.625, (0.5, -1.5)),
        (2.0, 0.1, 6.25, (0.5, -1.5)),
        (-2.0, 1.0, 0.625, (-0.5, 1.5)),
        (0.0, 1.0, 0.625, (0.0, 0.0)),
        # |A| is bounded by 5: 50 acts as 5
        (50.0, 1.0, 0.625, (1.25, -3.75)),
    ],
)
def test_nft_on_policy_by_hand(advantage, beta, loss, gradient):
    actual, actual_gradient = nft(V_OLD, advantage, beta)
    close(actual, [loss])
    close(actual_gradient, [gradient])


def test_nft_off_policy_by_hand():
    # v = v_old + (.05, .1), r = .7, b = .5:
    # x+ - x0 = -(.0625, -.125), x- - x0 = -(.0375, -.175): mean squares .009765625, .016015625, w .09375, .10625
    # L = 10 (.7 * .009765625/.09375 + .3 * .016015625/.10625)
    loss, gradient = nft(V_OLD + torch.tensor([[0.05, 0.1]]), 2.0, 0.5)
    close(loss, [1.181373])
    close(gradient, [[0.901961, -1.098039]])


def random_case(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, eps, v_old, move = torch.randn(4, 3, 4, 5, 5, generator=g, dtype=torch.float64)
    t_N = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    t = t_N.view(3, 1, 1, 1)
    return {"x0": x0, "x_t": (1 - t) * x0 + t * eps, "v_old": v_old, "t_N": t_N, "v_star": eps - x0, "move": move}


def test_nft_fact_1_the_value_on_policy_does_not_depend_on_the_advantage():
    c = random_case(0)
    losses = [
        nft_loss_N(c["v_old"], c["v_old"], c["x_t"], c["x0"], c["t_N"], torch.full((3,), a), beta) * beta
        for a in (-5.0, 0.0, 3.0)
        for beta in (0.1, 1.0)
    ]
    for loss in losses[1:]:
        close(loss, losses[0], atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_nft_fact_2_the_gradient_on_policy_is_that_of_the_weighted_error(beta, adaptive):
    c = random_case(1)
    advantage_N = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    v = c["v_old"].clone().requires_grad_()
    nft_loss_N(v, c["v_old"], c["x_t"], c["x0"], c["t_N"], advantage_N, beta, adaptive).sum().backward()
    gap = c["v_old"] - c["v_star"]
    weight_N = c["t_N"] ** 2 / (c["t_N"] * gap.abs().flatten(1).mean(1)) if adaptive else torch.ones(3)
    grad_err = 2 * gap / 100  # of mean_d (v - v*)^2 over D = 100
    close(v.grad, (advantage_N * weight_N).view(3, 1, 1, 1) * grad_err, atol=1e-12)


def test_nft_fact_3_beta_is_a_proximal_term():
    # w = t^2: L = 5/b mean_d(v_old - v*)^2 + 2A mean_d[(v_old - v*)(v - v_old)] + 5b mean_d(v - v_old)^2
    c = random_case(2)
    advantage_N = torch.tensor([4.0, -3.0, 0.0], dtype=torch.float64)
    beta = 0.3
    gap, move = c["v_old"] - c["v_star"], c["move"]
    expected = (
        5 / beta * (gap**2).flatten(1).mean(1)
        + 2 * advantage_N * (gap * move).flatten(1).mean(1)
        + 5 * beta * (move**2).flatten(1).mean(1)
    )
    actual = nft_loss_N(c["v_old"] + move, c["v_old"], c["x_t"], c["x0"], c["t_N"], advantage_N, beta, adaptive=False)
    close(actual, expected, atol=1e-10)
    # so the best v is v_old - A/(5b) (v_old - v*), where the gradient vanishes
    v = (c["v_old"] - (advantage_N / (5 * beta)).view(3, 1, 1, 1) * gap).requires_grad_()
    nft_loss_N(v, c["v_old"], c["x_t"], c["x0"], c["t_N"], advantage_N, beta, adaptive=False).sum().backward()
    close(v.grad, torch.zeros_like(v), atol=1e-12)


def test_nft_weight_has_a_floor_and_the_old_policy_no_gradient():
    # x0 = 0, eps = 1, t = 1/2 and v = v_old = v* = 1 are exact: the errors are 0, and so would w be without its floor
    v, old = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    loss = nft_loss_N(v, old, torch.full((1, 2), 0.5), torch.zeros(1, 2), torch.tensor([0.5]), torch.ones(1), 1.0)
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.equal(v.grad, torch.zeros(1, 2))
    assert old.grad is None


def test_nft_in_float32_agrees_with_float64_and_refuses_less():
    c = random_case(4)
    names = ("v_old", "x_t", "x0", "t_N")
    wide = nft_loss_N(c["v_old"] + c["move"], *(c[n] for n in names), torch.ones(3), 0.1)
    narrow = nft_loss_N((c["v_old"] + c["move"]).float(), *(c[n].float() for n in names), torch.ones(3), 0.1)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide.float(), rtol=1e-5, atol=0)
    with pytest.raises(AssertionError, match="float32"):
        nft_loss_N(c["move"].bfloat16(), *(c[n] for n in names), torch.ones(3), 0.1)
    with pytest.raises(ValueError, match="beta"):
        nft_loss_N(c["move"], *(c[n] for n in names), torch.ones(3), 0.0)


def test_velocity_mse_is_a_mean_a_sample():
    v = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    ref = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    value = velocity_mse_N(v, ref)
    close(value, [2.5, 0.0])
    value.sum().backward()
    close(v.grad, [[1.0, 2.0], [0.0, 0.0]])
    assert ref.grad is None


def test_decays_by_hand():
    assert [old_policy_decay(0, n) for n in (0, 1000)] == [0, 0]
    assert [old_policy_decay(1, n) for n in (0, 200, 500, 9999)] == pytest.approx([0, 0.2, 0.5, 0.5])
    assert [old_policy_decay(2, n) for n in (74, 100, 208, 209)] == pytest.approx([0, 0.1875, 0.9975, 0.999])
    assert [old_policy_decay(3, n) for n in (0, 200, 300, 9999)] == pytest.approx([0, 0.2, 0.3, 0.3])
    assert [ema_decay(n, 0.9) for n in (0, 10, 75, 80, 999)] == pytest.approx([0.1, 0.55, 76 / 85, 0.9, 0.9])
    with pytest.raises(ValueError, match="unknown decay type 4"):
        old_policy_decay(4, 0)


# ---- GRPO-Guard


def test_guard_log_ratio_by_hand():
    # z = (x' - mu_old) / S = (2, -1), mu - mu_old = (.01, .02): mean z (mu - mu_old) = (.02 - .02) / 2 = 0
    mean_old, std = torch.zeros(2, 2), torch.tensor(0.5)
    x_next = torch.tensor([[1.0, -0.5], [1.0, -0.5]])
    mean = torch.tensor([[0.01, 0.02], [0.01, -0.02]])
    close(guard_log_ratio_N(mean, mean_old, x_next, std), [0.0, 0.02])
    # S (log rho + KL): the definition in the paper
    by_definition = 0.5 * (log_ratio_mean(mean, mean_old, x_next, std) + gaussian_kl_mean(mean, mean_old, std))
    close(guard_log_ratio_N(mean, mean_old, x_next, std), by_definition)


def test_guard_has_no_bias_where_the_plain_ratio_has():
    generator = torch.Generator().manual_seed(0)
    std, count = torch.tensor(0.5), 4000
    mean_old = torch.zeros(count, 64)
    mean = mean_old + 0.1
    x_next = mean_old + std * torch.randn(count, 64, generator=generator)
    # per element z ~ N(0, 1): the mean over 64 * count has std 1/506, times 0.1; 5 of them
    assert abs(float(guard_log_ratio_N(mean, mean_old, x_next, std).mean())) < 5 * 0.1 / math.sqrt(64 * count)
    kl = 0.1**2 / (2 * 0.5**2)
    assert float(log_ratio_mean(mean, mean_old, x_next, std).mean()) == pytest.approx(
        -kl, abs=5 * 0.2 / math.sqrt(64 * count)
    )


# ---- Flow-DPPO


def test_dppo_drops_what_leads_further_out_of_the_trust_region():
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    kl = torch.tensor([2e-6, 2e-6, 2e-6, 2e-6, 5e-7])  # the last is inside
    loss, dropped = dppo_loss_N(log_ratio, kl, advantage, delta=1e-6)
    assert dropped.tolist() == [1, 0, 0, 1, 0]
    up, down = math.exp(0.1), math.exp(-0.1)
    close(loss.detach(), [0.0, up, -down, 0.0, -up])
    loss.sum().backward()
    close(log_ratio.grad, [0.0, up, -down, 0.0, -up])  # d(-A rho) = -A rho


# ---- AWM


@pytest.mark.parametrize(
    ("weighting", "value"),
    # err = mean(.1^2, .3^2) = .05, t = .5
    [
        ("uniform", 0.05), ("t", 0.025), ("t2", 0.0125), ("huber", 0.5 * (math.sqrt(0.05) - 1e-5)),
        ("ghuber", 2 * (0.05**0.25 - 1e-10**0.25)),
    ],
)  # fmt: skip
def test_awm_by_hand(weighting, value):
    close(awm_weighted_N(torch.tensor([0.05], dtype=torch.float64), T_N, weighting), [value], atol=1e-8)


@pytest.mark.parametrize(
    # l_old = -.0500, l = -.0498, so rho = exp(2e-4) = 1.00020002; A is divided by 5
    ("advantage", "clip", "loss", "gradient"),
    [
        (5.0, 1.0, -1.00020002, 1.00020002),  # d(-rho)/d(weighted error) = rho: less error on a good sample
        (5.0, 1e-5, -1.00001, 0.0),  # it has improved enough
        (-5.0, 1e-5, 1.00020002, -1.00020002),  # a bad one is pushed back, however far it has come
    ],
)
def test_awm_ratio_by_hand(advantage, clip, loss, gradient):
    weighted = torch.tensor([0.0498], dtype=torch.float64, requires_grad=True)
    value = awm_loss_N(weighted, torch.tensor([0.05], dtype=torch.float64), torch.tensor([advantage]), clip)
    close(value.detach(), [loss], atol=1e-8)
    value.sum().backward()
    close(weighted.grad, [gradient], atol=1e-8)


def test_forward_methods_share_their_gradient_on_policy():
    # g* = grad mean A err. NFT without adaptive weights: g*; AWM uniform: g* / 5; DGPO: g* / 2
    c = random_case(3)
    advantage = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)
    ones, group = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)

    def gradient(loss) -> Tensor:
        v = c["v_old"].clone().requires_grad_()
        return torch.autograd.grad(loss(v).mean(), v)[0]

    def error(v: Tensor) -> Tensor:
        return (v - c["v_star"]).square().flatten(1).mean(1)

    shared = gradient(lambda v: advantage * error(v))
    for beta in (0.1, 1.0):
        nft = gradient(
            lambda v, beta=beta: nft_loss_N(v, c["v_old"], c["x_t"], c["x0"], c["t_N"], advantage, beta, adaptive=False)
        )
        torch.testing.assert_close(nft, shared)
    at_old = error(c["v_old"])
    awm = gradient(lambda v: awm_loss_N(awm_weighted_N(error(v), c["t_N"], "uniform"), at_old, advantage, 1.0))
    torch.testing.assert_close(5 * awm, shared)
    dgpo = gradient(lambda v: dgpo_loss_N(error(v), at_old, advantage, ones, group, beta=50.0)[0])
    torch.testing.assert_close(2 * dgpo, shared)
