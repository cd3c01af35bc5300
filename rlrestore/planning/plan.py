"""One plan: everything that `rlrestore plan` prints, as records. No printing, no files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rlrestore.config.sections import TrainConfig
from rlrestore.planning.memory import Copies, Memory, Network, Sharding, rollout_memory, trainer_memory
from rlrestore.planning.needs import (
    IN_FLIGHT_SHARE,
    Line,
    checkpoint_bytes,
    cost,
    in_flight,
    run_seconds,
    stage_lines,
    traffic,
)
from rlrestore.planning.pipeline import closed_form, pipeline_of, samplers_to_feed, workers_to_hide
from rlrestore.planning.probe import Footprint
from rlrestore.planning.scaling import Scale, bottleneck, stops_at, sweep, why
from rlrestore.planning.simulate import Simulated, simulate
from rlrestore.planning.workload import Cluster, Constants, Workload

GIB = 2**30
SWEEPS = ("strong", "weak")
GPU_CONTEXT = int(1.5 * GIB)  # of CUDA and NCCL; not measured here
GPU_SLACK = 0.1  # of torch's caching allocator; not measured here


@dataclass(frozen=True)
class Fit:
    """One way to shard a rank, and whether it fits."""

    name: str
    memory: Memory
    fits: bool | None  # None: no limit was given


@dataclass(frozen=True)
class Plan:
    work: Workload
    gpus: int  # ranks and rollout actors: what is rented, if they are GPUs
    chosen: Fit
    fits: tuple[Fit, ...]
    rollout_actor: Memory | None
    traffic: tuple[Line, ...]
    in_flight: Line
    checkpoint: tuple[Line, ...]
    constants: Constants | None = None
    stages: tuple[Line, ...] = ()
    simulated: Simulated | None = None
    bottleneck: tuple[str, float] = ("", 0.0)
    workers: tuple[Line, ...] = ()
    run: tuple[Line, ...] = ()
    cost: Line | None = None
    scales: dict[str, tuple[Scale, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        plain["scaling"] = {
            name: {"rows": rows, "stops": verdict(self.work, self.scales[name])}
            for name, rows in plain.pop("scales").items()
        }
        for fit, row in [*zip(self.fits, plain["fits"], strict=True), (self.chosen, plain["chosen"])]:
            row["peak"], row["peak_phase"] = fit.memory.peak, fit.memory.peak_phase
        return plain


def make_plan(
    config: TrainConfig,
    work: Workload,
    cluster: Cluster,
    network: Network,
    copies: Copies,
    footprint: Footprint | None,
    constants: Constants | None,
    *,
    limit_bytes: float | None = None,
    price_eur: float | None = None,
    largest: int = 0,
) -> Plan:
    """`work` and `cluster` already have the size that is planned for; without `constants` nothing is said about time.

    Scaling is played up to `largest` GPUs, not at all with 0.
    """
    kept = footprint or Footprint(0, 0, 0)
    process = GPU_CONTEXT if cluster.gpus else kept.process
    slack = GPU_SLACK if cluster.gpus else 0.0

    def fit(sharding: Sharding) -> Fit:
        memory = trainer_memory(
            network, sharding, copies, saved=kept.saved, sampling=kept.sampling, process=process, slack=slack
        )
        return Fit(_sharding_name(sharding), memory, None if limit_bytes is None else memory.peak <= limit_bytes)

    engine = config.engine
    ways = [Sharding("torch", 0, work.ranks), *(Sharding("deepspeed", zero, work.ranks) for zero in range(4))]
    if network.trained_bytes == 2:
        ways = [way for way in ways if way.stage >= 1]
    mine = Sharding(engine.kind, engine.zero if engine.kind == "deepspeed" else 0, work.ranks, engine.offload)
    separate = work.kind == "separate"
    plan = Plan(
        work, work.ranks + (work.rollout_actors if separate else 0), fit(mine), tuple(map(fit, ways)),
        rollout_memory(network, sampling=kept.sampling, process=process) if separate else None,
        tuple(traffic(work)),
        Line("in the object store at once", in_flight(work), "B", f"an iteration's, x {1 + work.staleness}"),
        tuple(checkpoint_bytes(network, mine, copies)),
    )  # fmt: skip
    return plan if constants is None else _with_time(plan, work, cluster, constants, price_eur, largest)


def _with_time(
    plan: Plan, work: Workload, cluster: Cluster, constants: Constants, price_eur: float | None, largest: int
) -> Plan:
    pipe = pipeline_of(work, constants, cluster)
    played = simulate(pipe)
    run = run_seconds(work, constants, played.iteration_s)
    workers = [
        Line("reward workers that keep up", workers_to_hide(pipe), "", "scoring of all chunks / the stage that must hide it")
    ]  # fmt: skip
    if work.kind == "separate":
        workers.append(
            Line("rollout actors that feed the trainers", samplers_to_feed(pipe), "", "sampling of all chunks / update + publish")
        )  # fmt: skip
    return dataclasses.replace(
        plan, constants=constants, stages=tuple(stage_lines(closed_form(pipe))), simulated=played,
        bottleneck=bottleneck(pipe, played), workers=tuple(workers), run=tuple(run),
        cost=None if price_eur is None else cost(plan.gpus, run[-1].value, price_eur),
        scales={name: tuple(sweep(work, constants, cluster, name == "weak", largest)) for name in SWEEPS} if largest else {},
    )  # fmt: skip


def _sharding_name(sharding: Sharding) -> str:
    if sharding.engine == "torch":
        return "torch"
    return f"deepspeed zero {sharding.zero}" + ("" if sharding.offload == "none" else f", {sharding.offload} offloaded")


def verdict(work: Workload, rows: tuple[Scale, ...]) -> str:
    """Where a sweep stops being worth it, and why."""
    last = stops_at(rows)
    if last is None:
        return f"scales to {rows[-1].gpus} GPUs"
    following = rows[rows.index(last) + 1]
    return (
        f"stops at {last.gpus} GPUs: {following.gpus} would make {following.images_per_s / last.images_per_s:.2f} x the images. "
        f"Limit: {following.bottleneck} ({following.gain:.0%} of an iteration): {why(work, following)}"
    )


def store_warning(plan: Plan, store_bytes: float) -> str | None:
    """What lives in the object store at once against its size, if it is too much."""
    room = IN_FLIGHT_SHARE * store_bytes
    if plan.work.kind == "local" or plan.in_flight.value <= room:
        return None
    return (
        f"an iteration keeps {plan.in_flight.value / 2**20:.0f} MiB in the object store, more than {IN_FLIGHT_SHARE:.0%} of "
        f"{store_bytes / 2**20:.0f} MiB: raise ray.object_store_mb to {plan.in_flight.value / IN_FLIGHT_SHARE / 2**20:.0f}"
    )
