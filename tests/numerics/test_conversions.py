"""Foreign coordinates on numbers that can be derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline

from rlrestore.diffusion.conversions import VariancePreserving, pack, unpack
from rlrestore.diffusion.kernels import ddim_step, gaussian_logp_mean, log_ratio_mean, ode_step


def test_one_state_in_two_units() -> None:
    """alphas_cumprod 0.64: alpha 0.8, sigma 0.6, t = 0.6 / 1.4 = 3/7, z = y / 1.4."""
    vp = VariancePreserving(torch.tensor([0.96, 0.64]), "epsilon")
    t_B = torch.tensor([3 / 7])
    assert vp.t_max == pytest.approx(3 / 7, abs=1e-7)
    y = torch.tensor([[0.8 * 2.0 + 0.6 * -1.0]])  # x0 = 2, eps = -1
    z = vp.from_state(y, t_B)
    assert float(z) == pytest.approx(1.0 / 1.4, abs=1e-6)
    assert float(z) == pytest.approx((1 - 3 / 7) * 2.0 + 3 / 7 * -1.0, abs=1e-6)
    assert torch.allclose(vp.state(z, t_B), y, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "value"),
    [("epsilon", -1.0), ("sample", 2.0), ("v_prediction", 0.8 * -1.0 - 0.6 * 2.0)],  # alpha eps - sigma x0
)
def test_every_prediction_is_the_same_velocity(prediction: str, value: float) -> None:
    """x0 = 2, eps = -1: v = eps - x0 = -3."""
    vp = VariancePreserving(torch.tensor([0.96, 0.64]), prediction)
    t_B = torch.tensor([3 / 7])
    z = (1 - t_B[:, None]) * 2.0 + t_B[:, None] * -1.0
    assert float(vp.velocity(torch.tensor([[value]]), z, t_B)) == pytest.approx(-3.0, abs=1e-5)


def test_an_euler_step_is_a_ddim_step() -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(10)
    vp = VariancePreserving(scheduler.alphas_cumprod, "epsilon")
    times = vp.trailing_times(10)
    assert times[0] == vp.t_max == pytest.approx(0.93596, abs=1e-5)  # SD never reaches pure noise
    assert vp.index(torch.tensor(times[:-1])).tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 4, 8, 8, generator=generator)
    z = vp.from_state(y, torch.tensor(times[:1]))
    for t, t_next, step in zip(times[:-1], times[1:], scheduler.timesteps, strict=True):
        eps = torch.randn(y.shape, generator=generator)
        y = scheduler.step(eps, step, y).prev_sample
        z = ode_step(z, vp.velocity(eps, z, torch.tensor([t])), t, t_next)
        if t_next > 0:
            assert float((vp.state(z, torch.tensor([t_next])) - y).abs().max()) < 1e-4
    assert float((z - y).abs().max()) < 1e-4


def test_times_between_two_entries_have_an_index_between() -> None:
    vp = VariancePreserving(torch.tensor([0.96, 0.64, 0.36]), "epsilon")
    middle = (vp.t_of_index[1] + vp.t_of_index[2]) / 2
    t_B = torch.stack([vp.t_of_index[0] / 2, vp.t_of_index[1], middle, torch.tensor(1.0, dtype=torch.float64)]).float()
    assert vp.index(t_B).tolist() == pytest.approx([0.0, 1.0, 1.5, 2.0], abs=1e-5)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="'flow' is unknown: choose one of epsilon"):
        VariancePreserving(torch.tensor([0.9, 0.1]), "flow")


def test_tokens_are_in_the_pipelines_order() -> None:
    z = torch.arange(2 * 4 * 4 * 6, dtype=torch.float32).view(2, 4, 4, 6)
    assert torch.equal(pack(z), FluxPipeline._pack_latents(z, 2, 4, 4, 6))
    assert torch.equal(unpack(pack(z), 4, 6), z)


def test_ddim_eta_in_a_models_own_coordinates_is_ddpos() -> None:
    """The `ddim` kernel on z = y / (alpha + sigma) against the variance-preserving form that DDPO trains, by hand.

    ab .3 -> .5, eta 1, x = (.5, -1), eps_hat = (.2, -.4), z = (.3, -.7): x0_hat = (x - sqrt(.7) eps_hat) / sqrt(.3);
    S = sqrt(.5 / .7) sqrt(1 - .3 / .5) = .534522; mu = sqrt(.5) x0_hat + sqrt(.5 - S^2) eps_hat = (.522055, -1.044109);
    x' = mu + S z = (.682411, -1.418275) with log-probability -.437557 an element.
    """
    vp = VariancePreserving(torch.tensor([0.5, 0.3], dtype=torch.float64), "epsilon")
    t_next, t = (float(value) for value in vp.t_of_index)
    times = [torch.tensor([t]), torch.tensor([t_next])]
    y, noise = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, -0.7]])
    z = vp.from_state(y, times[0])

    def step(eps_hat: torch.Tensor):
        return ddim_step(z, vp.velocity(eps_hat, z, times[0]), t, t_next, 1.0)

    ours = step(torch.tensor([[0.2, -0.4]]))
    z_next = ours.mean + ours.std * noise
    unit = float(vp.state(torch.ones(1, 1), times[1]))  # y' of z' = 1
    assert float(ours.std) * unit == pytest.approx(0.534522, abs=1e-6)
    assert vp.state(ours.mean, times[1])[0].tolist() == pytest.approx([0.522055, -1.044109], abs=1e-6)
    assert vp.state(z_next, times[1])[0].tolist() == pytest.approx([0.682411, -1.418275], abs=1e-6)
    # densities differ by the Jacobian of the unit alone, so that ratios and KL are the same numbers
    logp = gaussian_logp_mean(z_next, ours.mean, ours.std) - math.log(unit)
    assert float(logp) == pytest.approx(-0.437557, abs=1e-6)
    other = step(torch.tensor([[0.25, -0.3]]))
    scaled = (vp.state(value, times[1]) for value in (other.mean, ours.mean, z_next))
    flow = log_ratio_mean(other.mean, ours.mean, z_next, ours.std)
    torch.testing.assert_close(log_ratio_mean(*scaled, ours.std * unit), flow, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_eta_agrees_with_diffusers_along_a_schedule(eta: float) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(10)
    vp = VariancePreserving(scheduler.alphas_cumprod, "epsilon")
    times = vp.trailing_times(10)
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(1, 4, 8, 8, generator=generator)
    for t, t_next, timestep in zip(times[:-2], times[1:-1], scheduler.timesteps[:-1], strict=True):
        eps_hat, noise = (torch.randn(y.shape, generator=generator) for _ in range(2))
        z = vp.from_state(y, torch.tensor([t]))
        ours = ddim_step(z, vp.velocity(eps_hat, z, torch.tensor([t])), t, t_next, eta)
        y = scheduler.step(eps_hat, timestep, y, eta=eta, variance_noise=noise).prev_sample
        assert float((vp.state(ours.mean + ours.std * noise, torch.tensor([t_next])) - y).abs().max()) < 1e-4
