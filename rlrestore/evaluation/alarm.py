"""The alarm: held-out gold metrics fall, beyond noise, while the mix that is optimised rises. Then the run is gaming its mix.

Gold metrics are never rewarded, gated or constrained. At every evaluation the weights are compared, task by task and at equal noise,
with two references: the base, and the best evaluation so far (a run may first gain what it then loses). The alarm rings
against a reference if the mix has risen and a watched metric has fallen, each with a bootstrap interval that excludes 0. The
level is shared by the watched metrics (Bonferroni), so that many of them do not make a false alarm likely. It does not correct
for the number of evaluations: `patience` asks for the same in several of them in a row. At equal noise a few photos tell a loss of
0.03 dB from none; with a `margin` (of non-inferiority, raw units) the whole interval of a fall has to lie beyond it.

The best evaluation is the one with the highest mix among those that were silent; before any, it is the base. What has to be
remembered for that (per-task values of one evaluation) is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards.base import RewardSpec
from rewards.rubric import Rubric
from rlrestore.config.sections import AlarmConfig
from rlrestore.evaluation.statistics import Interval, bootstrap_ci

BASE = 0  # the step of the base
MIN_TASKS = 6  # fewer agree on a sign by chance: 2 of 2 do it every other time, 6 of 6 once in 32


@dataclass(frozen=True)
class Fall:
    """A gold metric that fell, in its raw unit."""

    delta: float  # now - then
    ci: tuple[float, float]  # at the shared level


@dataclass(frozen=True)
class Ring:
    """One evaluation at which the mix had risen and gold had fallen."""

    step: int
    since: int  # the step of the evaluation that it is compared with; 0 is the base
    mix_delta: float
    mix_ci: tuple[float, float]
    falls: dict[str, Fall]

    @property
    def text(self) -> str:
        falls = ", ".join(
            f"{name} {fall.delta:+.4g} [{fall.ci[0]:+.4g}, {fall.ci[1]:+.4g}]" for name, fall in self.falls.items()
        )
        since = "the base" if self.since == BASE else f"step {self.since}"
        return (
            f"since {since} the mix rose by {self.mix_delta:+.4g} [{self.mix_ci[0]:+.4g}, {self.mix_ci[1]:+.4g}] while gold "
            f"fell: {falls}. The mix is being gamed: look at the samples, then add a fidelity term, a gate or a constraint "
            "(docs/reward_hacking.md)"
        )


@dataclass(frozen=True)
class Verdict:
    """What the alarm says of one evaluation."""

    ring: Ring | None  # None: silent
    fires: bool  # it rang at `patience` evaluations in a row
    is_best: bool  # silent, and the highest mix so far


@dataclass(frozen=True)
class _Best:
    step: int
    mix: float
    values: dict[str, Tensor]  # metric -> [tasks, samples]


@dataclass
class Alarm:
    """Judges evaluations in order. `action` is the caller's to carry out."""

    config: AlarmConfig
    rubric: Rubric  # with gold terms
    fired: list[Ring] = field(default_factory=list)
    stopped_at: int | None = None  # the step at which it ended the run
    returned_to: int | None = None  # or that of the checkpoint that the run ended with
    _streak: int = 0
    _best: _Best | None = None

    @property
    def watched(self) -> dict[str, bool]:
        """Gold metric -> higher is better."""
        gold = {
            name: spec
            for name, term, spec in zip(self.rubric.names, self.rubric.terms, self.rubric.specs, strict=True)
            if term.role == "gold"
        }
        return {name: gold[name].higher_is_better for name in watched_metrics(self.config, gold)}

    @property
    def best_step(self) -> int:
        return self._best.step if self._best else BASE

    @property
    def ends_run(self) -> bool:
        """It fired, and by config that ends the run."""
        return bool(self.fired) and self.config.action in ("rollback", "stop")

    def judge(self, step: int, base: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Verdict:
        """Values [tasks, samples] by metric, "mix" included, of the base and of the weights at `step`."""
        if self.config.action == "off" or not self.watched:
            return Verdict(None, False, False)
        ring = game(step, BASE, base, now, self.watched, self.config.level, self.config.margins)
        if ring is None and self._best is not None:
            best = self._best
            ring = game(step, best.step, best.values, now, self.watched, self.config.level, self.config.margins)
        self._streak = 0 if ring is None else self._streak + 1
        fires = ring is not None and self._streak >= self.config.patience
        if ring is not None and fires:
            self.fired.append(ring)
        mix = mean_of(now["mix"])
        reference = self._best.mix if self._best else mean_of(base["mix"])
        is_best = ring is None and mix > reference
        if is_best:
            self._best = _Best(step, mix, {name: now[name] for name in ("mix", *self.watched)})
        return Verdict(ring, fires, is_best)

    def result(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "action": self.config.action,
            "watched": list(self.watched),
            "fired": bool(self.fired),
            "events": [asdict(ring) for ring in self.fired],
            "stopped_at": self.stopped_at,
            "returned_to": self.returned_to,
        }

    def state_dict(self) -> dict[str, Any]:
        best = self._best
        return {
            "fired": [asdict(ring) for ring in self.fired],
            "streak": self._streak,
            "best": best
            and {"step": best.step, "mix": best.mix, "values": {n: _rows(v) for n, v in best.values.items()}},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fired = [_ring(ring) for ring in state["fired"]]
        self._streak, best = state["streak"], state["best"]
        self._best = best and _Best(best["step"], best["mix"], {n: _tensor(rows) for n, rows in best["values"].items()})


def watched_metrics(config: AlarmConfig, gold: Mapping[str, RewardSpec]) -> list[str]:
    """Those that the config names, or every gold metric of the fidelity block."""
    return list(config.metrics) or [name for name, spec in gold.items() if spec.block == "fidelity"]


def alarm_lines(result: Mapping[str, Any] | None) -> list[str]:
    """What to say at the end of a run, from its `result.json`; nothing if the alarm kept silent."""
    if not result or not result["fired"]:
        return []
    how = ""
    if result["returned_to"] is not None:
        how = f"; the run went back to step {result['returned_to']}"
    elif result["stopped_at"] is not None:
        how = f"; the run stopped at step {result['stopped_at']}"
    return [f"ALARM at step {event['step']}: {_ring(event).text}" for event in result["events"]] + [
        f"ALARM: the mix rose while gold metrics fell, at {len(result['events'])} evaluation(s){how}"
    ]


def game(
    step: int,
    since: int,
    then: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
    watched: Mapping[str, bool],
    level: float = 0.95,
    margins: Mapping[str, float] | None = None,
) -> Ring | None:
    """The ring of `now` against `then`, or None: the mix rose and at least one watched metric fell, beyond noise and its margin."""
    mix = difference(then["mix"], now["mix"], level)
    if mix is None or not mix.low > 0:
        return None
    shared = 1 - (1 - level) / max(1, len(watched))
    falls = {}
    for name, higher_is_better in watched.items():
        moved = difference(then[name], now[name], shared)
        margin = (margins or {}).get(name, 0.0)
        if moved is not None and (moved.high < -margin if higher_is_better else moved.low > margin):
            falls[name] = Fall(moved.mean, (moved.low, moved.high))
    return Ring(step, since, mix.mean, (mix.low, mix.high), falls) if falls else None


def difference(then: Tensor, now: Tensor, level: float) -> Interval | None:
    """now - then over the (task, sample) pairs that both know; None if those are of fewer than `MIN_TASKS`."""
    delta = (now - then).double()
    return bootstrap_ci(delta.numpy(), level) if int(delta.isfinite().any(1).sum()) >= MIN_TASKS else None


def mean_of(values: Tensor) -> float:
    """Over known ones; -inf if there are none."""
    known = values[values.isfinite()]
    return float(known.double().mean()) if len(known) else -math.inf


def _rows(values: Tensor) -> list[list[float | None]]:
    """JSON has no NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]


def _tensor(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows])


def _ring(saved: Mapping[str, Any]) -> Ring:
    falls = {name: Fall(fall["delta"], tuple(fall["ci"])) for name, fall in saved["falls"].items()}
    return Ring(saved["step"], saved["since"], saved["mix_delta"], tuple(saved["mix_ci"]), falls)
