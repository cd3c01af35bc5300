"""`check_reward`: the conformance test that every reward must pass, ours and a third party's (rewards.md 1.2).

Raises AssertionError with the clause that failed and the numbers. It needs at least three restorations of one size, of
different scenes, with references (the direction probe is made from them) and whatever else the reward needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from envs.types import Restoration, Task
from rewards.base import Reward, Scores
from rewards.filters import gaussian_blur

BATCH_TOLERANCE = 1e-3  # of the spec's scale: batch of 1 against batch of n (kernels may sum in another order)


def check_reward(reward: Reward, items: Sequence[Restoration]) -> None:
    """All clauses; see the functions below."""
    assert len(items) >= 3, f"check_reward needs at least 3 restorations, got {len(items)}"
    assert len({tuple(i.image.shape) for i in items}) == 1, "check_reward needs images of one size"
    assert all(i.task.gt is not None for i in items), "check_reward needs references for its direction probe"
    scores = check_values(reward, items)
    check_unmodified(reward, items)
    if reward.spec.deterministic:
        check_batching(reward, items, scores)
    check_direction(reward, items)


def check_values(reward: Reward, items: Sequence[Restoration]) -> Scores:
    """One row an item; finite, or invalid with a reason; a NaN image is invalid and takes no other row with it."""
    scores = reward.score(items)
    assert scores.value_N.shape == (len(items),) and scores.value_N.dtype == torch.float32, "one float32 value an item"
    for value, valid, reason in zip(scores.value_N.tolist(), scores.valid_N.tolist(), scores.reason_N, strict=True):
        assert valid == (value == value), f"value {value} is marked valid={valid}"
        assert valid == (reason == ""), f"valid={valid} with reason {reason!r}"
    assert scores.valid_N.all(), f"{reward.spec.name} fails on good items: {scores.reason_N}"
    broken = replace(items[0], image=torch.full_like(items[0].image, float("nan")))
    with_broken = reward.score([broken, *items[1:]])
    assert not with_broken.valid_N[0], f"a NaN image scored {with_broken.value_N[0]:.4g} instead of being invalid"
    assert with_broken.valid_N[1:].all(), f"a NaN image spoilt its neighbours: {with_broken.reason_N}"
    assert reward.score([]).value_N.shape == (0,), "an empty batch gives empty scores"
    return scores


def check_unmodified(reward: Reward, items: Sequence[Restoration]) -> None:
    """Scoring leaves image, lq and gt as they were."""
    before = [(i.image.clone(), i.task.lq.clone(), i.task.gt.clone()) for i in items if i.task.gt is not None]
    reward.score(items)
    for (image, lq, gt), item in zip(before, items, strict=True):
        assert torch.equal(image, item.image), "the reward changed an image"
        assert torch.equal(lq, item.task.lq), "the reward changed an lq"
        assert item.task.gt is not None and torch.equal(gt, item.task.gt), "the reward changed a gt"


def check_batching(reward: Reward, items: Sequence[Restoration], scores: Scores) -> None:
    """Equal items score equally, permuting permutes, a batch of 1 is a batch of n; within `BATCH_TOLERANCE` scales."""
    tolerance = BATCH_TOLERANCE * reward.spec.scale
    order = [*list(range(1, len(items))), 0]
    permuted = reward.score([items[i] for i in order]).value_N
    single = torch.cat([reward.score([item]).value_N for item in items])
    twins = reward.score([items[0], items[1], items[0]]).value_N
    for name, other, wanted in (
        ("permuted batch", permuted, scores.value_N[order]),
        ("batches of 1", single, scores.value_N),
        ("identical items", twins[[0]], twins[[2]]),
        ("a second call", reward.score(items).value_N, scores.value_N),
    ):
        worst = float((other - wanted).abs().max())
        assert worst <= tolerance, f"{reward.spec.name}, {name}: differs by {worst:.3g}, allowed {tolerance:.3g}"


def check_direction(reward: Reward, items: Sequence[Restoration]) -> None:
    """Worse copies rank below better ones, on the mean over the items and for most of them.

    Quality: blurred (3 px) and noisy (25/255) copies of the reference rank below the reference. Fidelity: the next
    task's picture ranks below the own one (the reference, or the LQ itself if no reference is needed).
    """
    tasks = [item.task for item in items]
    by_reference = reward.spec.block == "quality" or "gt" in reward.spec.needs
    good = [Restoration(task, task.gt if by_reference and task.gt is not None else task.lq) for task in tasks]
    if reward.spec.block == "quality":
        probes = {
            "blurred": [replace(r, image=blurred(r)) for r in good],
            "noisy": [replace(r, image=noisy(r)) for r in good],
        }
    else:
        probes = {"swapped scene": [replace(r, image=good[(i + 1) % len(good)].image) for i, r in enumerate(good)]}
    sign = 1.0 if reward.spec.higher_is_better else -1.0
    best_N = sign * reward.score(good).value_N
    for name, worse in probes.items():
        worse_N = sign * reward.score(worse).value_N
        share = float((worse_N < best_N).float().mean())
        assert worse_N.nanmean() < best_N.nanmean() and share > 0.5, (
            f"{reward.spec.name} (higher_is_better={reward.spec.higher_is_better}): {name} pictures rank below the "
            f"good ones in only {share:.0%} of cases "
            f"(aligned means {float(worse_N.nanmean()):.4g} and {float(best_N.nanmean()):.4g})"
        )


def blurred(item: Restoration, sigma_px: float = 3.0) -> torch.Tensor:
    return (gaussian_blur(item.image[None], sigma_px)[0].clamp(0, 1) * 255).round() / 255


def noisy(item: Restoration, std: float = 25 / 255) -> torch.Tensor:
    noise = torch.randn(item.image.shape, generator=torch.Generator().manual_seed(0))
    return ((item.image + std * noise).clamp(0, 1) * 255).round() / 255


def task_of(gt: torch.Tensor, lq: torch.Tensor, name: str, types: tuple[str, ...] = ()) -> Task:
    """A task with a reference, for those who write conformance tests."""
    return Task(id=name, lq=lq, types=types, gt=gt)
