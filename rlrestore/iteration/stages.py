"""The stages of an iteration between the env, the crew and the log: pure functions over the records of `types`."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from envs.types import Task
from rewards.base import Scores
from rewards.constraints import Multipliers
from rewards.gates import GateConfig, Gated, Levels, apply_gates
from rewards.rubric import Rubric, RubricScores, mixed
from rlrestore.algorithms.base import Algorithm
from rlrestore.config.sections import CreditConfig, SamplingConfig
from rlrestore.crew import Scored, deal
from rlrestore.diffusion.sampling import Chain
from rlrestore.diffusion.schedules import time_schedule
from rlrestore.iteration.credit import Credit, group_credit
from rlrestore.iteration.history import RewardHistory
from rlrestore.iteration.windows import thinned, window_steps
from rlrestore.seeds import derive_seed
from rlrestore.types import Chunk, Images, Row, UpdateReport, UpdateRequest, plan_updates


def chain_times(config: SamplingConfig) -> tuple[float, ...]:
    return config.times or tuple(time_schedule(config.steps, config.shift).tolist())


def rollout_chain(config: SamplingConfig, seed: int, iteration: int, algorithm: Algorithm) -> Chain:
    """The chain of this iteration's rollouts; all samples share one window, a function of (seed, iteration)."""
    times = chain_times(config)
    if not algorithm.needs.trajectory:
        kept = algorithm.kept_steps(config.steps, derive_seed(seed, "window", iteration))
        return Chain(times, window=kept, solver=config.solver)
    window = window_steps(config, seed, iteration)
    return Chain(thinned(times, window, config.tail), config.sampler, config.level, window, config.solver)


def evaluation_chain(config: SamplingConfig) -> Chain:
    """Always the ODE, on the times and with the solver of training."""
    return Chain(chain_times(config), solver=config.solver)


def make_chunks(
    tasks: Sequence[Task],
    samples: int,
    batch: int,
    seed: int,
    *counters: int,
    temperature: tuple[float, float] = (1.0, 1.0),
) -> list[Chunk]:
    """K rollouts of each task in group-major order, cut every `batch` rows and where the photos' size changes.

    Seeds depend on (seed, counters, task, member).
    """
    low, high = temperature
    heat = [low + (high - low) * member / max(1, samples - 1) for member in range(samples)]
    rows = [
        Row(group, member, derive_seed(seed, "rollout", *counters, group, member), heat[member])
        for group in range(len(tasks))
        for member in range(samples)
    ]
    runs = [list(run) for _, run in itertools.groupby(rows, key=lambda row: tasks[row.group].lq.shape)]
    cuts = [tuple(run[start : start + batch]) for run in runs for start in range(0, len(run), batch)]
    return [
        Chunk(index, cut, {group: tasks[group] for group in dict.fromkeys(row.group for row in cut)})
        for index, cut in enumerate(cuts)
    ]


def combine(scored: Sequence[Scored], rubric: Rubric) -> RubricScores:
    """One table of all rows in order."""
    return rubric.combine({name: Scores.cat([part.scores[name] for part in scored]) for name in rubric.names})


def recorded_scores(tasks: Sequence[Task]) -> Tensor | None:
    """[N] what a manifest says of the tasks' recorded restorations, None if the rollouts are the policy's own."""
    if not any(task.recorded for task in tasks):
        return None
    return torch.tensor([item.score for task in tasks for item in task.recorded])


def as_judged(scores: RubricScores, recorded_N: Tensor | None) -> RubricScores:
    """The recorded verdict as the only utility, if there is one; rewards are then only logged."""
    if recorded_N is None:
        return scores
    utility_RN = recorded_N[None].float()
    return dataclasses.replace(
        scores, utility_RN=utility_RN, weight_R=torch.ones(1), floor_R=torch.zeros(1), required_R=torch.ones(1).bool(),
        normalise_R=(None,), valid_RN=utility_RN.isfinite(),
    )  # fmt: skip


def guard(
    scores: RubricScores, gates: Mapping[str, GateConfig], multipliers: Multipliers, levels: Levels, groups: int
) -> Gated:
    """Gates on the scores, and what hinges and priced constraints cost each rollout."""
    gated = apply_gates(gates, scores, levels, groups)
    priced_N = multipliers.penalty_N(scores)
    return dataclasses.replace(
        gated, penalty_N=gated.penalty_N + priced_N.nan_to_num(nan=0.0), known_N=gated.known_N & priced_N.isfinite()
    )


def assign_credit(
    scores: RubricScores,
    config: CreditConfig,
    groups: int,
    seed: int,
    iteration: int,
    history: RewardHistory | None = None,
    photos: Sequence[str] = (),
    gated: Gated | None = None,
) -> Credit:
    """Advantages and weights. With `config.shuffle` (a control) rewards are first permuted inside each group.

    `history` compares with what each of the G `photos` scored before, instead of inside the group. `gated` is what `guard` made of
    the scores.
    """
    n = len(scores.valid_N)
    gated = gated or apply_gates({}, scores, Levels(), groups)
    # a rollout that a gate or a constraint does not know is masked, also where its term is an optional reward
    known_RN = scores.valid_RN & gated.known_N
    order_N = torch.arange(n)
    if config.shuffle:
        order_N = _shuffle_inside_groups(n, groups, derive_seed(seed, "shuffle", iteration))
    # who is masked is a fact of the rollout, not of its reward: a row that failed stays masked
    utility_RN, valid_RN = gated.utility_RN[:, order_N], known_RN[:, order_N] & known_RN
    penalty_N, veto_N = gated.penalty_N[order_N], gated.veto_N[order_N]
    if history is not None:
        known_N = (valid_RN & (scores.weight_R[:, None] != 0)).any(0)
        valid_N = known_N & (valid_RN | ~scores.required_R[:, None]).all(0)
        mix_N = mixed(utility_RN, scores.weight_R, valid_RN, valid_N)
        return history.credit(photos, mix_N - penalty_N, config.clamp)
    return group_credit(
        utility_RN, scores.weight_R, valid_RN, scores.required_R, groups,
        # checked when the config was loaded
        normalise=config.normalise, baseline=config.baseline, rank=config.rank, fuse=config.fuse,  # type: ignore[arg-type]
        floor_R=scores.floor_R, clamp=config.clamp, min_valid=config.min_valid or None, min_spread=config.min_spread,
        normalise_R=scores.normalise_R, penalty_N=penalty_N, veto_N=veto_N,
        between=config.between,  # type: ignore[arg-type]
    )  # fmt: skip


def update_requests(
    chunks: Sequence[Chunk], credit: Credit, ranks: int, micro_batch: int, updates: int, seed: int, iteration: int
) -> list[UpdateRequest]:
    """Each rank's chunks with their credit, and the sum of weights of every optimiser step over all ranks."""
    sizes = [len(chunk.rows) for chunk in chunks]
    advantages, weights = credit.advantage_N.split(sizes), credit.weight_N.split(sizes)
    shares = deal(len(chunks), ranks)
    totals = [0.0] * updates
    for share in shares:
        for update, micro in enumerate(plan_updates([sizes[i] for i in share], micro_batch, updates)):
            totals[update] += sum(float(weights[share[position]][a:b].sum()) for position, a, b in micro)
    return [
        UpdateRequest(
            iteration,
            derive_seed(seed, "points", iteration),
            tuple(chunks[i] for i in share),
            tuple(advantages[i].clone() for i in share),
            tuple(weights[i].clone() for i in share),
            tuple(totals),
        )
        for share in shares
    ]


# -- what to log ---------------------------------------------------------------------------------------------------


def reward_metrics(scores: RubricScores, groups: int) -> dict[str, float]:
    """Raw value of every reward over its valid rows, its spread inside groups, its failures; and the mix."""
    metrics: dict[str, float] = {}
    for name, raw_N, valid_N in zip(scores.names, scores.raw_RN, scores.valid_RN, strict=True):
        metrics |= _distribution(f"reward/{name}", raw_N[valid_N])
        metrics[f"reward/failed_frac/{name}"] = 1 - float(valid_N.float().mean())
        metrics |= _group_spread(f"group/std/{name}", raw_N, valid_N, groups)
    metrics |= _distribution("reward/mix", scores.mix_N[scores.valid_N])
    metrics["group/valid_frac"] = float(scores.valid_N.float().mean())
    return metrics


def policy_metrics(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Means over all kept samples of all ranks, maxima, and the optimiser."""
    metrics: dict[str, float] = {}
    for name in reports[0].sums.keys() | {name for report in reports for name in report.sums}:
        total = sum(report.sums[name][1] for report in reports if name in report.sums)
        value = sum(report.sums[name][0] for report in reports if name in report.sums) / total
        metrics["train/loss" if name == "loss" else f"policy/{name}"] = value
    for name in {name for report in reports for name in report.maxima}:
        metrics[f"policy/{name}"] = max(report.maxima.get(name, 0.0) for report in reports)
    first = reports[0]
    if first.grad_norms:
        metrics["train/grad_norm"] = sum(first.grad_norms) / len(first.grad_norms)
        metrics["train/lr"] = first.lr
    metrics["train/skipped_steps"] = float(first.skipped_steps)
    return dict(sorted(metrics.items()))


def cost_metrics(images: Sequence[Images], reports: Sequence[UpdateReport], rollouts: int) -> dict[str, float]:
    """Evaluations of the network, of one rollout each (docs/algorithms.md, "Cost")."""
    rows = sum((Counter(report.rows) for report in reports), Counter())
    return {
        "cost/sample_forwards": sum(item.forwards for item in images) / rollouts,
        "cost/train_forwards": (rows["old"] + rows["reference"]) / rollouts,
        "cost/train_backwards": rows["current"] / rollouts,
    }


def _distribution(tag: str, values: Tensor) -> dict[str, float]:
    if len(values) == 0:
        return {}
    p10, p90 = values.quantile(torch.tensor([0.1, 0.9])).tolist()
    return {
        f"{tag}/mean": float(values.mean()), f"{tag}/std": float(values.std(correction=0)),
        f"{tag}/p10": p10, f"{tag}/p90": p90,
    }  # fmt: skip


def _group_spread(tag: str, raw_N: Tensor, valid_N: Tensor, groups: int) -> dict[str, float]:
    """Mean over groups of the population std of their valid members."""
    spreads = [
        raw[valid].std(correction=0)
        for raw, valid in zip(raw_N.reshape(groups, -1), valid_N.reshape(groups, -1), strict=True)
        if int(valid.sum()) >= 2
    ]
    return {tag: float(torch.stack(spreads).mean())} if spreads else {}


def _shuffle_inside_groups(count: int, groups: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = count // groups
    return torch.cat([group * size + torch.randperm(size, generator=generator) for group in range(groups)])
