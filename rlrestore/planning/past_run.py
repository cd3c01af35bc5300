"""The constants of a run that was made: from its config.resolved.yaml and the stage times in metrics.jsonl.

A log has seconds by stage, not by call, so rows cost what they cost there and nothing is fixed; what scoring costs is only
known where sampling did not hide all of it. The constants are then tuned until the simulation of that very run gives its own
stage times back, so that what its processes lost to each other is not counted twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rlrestore.config.sections import TrainConfig
from rlrestore.errors import InputError
from rlrestore.planning.pipeline import pipeline_of
from rlrestore.planning.simulate import simulate
from rlrestore.planning.workload import Cluster, Constants, Cost, Workload
from rlrestore.reporting.log import read_metrics

STAGES = ("sample", "score", "update", "publish")
TUNING_ROUNDS = 6


def stage_seconds(run: Path, skip: int = 1) -> dict[str, float]:
    """Medians over the iterations after the first `skip`: STAGES, `iteration`, and `rest` that no stage accounts for."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the folder of a run that has trained, or use --probe")
    rows = [row for row in read_metrics(path) if "time/iteration_s" in row]
    if len(rows) <= skip:
        raise InputError(f"{path} has {len(rows)} iterations and a plan needs {skip + 1}: train longer, or use --probe")
    rows = rows[skip:]
    seconds = {
        name: statistics.median(row.get(f"time/{name}_s", 0.0) for row in rows) for name in (*STAGES, "iteration")
    }
    rest = [
        row["time/iteration_s"] - sum(row.get(f"time/{name}_s", 0.0) for name in STAGES) for row in rows
    ]  # fmt: skip
    return {**seconds, "rest": max(0.0, statistics.median(rest))}


def constants_of(seconds: dict[str, float], work: Workload, cluster: Cluster, threads: int, source: str) -> Constants:
    """`work` as that run had it; `cluster` as the machines that it ran on."""
    share = max(len(work.chunks) * work.chunk_rows // work.samplers, 1)
    rounds = -(-work.samplers // work.reward_workers)  # chunks that wait for one worker when sampling ends
    score_row_s = seconds["score"] / (work.rollouts if work.kind == "local" else rounds * work.chunk_rows)
    calls_s = 0.0 if work.kind == "local" else (4 * len(work.chunks) + work.ranks) * cluster.call_s
    first = Constants(
        sample=Cost(0.0, seconds["sample"] / share),
        train=Cost(0.0, seconds["update"] * work.ranks / (work.rollouts * work.points)),
        step_s=0.0, score=Cost(0.0, score_row_s), draw_s=0.0, driver_s=max(0.0, seconds["rest"] - calls_s),
        source=source, threads=threads,
    )  # fmt: skip
    return _tuned(first, seconds, work, cluster)


def _tuned(constants: Constants, seconds: dict[str, float], work: Workload, cluster: Cluster) -> Constants:
    for _ in range(TUNING_ROUNDS):
        played = simulate(pipeline_of(work, constants, cluster), iterations=1, warmup=1)
        constants = constants.replace(
            sample=constants.sample.times(_ratio(seconds["sample"], played.sample_s)),
            score=constants.score.times(_ratio(seconds["score"], played.score_s)),
            train=constants.train.times(_ratio(seconds["update"], played.update_s)),
        )
    return constants


def _ratio(wanted: float, got: float) -> float:
    """Bounded, because a stage that is hidden says little."""
    return min(2.0, max(0.5, wanted / got)) if wanted > 0 and got > 0 else 1.0


def differences(config: TrainConfig, past: TrainConfig) -> Sequence[str]:
    """Keys that change what a unit of work costs and differ between the two; constants do not carry over then."""
    pairs = {
        "env": (config.env, past.env), "restorer": (config.restorer, past.restorer),
        "algorithm": (config.algorithm, past.algorithm), "sampling.steps": (config.sampling.steps, past.sampling.steps),
        "engine.precision": (config.engine.precision, past.engine.precision),
        "rewards": (sorted(config.rewards), sorted(past.rewards)),
    }  # fmt: skip
    return [key for key, (now, then) in pairs.items() if now != then]
