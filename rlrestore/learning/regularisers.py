"""What keeps a policy near its start whatever its rewards say; usable with every algorithm.

`velocity` and `low_frequency` compare the velocities that the algorithm's loss was computed from with those of the frozen start,
so they cost one more forward (none if the algorithm asks the start anyway) and no new samples. `supervised` holds on to the
references instead, for a forward and backward of its own. Rewards have zero mean inside a group, a penalty has not: small weights
act strongly over time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from rewards.filters import atrous_low_pass
from rlrestore.algorithms.base import Batch, Point, Policies, Visit
from rlrestore.algorithms.objectives import velocity_mse_N
from rlrestore.config.sections import RegulariseConfig
from rlrestore.diffusion.sampling import seeded_noise
from rlrestore.iteration.rollout import bounded_latent
from rlrestore.seeds import derive_seed

LOW_PASSES = 5  # as the low_frequency reward: a Gaussian of sigma 13 px
SMALL = 0.01  # of [0, 1] RGB, 2.5 grey levels of 255; twenty times the quickstart's in-group spread of the large scales


def penalties(
    config: RegulariseConfig, policies: Policies, batch: Batch, point: Point, visit: Visit
) -> dict[str, tuple[float, Tensor]]:
    """Name -> (weight, [B] penalty) of each that is switched on; gradients flow through the current policy only."""
    found = {}
    if config.asks_reference:
        v_ref = visit.v_reference
        if v_ref is None:
            v_ref = policies.reference_velocity(visit.z_t, visit.t_B, batch.condition)
        if config.velocity > 0:
            found["velocity"] = (config.velocity, velocity_mse_N(visit.v, v_ref))
        if config.low_frequency > 0:
            found["low_frequency"] = (config.low_frequency, _low_frequency_N(policies, batch, visit, v_ref))
    if config.supervised > 0:
        found["supervised"] = (config.supervised, _supervised_N(policies, batch, point))
    return found


def _supervised_N(policies: Policies, batch: Batch, point: Point) -> Tensor:
    """[B] mean (v - (eps - z_0))^2, z_0 = encode(reference), with a time and eps of each row's own; 0 without a reference.

    The likelihood anchor of LRPO (arXiv 2509.23339).
    """
    known = torch.tensor([task.gt is not None for task in batch.tasks_B], device=batch.z_0.device)
    images = torch.stack([task.lq if task.gt is None else task.gt for task in batch.tasks_B]).to(batch.z_0.device)
    z_0 = bounded_latent(policies.restorer, images, batch.condition)
    seeds = [derive_seed(point.seed, "supervised", point.position, row.group, row.member) for row in batch.rows_B]
    eps, generators = seeded_noise(seeds, tuple(z_0.shape[1:]))
    eps = policies.restorer.endpoint(eps.to(z_0.device), batch.condition)
    times = [policies.restorer.training_time(float(torch.rand((), generator=generator))) for generator in generators]
    t_B = torch.tensor(times, device=z_0.device)
    t = t_B.view(-1, *[1] * (z_0.ndim - 1))
    v = policies.velocity((1 - t) * z_0 + t * eps, t_B, batch.condition)
    return velocity_mse_N(v, eps - z_0) * known


def _low_frequency_N(policies: Policies, batch: Batch, visit: Visit, v_ref: Tensor) -> Tensor:
    """[B] mean h(B(x_0) - B(x_0_ref)), x_0 = decode(z_t - t v) the predicted result, B the à-trous low pass.

    The low-frequency term of RFSR with the filter of the usual wavelet colour fix and the start's own prediction as reference. h is
    |d| - SMALL / 2, rounded off to d^2 / (2 SMALL) below SMALL: the gradient of |d| does not shrink with d, and at a weight that
    holds a drift it was ten times that of the rewards from the first step on (docs/log.md).
    """
    t = visit.t_B.view(-1, *[1] * (visit.v.ndim - 1))
    shown, start = (policies.restorer.decode(visit.z_t - t * v, batch.condition) for v in (visit.v, v_ref))
    moved = atrous_low_pass(shown - start, LOW_PASSES)
    return smooth_l1_loss(moved, torch.zeros_like(moved), beta=SMALL, reduction="none").flatten(1).mean(1)
