"""What keeps a policy near its start whatever its rewards say; usable with every algorithm.

Each is a penalty on the velocities that the algorithm's loss was computed from, against those of the frozen start, so it
costs one more forward (none if the algorithm asks the start anyway) and no new samples. Rewards have zero mean inside a
group, a penalty has not: small weights act strongly over time.
"""

from __future__ import annotations

from torch import Tensor

from rewards.filters import atrous_low_pass
from rlrestore.algorithms.base import Batch, Policies, Visit
from rlrestore.algorithms.objectives import velocity_mse_N
from rlrestore.config import RegulariseConfig

LOW_PASSES = 5  # as the low_frequency reward: a Gaussian of sigma 13 px


def penalties(
    config: RegulariseConfig, policies: Policies, batch: Batch, visit: Visit
) -> dict[str, tuple[float, Tensor]]:
    """Name -> (weight, [B] penalty) of each that is switched on; gradients flow through `visit.v` only."""
    if not config.active:
        return {}
    v_ref = visit.v_reference
    if v_ref is None:
        v_ref = policies.reference_velocity(visit.z_t, visit.t_B, batch.condition)
    found = {}
    if config.velocity > 0:
        found["velocity"] = (config.velocity, velocity_mse_N(visit.v, v_ref))
    if config.low_frequency > 0:
        found["low_frequency"] = (config.low_frequency, _low_frequency_N(policies, batch, visit, v_ref))
    return found


def _low_frequency_N(policies: Policies, batch: Batch, visit: Visit, v_ref: Tensor) -> Tensor:
    """[B] mean |B(x_0) - B(x_0_ref)|, x_0 = decode(z_t - t v) the predicted result, B the à-trous low pass.

    The low-frequency term of RFSR with the filter of the usual wavelet colour fix and the start's own prediction as reference.
    """
    t = visit.t_B.view(-1, *[1] * (visit.v.ndim - 1))
    shown, start = (policies.restorer.decode(visit.z_t - t * v, batch.condition) for v in (visit.v, v_ref))
    return atrous_low_pass(shown - start, LOW_PASSES).abs().flatten(1).mean(1)
