"""Rollouts of an iteration in which every group teaches something, as far as that can be had.

Groups that credit drops (spread below `credit.min_spread`, too few valid scores) are replaced by groups of tasks that the env has
not drawn yet, up to `rollout.refill` times; what is dropped then stays dropped. (DAPO, arXiv 2503.14476, "dynamic sampling".) A
micro-batch is a slice of what was sampled together, so a replaced group's chunk is sampled whole again, the other groups of it
as before: `rollout.batch` = `rollout.samples` spares that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from envs.types import Task
from rewards.gates import Gated, Levels
from rewards.rubric import RubricScores
from rlrestore.crew import Scored
from rlrestore.iteration.credit import Credit
from rlrestore.types import Chunk, Images


@dataclass(frozen=True)
class Judged:
    """What is thought of all rollouts of an iteration."""

    scores: RubricScores
    credit: Credit
    gated: Gated
    levels: Levels


@dataclass(frozen=True)
class Gathered(Judged):
    """What an iteration trains on."""

    tasks: list[Task]  # G
    chunks: list[Chunk]
    rollouts: list[Scored]  # one a chunk
    images: list[Images]  # of all that was sampled, the replaced too
    replaced: int  # groups


def gather(
    tasks: Sequence[Task],
    chunks: Sequence[Chunk],
    rounds: int,
    roll_out: Callable[[Sequence[Chunk], int], list[Scored]],
    judge: Callable[[Sequence[Task], Sequence[Scored]], Judged],
    more_tasks: Callable[[int, int], Sequence[Task]],
    forget: Callable[[Sequence[Task], RubricScores, Sequence[int]], None],
) -> Gathered:
    """Roll out `chunks`, then replace dropped groups at most `rounds` times.

    roll_out(chunks, of) samples and scores; `of` is 0 for the whole iteration, else the number of its chunks, of which the given ones
    take their places. judge gives scores and credit of them all; more_tasks(n, skip) n tasks after the first `skip` that are not in
    `tasks`; forget is told which groups were dropped before their scores are gone.
    """
    tasks, chunks = list(tasks), list(chunks)
    rollouts = roll_out(chunks, 0)
    images, drawn = [part.images for part in rollouts], 0
    for turn in range(rounds + 1):
        judged = judge(tasks, rollouts)
        dropped = judged.credit.dropped(len(tasks))
        if not dropped or turn == rounds:
            break
        forget(tasks, judged.scores, dropped)
        for group, task in zip(dropped, more_tasks(len(dropped), drawn), strict=True):
            tasks[group] = task
        drawn += len(dropped)
        changed = [_with_tasks(chunk, tasks) for chunk in chunks if set(dropped) & set(chunk.groups)]
        for part in roll_out(changed, len(chunks)):
            chunks[part.chunk.index], rollouts[part.chunk.index] = part.chunk, part
            images.append(part.images)
    return Gathered(**vars(judged), tasks=tasks, chunks=chunks, rollouts=rollouts, images=images, replaced=drawn)


def _with_tasks(chunk: Chunk, tasks: Sequence[Task]) -> Chunk:
    """The same rows and noise on what its groups' tasks are now."""
    return replace(chunk, tasks={group: tasks[group] for group in chunk.groups})
