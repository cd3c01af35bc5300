"""The conformance test of envs: `check_env(env)` raises AssertionError with what is wrong. Run it on an env that you
wrote.
"""

from __future__ import annotations

import re

import torch

from envs.base import Env
from envs.types import Task


def check_env(env: Env, n: int = 6) -> None:
    """Draw some tasks in several ways and hold them to the contract of `envs.base.Env`."""
    first, again = env.draw(step=3, n=n), env.draw(step=3, n=n)
    assert len(first) == n, f"draw(3, {n}) gave {len(first)} tasks"
    assert _same(first, again), "the same draw gave other bytes the second time"
    assert _same(env.draw(step=3, n=n + 2)[:n], first), "a longer draw does not begin with the shorter one"
    env.draw(step=0, n=1)
    assert _same(env.draw(step=3, n=n), first), "drawing another step changed this one: draw must not keep state"
    other = env.draw(step=4, n=n)
    assert not _same(other, first), "two steps gave the same tasks"

    held_out = env.held_out(n)
    assert len(held_out) == n, f"held_out({n}) gave {len(held_out)} tasks"
    assert _same(env.held_out(n), held_out), "held_out gave other bytes the second time"
    assert _same(env.held_out(n - 2), held_out[: n - 2]), "a shorter held_out is not the beginning of the longer one"

    seen: dict[str, Task] = {}
    for task in [*first, *other, *held_out]:
        _check_task(task, env)
        if task.id in seen:
            assert _same([task], [seen[task.id]]), f"id {task.id} names two different tasks"
        seen[task.id] = task
    for tasks in (first, held_out):
        assert len({task.id for task in tasks}) == len(tasks), "two tasks of one draw share an id"
    train_photos = {photo_of(task) for step in range(8) for task in env.draw(step, n)}
    both = train_photos & {photo_of(task) for task in held_out}
    assert not both, f"photos in training and in held_out: {sorted(both)}"
    fingerprint = env.fingerprint()
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint), f"fingerprint is not a sha256 in hex: {fingerprint!r}"
    assert env.fingerprint() == fingerprint, "fingerprint changed between two calls"


def photo_of(task: Task) -> str:
    """The part of the id that names the photo: before the last '@' (place and hash follow it)."""
    return task.id.rsplit("@", 1)[0]


def _check_task(task: Task, env: Env) -> None:
    assert task.id.startswith(f"{env.name}/"), f"id {task.id!r} does not start with the env's name {env.name!r}"
    assert (task.gt is not None) == env.has_gt, (
        f"{task.id}: gt present is {task.gt is not None}, has_gt is {env.has_gt}"
    )
    for name, image in (("lq", task.lq), ("gt", task.gt)):
        if image is None:
            continue
        assert image.dtype == torch.float32, f"{task.id}: {name} is {image.dtype}"
        assert image.shape == (3, *image.shape[-2:]), f"{task.id}: {name} has shape {tuple(image.shape)}"
        assert image.shape == task.lq.shape, (
            f"{task.id}: {name} {tuple(image.shape)} differs from lq {tuple(task.lq.shape)}"
        )
        assert image.device.type == "cpu", f"{task.id}: {name} is on {image.device}"
        assert image.is_contiguous(), f"{task.id}: {name} is not contiguous"
        assert bool(torch.isfinite(image).all()), f"{task.id}: {name} is not finite"
        low, high = float(image.min()), float(image.max())
        assert max(-low, high - 1.0) <= 0.0, f"{task.id}: {name} ranges over [{low}, {high}]"
    assert isinstance(task.types, tuple), f"{task.id}: types is a {type(task.types).__name__}"
    assert all(isinstance(value, float) for value in task.record.values()), f"{task.id}: record holds more than floats"


def _same(left: list[Task], right: list[Task]) -> bool:
    return len(left) == len(right) and all(
        a.id == b.id
        and a.types == b.types
        and a.prompt == b.prompt
        and dict(a.record) == dict(b.record)
        and torch.equal(a.lq, b.lq)
        and (a.gt is None) == (b.gt is None)
        and (a.gt is None or b.gt is None or torch.equal(a.gt, b.gt))
        for a, b in zip(left, right, strict=True)
    )
