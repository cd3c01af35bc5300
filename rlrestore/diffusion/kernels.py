"""One step of the sampler, from time t to t_next < t, as a pure function; and the Gaussian it is drawn from.

Contract: latents are [N, ...] float32 (asserted: bf16 breaks ratio == 1). Times are Python floats (one time for
the batch) or [N] tensors; both round to the same bits. `std` is ALWAYS the std of the whole transition
x_next = mean + std * z, with sqrt|dt| inside; it is never the diffusion coefficient s(t), which published code stores
under the same name in one branch of two. No generator, no index search, no device choice: the caller brings z.

Every kernel is affine, mean = x_gain * x + v_gain * v, with coefficients computed in float64. v_gain is d mean / d v,
so KL(new||old) per element is v_gain^2 (v_new - v_old)^2 / (2 std^2).

Log-probabilities are means over latent elements, not sums (as in all public diffusion-RL code): nats a latent element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Time = float | Tensor  # one time for the batch, or [N]

T_SINGULAR = 1 - 1e-6  # at or above this, sqrt(t/(1-t)) is replaced; `t == 1` would miss rounded schedules
STD_MIN = 1e-3  # below it, float32 storage of x_next already moves the log-prob by more than usual clip ranges


@dataclass(frozen=True)
class StepGaussian:
    """The distribution of x_next: N(mean, std^2 I)."""

    mean: Tensor  # [N, ...] float32, carries the gradient
    std: Tensor  # float32, std of the transition: [] for a float time (on the CPU), [N, 1, ...] for [N] times


@dataclass(frozen=True)
class StepCoefficients:
    """mean = x_gain * x + v_gain * v; all three float64, [] or [N]."""

    x_gain: Tensor
    v_gain: Tensor  # d mean / d v
    std: Tensor


def ode_step(x: Tensor, v: Tensor, t: Time, t_next: Time) -> Tensor:
    """Euler step x + (t_next - t) v. In flow coordinates this is also DDIM with eta 0."""
    _check_latents(x, v)
    time, time_next = _times(t, t_next)
    return x + _broadcast(time_next - time, x) * v


def flow_sde_step(
    x: Tensor, v: Tensor, t: Time, t_next: Time, level: float, t_second: float | None = None
) -> StepGaussian:
    """Flow-SDE of Flow-GRPO (arXiv 2505.05470) with s(t) = level sqrt(t/(1-t)); level 0.7 is the published base.

    `t_second` is the second entry of the schedule; it is read only at t = 1, where 1-t in the root becomes 1-t_second
    (then std = level whatever the number of steps). The last step (t_next = 0) leaves noise: use the ODE there.
    """
    return _apply(flow_sde_coefficients(t, t_next, level, t_second), x, v)


def cps_step(x: Tensor, v: Tensor, t: Time, t_next: Time, level: float, t_second: float | None = None) -> StepGaussian:
    """Coefficient-preserving sampling (arXiv 2509.05952): std = t_next sin(level pi/2), 0 is the ODE, 1 full re-noise.

    The marginal keeps exactly (1-t_next) x0 + t_next eps. `t_second` is ignored. std is 0 at t_next = 0.
    """
    return _apply(cps_coefficients(t, t_next, level), x, v)


def dance_sde_step(
    x: Tensor, v: Tensor, t: Time, t_next: Time, level: float, t_second: float | None = None
) -> StepGaussian:
    """Dance-SDE of DanceGRPO (arXiv 2505.07818): the SDE with constant s(t) = level; 0.3 is published for images.

    `t_second` is ignored: nothing is singular. The last step leaves noise: use the ODE there.
    """
    return _apply(dance_sde_coefficients(t, t_next, level), x, v)


def ddim_step(x: Tensor, v: Tensor, t: Time, t_next: Time, level: float, t_second: float | None = None) -> StepGaussian:
    """DDIM with eta = level (arXiv 2010.02502, eq. 16) in flow coordinates: 0 is the ODE, 1 ancestral sampling.

    Keeps (1-t_next) x0 + t_next eps like `cps_step`, but its noise shrinks with the step. `t_second` is ignored.
    """
    return _apply(ddim_coefficients(t, t_next, level), x, v)


KERNELS: dict[str, Callable[[Tensor, Tensor, Time, Time, float, float | None], StepGaussian]] = {
    "cps": cps_step,
    "dance_sde": dance_sde_step,
    "ddim": ddim_step,
    "flow_sde": flow_sde_step,
}
DRIFT_KERNELS = ("dance_sde", "flow_sde")  # steps of an SDE in dt; the others re-noise a prediction of x0


def flow_sde_coefficients(t: Time, t_next: Time, level: float, t_second: float | None = None) -> StepCoefficients:
    """s^2 = level^2 t/(1-t)."""
    if not level >= 0:
        raise ValueError(f"the noise level of flow_sde must be >= 0, got {level}")
    time, time_next = _times(t, t_next)
    singular = time >= T_SINGULAR
    if bool(singular.any()) and level > 0:
        if t_second is None or not t_second < T_SINGULAR:
            raise ValueError(f"flow_sde at t=1 needs t_second < 1, the second time of the schedule; got {t_second}")
        clean_share = torch.where(singular, 1 - t_second, 1 - time)
    else:
        clean_share = (1 - time).clamp_min(1 - T_SINGULAR)
    return _sde(time, time_next, level**2 * time / clean_share)


def dance_sde_coefficients(t: Time, t_next: Time, level: float) -> StepCoefficients:
    """s^2 = level^2."""
    if not level >= 0:
        raise ValueError(f"the noise level of dance_sde must be >= 0, got {level}")
    time, time_next = _times(t, t_next)
    return _sde(time, time_next, torch.full_like(time, level**2))


def cps_coefficients(t: Time, t_next: Time, level: float) -> StepCoefficients:
    """mean = (1-t_next) x0_hat + t_next cos(level pi/2) eps_hat, with x0_hat = x - t v and eps_hat = x + (1-t) v."""
    if not 0 <= level <= 1:
        raise ValueError(f"the noise level of cps must lie in [0, 1], got {level}; 0.8 is usual, 0 is the ODE")
    time, time_next = _times(t, t_next)
    std = time_next * math.sin(level * math.pi / 2)
    return _renoise(time, time_next, time_next * math.cos(level * math.pi / 2), std)


def ddim_coefficients(t: Time, t_next: Time, level: float) -> StepCoefficients:
    """std = level t_next sqrt(1 - (t_next (1-t) / (t (1-t_next)))^2); mean as cps with this std."""
    if not 0 <= level <= 1:
        raise ValueError(f"the noise level of ddim must lie in [0, 1], got {level}; 0.5 is like flow_sde 0.7")
    time, time_next = _times(t, t_next)
    kept = time_next * (1 - time) / (time * (1 - time_next))  # of the noise, as a share
    std = level * time_next * (1 - kept.square()).sqrt()
    return _renoise(time, time_next, (time_next.square() - std.square()).sqrt(), std)


def trainable(std: Tensor | float, std_min: float = STD_MIN) -> bool:
    """Whether a log-prob under this transition means anything: every std >= std_min (> 0 even if std_min is 0).

    Use std_min=0.03 if latents are stored in bf16.
    """
    std = torch.as_tensor(std)
    return bool((std >= std_min).all() and (std > 0).all())


def gaussian_logp_mean(x_next: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """[N] log N(x_next; mean, std^2), averaged over latent elements. x_next is detached. ValueError if any std is 0."""
    _check_latents(x_next, mean)
    std = _positive_std(std, mean)
    z = (x_next.detach() - mean) / std
    return _mean_N(-0.5 * z * z - std.log() - 0.5 * math.log(2 * math.pi))


def log_ratio_mean(mean_new: Tensor, mean_old: Tensor, x_next: Tensor, std: Tensor | float) -> Tensor:
    """[N] logp_new - logp_old = mean_d (mu - mu_old)(2 x_next - mu - mu_old) / (2 std^2), gradient through mean_new.

    The difference form: exactly 0 when the means are equal, and about 1000 times more accurate in float32 than the
    difference of two log-probs (whose error is 0.1 % of a 1e-5 clip range).
    """
    _check_latents(mean_new, mean_old, x_next)
    std = _positive_std(std, mean_new)
    mean_old, x_next = mean_old.detach(), x_next.detach()
    # (x - mu) + (x - mu_old) rather than 2x - mu - mu_old: each bracket is of the size of std, so less cancels
    return _mean_N((mean_new - mean_old) / std * (((x_next - mean_new) + (x_next - mean_old)) / std)) / 2


def gaussian_kl_mean(mean: Tensor, mean_ref: Tensor, std: Tensor | float) -> Tensor:
    """[N] exact KL(N(mean, std^2) || N(mean_ref, std^2)) a latent element; gradient through `mean` only.

    Published image scripts divide by s(t)^2 instead of std^2: their beta is this one's divided by |dt|.
    """
    _check_latents(mean, mean_ref)
    z = (mean - mean_ref.detach()) / _positive_std(std, mean)
    return _mean_N(z * z) / 2


def _apply(step: StepCoefficients, x: Tensor, v: Tensor) -> StepGaussian:
    _check_latents(x, v)
    mean = _broadcast(step.x_gain, x) * x + _broadcast(step.v_gain, x) * v
    return StepGaussian(mean, _broadcast(step.std, x))


def _sde(time: Tensor, time_next: Tensor, s2: Tensor) -> StepCoefficients:
    """mean = x (1 + s^2/(2t) dt) + v (1 + s^2 (1-t)/(2t)) dt,  std = s sqrt|dt|."""
    dt = time_next - time
    return StepCoefficients(1 + s2 / (2 * time) * dt, (1 + s2 * (1 - time) / (2 * time)) * dt, (s2 * -dt).sqrt())


def _renoise(time: Tensor, time_next: Tensor, noise: Tensor, std: Tensor) -> StepCoefficients:
    """mean = (1-t_next) x0_hat + noise eps_hat, with x0_hat = x - t v and eps_hat = x + (1-t) v."""
    clean = 1 - time_next
    return StepCoefficients(clean + noise, (1 - time) * noise - time * clean, std)


def _times(t: Time, t_next: Time) -> tuple[Tensor, Tensor]:
    """Both times in float64, of one shape."""
    time, time_next = torch.broadcast_tensors(*(torch.as_tensor(each).to(torch.float64) for each in (t, t_next)))
    falling = (time_next >= 0) & (time_next < time) & (time <= 1)
    assert bool(falling.all()), f"times must fall within [0, 1]: {t} -> {t_next}"
    return time, time_next


def _broadcast(value: Tensor, like: Tensor) -> Tensor:
    """float32 value against `like`: [] (left where it is: a CPU scalar serves any device), [N] or [N, 1, ...]."""
    value = value.to(torch.float32)
    if value.ndim == 0:
        return value
    assert value.numel() == like.shape[0], f"{tuple(value.shape)} is neither a scalar nor one value for {len(like)}"
    return value.reshape(-1, *[1] * (like.ndim - 1)).to(like.device)


def _positive_std(std: Tensor | float, like: Tensor) -> Tensor:
    std = _broadcast(torch.as_tensor(std), like)
    if not bool((std > 0).all()):
        raise ValueError("a step with std 0 has no density: ODE steps, level 0 and the last CPS step cannot be trained")
    return std


def _mean_N(value: Tensor) -> Tensor:
    return value.flatten(1).mean(1)


def _check_latents(*latents: Tensor) -> None:
    for latent in latents:
        assert latent.dtype == torch.float32, f"step kernels are float32, got {latent.dtype}: cast before the step"
        assert latent.ndim >= 2, f"latents are [N, ...], got {tuple(latent.shape)}"
        assert latent.shape == latents[0].shape, [tuple(each.shape) for each in latents]
