"""`rlrestore plan`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from rlrestore.build import load_train_config
from rlrestore.config.sections import TrainConfig
from rlrestore.errors import InputError
from rlrestore.planning.past_run import constants_of, differences, stage_seconds
from rlrestore.planning.plan import GIB, make_plan, store_warning
from rlrestore.planning.probe import Parts, parts_of, rank_threads, ranks_together
from rlrestore.planning.published import published_table
from rlrestore.planning.scaling import LARGEST, at_size
from rlrestore.planning.show import plan_text
from rlrestore.planning.workload import Cluster, Constants
from rlrestore.quiet import quiet


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What the command line says about machines and money."""

    nodes: int | None = None  # None: the placement of the config, on machines like this one
    gpus_per_node: int = 8
    gpu_memory_gib: float | None = None
    price_eur: float | None = None
    probe: bool = False
    from_run: Path | None = None
    speedup: float = 1.0  # of the planned device over the measured one, network work only
    json: bool = False
    largest: int = LARGEST


def run_validate() -> None:
    print(published_table())


def run_plan(config_path: Path, overrides: list[str], options: PlanOptions) -> None:
    quiet()
    _check(options)
    config = load_train_config(config_path, overrides)
    together = ranks_together(config) if options.probe and options.nodes is None else 1  # a fleet's links are reckoned
    with parts_of(config, together) as parts:
        constants = _constants(parts, options)
        footprint = parts.footprint() if options.probe else None
        network, copies = parts.network, parts.copies
    work, cluster = parts.work, here(config)
    if options.nodes is not None:
        gpus = options.nodes * options.gpus_per_node
        base = Cluster(options.nodes, options.gpus_per_node, gpus=True)
        work, cluster = at_size(work, base, gpus, options.nodes, weak=False)
    limit = None if options.gpu_memory_gib is None else options.gpu_memory_gib * GIB
    plan = make_plan(
        config, work, cluster, network, copies, footprint, constants,
        limit_bytes=limit, price_eur=options.price_eur, largest=options.largest if options.nodes is not None else 0,
    )  # fmt: skip
    if options.json:
        print(json.dumps(plan.to_json(), indent=1))
        return
    print(plan_text(plan, limit))
    if footprint is None:
        print("\nnot counted: activations, sampling and the process itself. --probe measures them")
    if warning := store_warning(plan, config.ray.object_store_mb * 2**20):
        print(f"\n{warning}")


def here(config: TrainConfig) -> Cluster:
    """The config's placement on this machine: processes share its cores unless they work on GPUs."""
    placement = config.placement
    processes = max(placement.ranks, 1) + (placement.rollout_actors if placement.kind == "separate" else 0)
    return Cluster(nodes=1, per_node=processes, gpus=placement.gpus, cores=float(os.cpu_count() or 1))


def _constants(parts: Parts, options: PlanOptions) -> Constants | None:
    if options.probe:
        constants = parts.measure()
    elif options.from_run is not None:
        constants = constants_of_run(options.from_run, parts)
    else:
        return None
    if options.speedup != 1:
        factor = 1 / options.speedup
        constants = constants.replace(
            sample=constants.sample.times(factor), train=constants.train.times(factor),
            step_s=constants.step_s * factor, evaluation_row_s=constants.evaluation_row_s * factor,
            source=f"{constants.source}, network work {options.speedup:g} times as fast",
        )  # fmt: skip
    return constants


def constants_of_run(folder: Path, parts: Parts) -> Constants:
    """InputError if the folder is no run, or one of another job."""
    past = load_train_config(folder / "config.resolved.yaml")
    if changed := differences(parts.config, past):
        raise InputError(
            f"{folder} was another job ({', '.join(changed)} differ): its speed says nothing about this one. Use --probe"
        )
    placement, work = past.placement, parts.work
    as_it_ran = work.replace(
        groups=past.rollout.groups, samples=past.rollout.samples,
        chunk_rows=min(past.rollout.batch, past.rollout.groups * past.rollout.samples),
        micro_rows=past.engine.micro_batch, kind=placement.kind,
        ranks=1 if placement.kind == "local" else placement.ranks, rollout_actors=placement.rollout_actors,
        reward_workers=placement.reward_workers, staleness=past.asynchrony.ahead,
        tasks_drawn=past.rollout.groups * past.curriculum.candidates,
    )  # fmt: skip
    return constants_of(stage_seconds(folder), as_it_ran, here(past), rank_threads(past), f"log of {folder}")


def _check(options: PlanOptions) -> None:
    for name, value in (
        ("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node), ("--gpu-memory", options.gpu_memory_gib),
        ("--price", options.price_eur), ("--speedup", options.speedup),
    ):  # fmt: skip
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} is {value:g}: give a number above 0")
    if options.probe and options.from_run is not None:
        raise InputError("--probe and --from-run both say how fast a unit of work is: give one of them")
    if not 1 <= options.largest <= LARGEST:
        raise InputError(f"--largest is {options.largest}: the simulation goes from 1 to {LARGEST} GPUs")
    if options.nodes is not None and options.nodes * options.gpus_per_node > LARGEST:
        raise InputError(
            f"{options.nodes} nodes x {options.gpus_per_node} GPUs: the simulation goes up to {LARGEST} GPUs"
        )
    if options.from_run is not None and not (options.from_run / "config.resolved.yaml").is_file():
        raise InputError(
            f"{options.from_run} holds no config.resolved.yaml: --from-run takes a run, such as runs/quickstart"
        )
