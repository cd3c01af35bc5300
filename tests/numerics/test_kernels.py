"""Schedules and step kernels against numbers worked out by hand, and against a Gaussian whose marginals are known."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rlrestore.diffusion.kernels import (
    KERNELS,
    cps_coefficients,
    cps_step,
    dance_sde_step,
    ddim_coefficients,
    ddim_step,
    flow_sde_coefficients,
    flow_sde_step,
    gaussian_kl_mean,
    gaussian_logp_mean,
    log_ratio_mean,
    ode_step,
    trainable,
)
from rlrestore.diffusion.schedules import shift_time, time_schedule, unshift_time
from rlrestore.diffusion.solvers import OdeSolver

# x0_hat = x - t v = (-.1, -1.15) and eps_hat = x + (1-t) v = (.9, -.9) at t = .6
X = torch.tensor([[0.5, -1.0]])
V = torch.tensor([[1.0, 0.25]])
Z = torch.tensor([[0.3, -0.7]])
T, T_NEXT = 0.6, 0.5


def close(actual: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


# ---- schedules


def test_shift_multiplies_the_odds_of_noise():
    # u = .4: odds 2/3; times 3 is 2, so t = 2/3
    close(shift_time(torch.tensor(0.4), 3.0), 2 / 3)
    # u = 1, 3/4, 1/2, 1/4, 0 with k = 3: 3u/(1+2u) = 1, 2.25/2.5, 1.5/2, .75/1.5, 0
    close(time_schedule(4, shift=3.0), [1.0, 0.9, 0.75, 0.5, 0.0])
    close(time_schedule(4), [1.0, 0.75, 0.5, 0.25, 0.0])


def test_unshift_undoes_shift():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    close(unshift_time(shift_time(u, 3.158), 3.158), u, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_starts_at_t_max_and_ends_at_zero(shift):
    t = time_schedule(7, shift, t_max=0.936)
    assert t.dtype == torch.float32
    assert t.shape == (8,)
    assert t[0] == torch.tensor(0.936)
    assert t[-1] == 0
    assert (t.diff() < 0).all()
    close(unshift_time(t.double(), shift).diff().diff(), torch.zeros(6), atol=1e-7)  # uniform in u


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 4, "shift": 0.0}, {"steps": 4, "t_max": 0.0}])
def test_schedule_refuses(bad):
    with pytest.raises(ValueError, match=r"at least|positive|must lie"):
        time_schedule(**bad)


# ---- one step by hand


def test_flow_sde_by_hand():
    # s = .7 sqrt(.6/.4) = .857321, S = s sqrt(.1); mean = x (1 - s^2/1.2 * .1) - v (1 + s^2 * .4/1.2) * .1
    step = flow_sde_step(X, V, T, T_NEXT, 0.7, t_second=0.9)
    close(step.std, 0.271109)
    close(step.mean, [[0.344875, -0.969875]])
    x_next = step.mean + step.std * Z
    close(x_next, [[0.426208, -1.159651]])
    # -(.09 + .49)/4 - log S - log(2 pi)/2
    close(gaussian_logp_mean(x_next, step.mean, step.std), [0.241296])


def test_flow_sde_first_step_has_std_equal_to_level():
    # t = 1: s = .7/sqrt(1-.9) = 2.213594, S = s sqrt(.1) = .7; mean = x (1 - 4.9/2 * .1) - .1 v
    step = flow_sde_step(X, V, 1.0, 0.9, 0.7, t_second=0.9)
    close(step.std, 0.7)
    close(step.mean, [[0.2775, -0.78]])


def test_flow_sde_at_a_rounded_one_is_the_first_step_too():
    # 1 - 1e-7 would give s = .7 * 3162 under a test for t == 1
    close(flow_sde_step(X, V, 1 - 1e-7, 0.9, 0.7, t_second=0.9).std, 0.7, atol=1e-5)
    with pytest.raises(ValueError, match="t_second"):
        flow_sde_step(X, V, 1.0, 0.9, 0.7)
    # below the singularity t_second is not read: a restorer that starts at .936 has no singular step
    close(flow_sde_step(X, V, 0.936, 0.8, 0.7).std, 0.7 * math.sqrt(0.936 / 0.064 * 0.136))


def test_cps_by_hand():
    # S = .5 sin(.4 pi), sqrt(.25 - S^2) = .154508; mean = .5 x0_hat + .154508 eps_hat
    step = cps_step(X, V, T, T_NEXT, 0.8)
    close(step.std, 0.475528)
    close(step.mean, [[0.089058, -0.714058]])
    x_next = step.mean + step.std * Z
    close(x_next, [[0.231716, -1.046927]])
    close(gaussian_logp_mean(x_next, step.mean, step.std), [-0.320610])
    close(cps_coefficients(T, T_NEXT, 0.8).v_gain, -0.238197)


def test_dance_sde_by_hand():
    # s^2 = .09: mean = x (1 - .09/1.2 * .1) - v (1 + .09 * .4/1.2) * .1, S = .3 sqrt(.1)
    step = dance_sde_step(X, V, T, T_NEXT, 0.3)
    close(step.std, 0.0948683)
    close(step.mean, [[0.39325, -1.01825]])


def test_ddim_by_hand():
    # keeps .5 * .4 / (.6 * .5) = 2/3 of the noise: S = .5 * .5 sqrt(1 - 4/9), sqrt(.25 - S^2) = .463981
    step = ddim_step(X, V, T, T_NEXT, 0.5)
    close(step.std, 0.186339)
    close(step.mean, [[0.367583, -0.992583]])
    # from pure noise nothing is kept: S = eta t_next
    close(ddim_step(X, V, 1.0, 0.9, 0.5).std, 0.45)
    assert not trainable(ddim_step(X, V, T, 0.0, 0.5).std)
    # the same SDE as flow_sde with a = sqrt(2) eta, to first order in dt
    for mine, theirs in zip(
        (ddim_coefficients(0.6, 0.5999, 0.5).x_gain, ddim_coefficients(0.6, 0.5999, 0.5).std),
        (
            flow_sde_coefficients(0.6, 0.5999, math.sqrt(0.5)).x_gain,
            flow_sde_coefficients(0.6, 0.5999, math.sqrt(0.5)).std,
        ),
        strict=True,
    ):
        assert float(mine) == pytest.approx(float(theirs), rel=1e-3)


def test_kl_by_hand_and_closed_form():
    # g = (1 + s^2 * .4/1.2) * -.1 = -.1245;  KL = g^2 (.02^2 + .01^2)/2 / (2 S^2)
    new = flow_sde_step(X, V, T, T_NEXT, 0.7)
    ref = flow_sde_step(X, V + torch.tensor([[0.02, -0.01]]), T, T_NEXT, 0.7)
    close(ref.mean - new.mean, [[-0.002490, 0.001245]])
    close(gaussian_kl_mean(new.mean, ref.mean, new.std), [2.636097e-05], atol=2e-10)
    g = flow_sde_coefficients(T, T_NEXT, 0.7)
    close(g.v_gain, -0.1245)
    close(g.v_gain**2 * (0.02**2 + 0.01**2) / 2 / (2 * g.std**2), 2.636097e-05, atol=1e-11)


# ---- degenerate steps


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.9), (0.6, 0.5), (0.25, 0.0)])
def test_level_zero_is_the_ode_step(name, t, t_next):
    step = KERNELS[name](X, V, t, t_next, 0.0, 0.9)
    close(step.mean, ode_step(X, V, t, t_next), atol=1e-7)
    assert step.std == 0
    assert not trainable(step.std)
    assert not trainable(step.std, std_min=0.0)


def test_last_cps_step_decodes_x0_hat_and_is_not_trainable():
    step = cps_step(X, V, T, 0.0, 0.8)
    close(step.mean, X - T * V)
    assert not trainable(step.std)
    assert trainable(cps_step(X, V, T, T_NEXT, 0.8).std)


def test_std_zero_has_no_logp():
    for std in (0.0, torch.tensor(0.0), torch.zeros(1), torch.zeros(1, 1)):
        for function in (gaussian_logp_mean, gaussian_kl_mean):
            with pytest.raises(ValueError, match="std 0"):
                function(X, X, std)
        with pytest.raises(ValueError, match="std 0"):
            log_ratio_mean(X, X, X, std)
    assert not trainable(torch.tensor([0.5, 0.0]))


def test_kernels_refuse_half_precision_and_reversed_time():
    with pytest.raises(AssertionError, match="float32"):
        cps_step(X.bfloat16(), V.bfloat16(), T, T_NEXT, 0.8)
    for name in KERNELS:
        with pytest.raises(AssertionError, match="times"):
            KERNELS[name](X, V, 0.5, 0.6, 0.5, 0.9)
    with pytest.raises(ValueError, match="level of cps"):
        cps_step(X, V, T, T_NEXT, 1.2)
    with pytest.raises(ValueError, match="level of flow_sde"):
        flow_sde_step(X, V, T, T_NEXT, -0.1)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_one_time_a_sample_gives_the_bits_of_one_time_for_all(name):
    x, v = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.7, 0.1])
    t_next = torch.tensor([0.9, 0.55, 0.02])
    together = KERNELS[name](x, v, t, t_next, 0.8, 0.9)
    assert together.std.shape == (3, 1, 1, 1)
    x_next = together.mean + 0.1
    logp = gaussian_logp_mean(x_next, together.mean, together.std)
    for i in range(3):
        alone = KERNELS[name](x[i : i + 1], v[i : i + 1], t[i].item(), t_next[i].item(), 0.8, 0.9)
        assert torch.equal(alone.mean, together.mean[i : i + 1])
        assert torch.equal(alone.std, together.std[i, 0, 0, 0])
        assert torch.equal(gaussian_logp_mean(x_next[i : i + 1], alone.mean, alone.std), logp[i : i + 1])
        assert torch.equal(ode_step(x, v, t, t_next)[i], ode_step(x, v, t[i].item(), t_next[i].item())[i])


# ---- marginals


def propagate(name: str, level: float, noisy: range, data_std: float, t: list[float]) -> list[float]:
    """Variances at the times t for data N(0, data_std^2) and its exact velocity, starting from the exact marginal.

    E[x0|x] = k x with k = (1-t) d^2 / ((1-t)^2 d^2 + t^2), so v = (1-k)/t x: all is linear, and the gain of a step is
    what it makes of x = 1.
    """
    variance = [(1 - t[0]) ** 2 * data_std**2 + t[0] ** 2]
    one = torch.ones(1, 1)
    for i in range(len(t) - 1):
        k = (1 - t[i]) * data_std**2 / ((1 - t[i]) ** 2 * data_std**2 + t[i] ** 2)
        step = KERNELS[name](one, (1 - k) / t[i] * one, t[i], t[i + 1], level if i in noisy else 0.0, t[1])
        variance.append(step.mean.item() ** 2 * variance[-1] + step.std.item() ** 2)
    return variance


@pytest.mark.parametrize(
    ("name", "level", "noisy", "final_std"),
    [
        ("cps", 0.0, range(10), 0.185),
        ("cps", 0.8, range(10), 0.167),
        ("dance_sde", 0.3, range(10), 0.220),
        ("dance_sde", 0.3, range(9), 0.192),
        ("ddim", 0.5, range(10), 0.183),
        ("ddim", 0.5, range(3), 0.185),
        ("cps", 0.8, range(3), 0.185),
        ("flow_sde", 0.7, range(10), 0.254),
        ("flow_sde", 0.7, range(9), 0.221),
        ("flow_sde", 0.7, range(3), 0.199),
    ],
)
def test_ten_steps_on_gaussian_data(name, level, noisy, final_std):
    # three digits of an independent double-precision computation, data std .30
    variance = propagate(name, level, noisy, 0.3, time_schedule(10, 3.0).tolist())
    assert math.sqrt(variance[-1]) == pytest.approx(final_std, abs=6e-4)


def test_flow_sde_keeps_the_marginals_of_the_data_as_steps_shrink():
    # from .9 to .3, away from the singular ends: the variance tends to (1-t)^2 d^2 + t^2, with an error of first order
    def worst(steps: int) -> float:
        t = torch.linspace(0.9, 0.3, steps + 1).tolist()
        variance = propagate("flow_sde", 0.7, range(steps), 0.3, t)
        return max(abs(u / ((1 - s) ** 2 * 0.09 + s**2) - 1) for s, u in zip(t, variance, strict=True))

    assert worst(400) < 0.01
    assert worst(100) / worst(400) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("level", [0.3, 0.8, 1.0])
def test_cps_keeps_the_noise_of_a_known_image_exactly(level):
    # data_std 0: v is exact, and x_t = t eps must hold at every time, however few the steps
    t = time_schedule(10, 3.0).tolist()
    variance = propagate("cps", level, range(10), 0.0, t)
    assert variance == pytest.approx([s**2 for s in t], abs=1e-6)


def test_flow_sde_noise_budget_of_a_known_image():
    # x = t eps, v = eps: mean = (t' - s^2 |dt|/(2t)) eps, so the variance is that squared plus s^2 |dt|
    step = flow_sde_step(torch.full((1, 1), T), torch.ones(1, 1), T, T_NEXT, 0.7)
    s2 = 0.49 * 0.6 / 0.4
    close(step.mean, [[0.5 - s2 * 0.1 / 1.2]])
    close(step.std, math.sqrt(s2 * 0.1))


# ---- ratios


def test_log_ratio_is_exactly_zero_on_policy_with_the_gradient_of_logp():
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    std = 0.27
    x_next = (mean + std * torch.randn(mean.shape, generator=generator)).detach()
    log_ratio = log_ratio_mean(mean, mean, x_next, std)
    assert torch.equal(log_ratio, torch.zeros(2))
    (from_ratio,) = torch.autograd.grad(log_ratio.sum(), mean)
    (from_logp,) = torch.autograd.grad(gaussian_logp_mean(x_next, mean, std).sum(), mean)
    torch.testing.assert_close(from_ratio, from_logp, atol=1e-9, rtol=1e-5)
    # by hand: (x' - mu) / (S^2 D)
    torch.testing.assert_close(from_logp, ((x_next - mean) / (std**2 * 256)).detach(), atol=1e-9, rtol=1e-5)


def test_log_ratio_by_hand():
    # old mean of the flow_sde step above, new mean moved by (-.00249, .001245), z = (.3, -.7):
    # mean_d(z dmu)/S - KL = (.3 * -.00249 - .7 * .001245)/2 / .271109 - 2.636e-5
    old = flow_sde_step(X, V, T, T_NEXT, 0.7)
    new = flow_sde_step(X, V + torch.tensor([[0.02, -0.01]]), T, T_NEXT, 0.7)
    x_next = old.mean + old.std * Z
    close(log_ratio_mean(new.mean, old.mean, x_next, old.std), [-3.011325e-03], atol=5e-8)
    two_logps = gaussian_logp_mean(x_next, new.mean, new.std) - gaussian_logp_mean(x_next, old.mean, old.std)
    close(two_logps, [-3.011325e-03], atol=3e-7)


def test_difference_form_resolves_a_clip_range_that_two_logps_do_not():
    generator = torch.Generator().manual_seed(2)
    mean_old = torch.randn(1, 65536, generator=generator)
    mean_new = mean_old + 1e-3 * torch.randn(mean_old.shape, generator=generator)
    std = 0.27
    x_next = mean_old + std * torch.randn(mean_old.shape, generator=generator)
    new, old, x = mean_new.double(), mean_old.double(), x_next.double()
    exact = (((x - old) ** 2 - (x - new) ** 2) / (2 * std**2)).mean(1)
    error = abs(log_ratio_mean(mean_new, mean_old, x_next, std).double() - exact).item()
    assert error < 1e-9  # against clip ranges of 1e-5
    assert abs(exact.item()) > 1e-6  # or the bound above says nothing


def test_gradients_flow_through_the_new_mean_only():
    new, old, x_next = (torch.randn(1, 3, requires_grad=True) for _ in range(3))
    for value in (
        log_ratio_mean(new, old, x_next, 0.5),
        gaussian_kl_mean(new, old, 0.5),
        gaussian_logp_mean(x_next, new, 0.5),
    ):
        value.sum().backward()
    assert new.grad is not None
    assert old.grad is None
    assert x_next.grad is None


def test_kl_is_minus_the_expected_log_ratio():
    # E over x' ~ N(mu_old) of log ratio is -KL(old||new); with z = +1 and -1 the linear part cancels exactly
    old, new = torch.tensor([[0.1, -0.2]]), torch.tensor([[0.13, -0.24]])
    ones = torch.ones_like(old)
    both = [log_ratio_mean(new, old, old + sign * 0.3 * ones, 0.3) for sign in (1, -1)]
    # KL = (.03^2 + .04^2)/2 / (2 * .09) = .00125/.18
    close(-(both[0] + both[1]) / 2, [0.00125 / 0.18], atol=1e-8)
    close(gaussian_kl_mean(new, old, 0.3), [0.00125 / 0.18], atol=1e-8)


# ---- solvers of the deterministic steps


def solve(kind: str, steps: int, t_first: float, t_last: float = 0.0, std: float = 0.3) -> tuple[float, float]:
    """(x at t_last, what it should be) from x = 1 at t_first, for data N(0, std^2): x scales with the marginal's std."""
    t = torch.linspace(t_first, t_last, steps + 1, dtype=torch.float64).tolist()
    solver, x = OdeSolver(kind), torch.ones(1, 1, dtype=torch.float32)
    for now, after in itertools.pairwise(t):
        k = (1 - now) * std**2 / ((1 - now) ** 2 * std**2 + now**2)
        x = solver.step(x, (1 - k) / now * x, now, after)
    exact = math.sqrt(((1 - t_last) ** 2 * std**2 + t_last**2) / ((1 - t_first) ** 2 * std**2 + t_first**2))
    return x.item(), exact


@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_solvers_converge_with_their_order(kind, order):
    errors = [abs(x - exact) for x, exact in (solve(kind, steps, 0.8, 0.2) for steps in (16, 32, 64))]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.25)


def test_the_second_order_solver_is_nearer_in_ten_steps_from_pure_noise():
    euler, exact = solve("euler", 10, 1.0)
    second, _ = solve("dpmpp_2m", 10, 1.0)
    assert exact == pytest.approx(0.3) and abs(second - exact) < abs(euler - exact) / 2


def test_a_second_order_step_by_hand():
    # t .6 -> .5 -> .4, x_0 predicted as 1 and then as 2. lam = log(2/3), 0, log(3/2): equal steps h = .405465, so
    # the data point is 2 + 1/2 = 2.5 and x = .8 x - .6 (2/3 - 1) 2.5 = .8 x + .5
    solver = OdeSolver("dpmpp_2m")
    x = solver.step(torch.full((1, 1), 0.7), torch.full((1, 1), -0.5), 0.6, 0.5)  # x_0 = .7 + .3
    assert x.item() == pytest.approx(0.75)  # the first is Euler's
    x = solver.step(x, (x - 2) / 0.5, 0.5, 0.4)
    assert x.item() == pytest.approx(0.8 * 0.75 + 0.5, abs=1e-6)
    solver.forget()
    x = solver.step(x, torch.full((1, 1), 1.0), 0.4, 0.3)
    assert x.item() == pytest.approx(1.1 - 0.1, abs=1e-6)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="choose one of euler, dpmpp_2m"):
        OdeSolver("heun")
