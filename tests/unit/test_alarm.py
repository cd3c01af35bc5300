"""The alarm on planted curves: it rings when the mix rises while gold falls, and not otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rewards.base import RewardSpec
from rewards.rubric import Rubric, TermConfig
from rlrestore.config.sections import AlarmConfig
from rlrestore.evaluation.alarm import MIN_TASKS, Alarm, alarm_lines, game

TASKS, SAMPLES = 24, 2


def spec(name: str, block: str, up: bool) -> RewardSpec:
    return RewardSpec(name, "1", up, (None, None), frozenset(), block, 1.0, False, True, "own code")  # type: ignore[arg-type]


SPECS = [
    spec("q", "quality", True),
    spec("psnr", "fidelity", True),
    spec("gmsd", "fidelity", False),
    spec("nr", "quality", True),
]
RUBRIC = Rubric([TermConfig("q"), *(TermConfig(s.name, role="gold") for s in SPECS[1:])], specs=SPECS)


def measured(seed: int = 0, **means: float) -> dict[str, Tensor]:
    """Tasks that differ much (std 3) around a mean each, and noise of std .3 that belongs to the evaluation."""
    tasks = torch.Generator().manual_seed(99)
    noise = torch.Generator().manual_seed(seed)
    values = {}
    for name in ("mix", "psnr", "gmsd", "nr"):
        level = 3 * torch.randn(TASKS, 1, generator=tasks)
        values[name] = means.get(name, 0.0) + level + 0.3 * torch.randn(TASKS, SAMPLES, generator=noise)
    return values


BASE = measured()


def run(curve: Sequence[dict[str, float]], **config: object) -> tuple[Alarm, list[int]]:
    """Evaluations at 10, 20, ...; (the alarm, steps at which it fired)."""
    alarm = Alarm(AlarmConfig(**config), RUBRIC)  # type: ignore[arg-type]
    fired = []
    for index, means in enumerate(curve, 1):
        if alarm.judge(10 * index, BASE, measured(index, **means)).fires:
            fired.append(10 * index)
    return alarm, fired


HACK = [{"mix": 0.5}, {"mix": 1.0, "psnr": -0.8}, {"mix": 1.5, "psnr": -1.5}]
HONEST = [{"mix": 0.5, "psnr": 0.3}, {"mix": 1.0, "psnr": 0.6}, {"mix": 1.2, "psnr": 0.7, "gmsd": -0.5}]


def test_it_rings_when_the_mix_rises_and_gold_falls() -> None:
    alarm, fired = run(HACK)
    assert fired == [20, 30]
    assert list(alarm.fired[0].falls) == ["psnr"] and alarm.fired[0].falls["psnr"].ci[1] < 0
    assert alarm.fired[0].mix_ci[0] > 0
    assert "psnr" in alarm.fired[0].text and "the base" in alarm.fired[0].text
    assert alarm.best_step == 10  # the last silent one


def test_lower_is_better_falls_upward() -> None:
    assert run([{"mix": 1.0, "gmsd": 0.8}])[1] == [10]
    assert run([{"mix": 1.0, "gmsd": -0.8}])[1] == []


@pytest.mark.parametrize(
    "curve",
    [
        HONEST,
        [{"mix": -1.0, "psnr": -1.0}],  # worse all over: bad, but nothing is gamed
        [{"mix": 0.0, "psnr": -1.0}],
        [{"mix": 1.0, "nr": -2.0}],  # a no-reference gold metric is not of the fidelity block
        [{"mix": 1.0}] * 5,  # gold stands still
    ],
)
def test_it_keeps_silent_otherwise(curve: list[dict[str, float]]) -> None:
    assert run(curve)[1] == []


def test_false_alarms_are_as_rare_as_the_level_says() -> None:
    """Gold that only scatters, two watched metrics: 200 evaluations ring for about 2.5 % (one side of a shared 95 %)."""
    rings = sum(
        game(10, 0, measured(2 * s + 1000), measured(2 * s + 1001, mix=1.0), {"psnr": True, "gmsd": False}) is not None
        for s in range(200)
    )
    assert rings <= 14  # 7 %: a bootstrap over 24 tasks is a little too narrow


def test_it_sees_a_fall_from_what_was_gained_before() -> None:
    """Gold first rises by 1.5 and then loses .9 of it: still above the base, and already on its way down."""
    alarm, fired = run([{"mix": 0.5, "psnr": 1.5}, {"mix": 1.0, "psnr": 0.6}])
    assert fired == [20] and alarm.fired[0].since == 10


def test_patience_and_chosen_metrics() -> None:
    assert run(HACK, patience=2)[1] == [30]
    assert run(HACK, metrics=("gmsd",))[1] == []
    assert run([{"mix": 1.0, "nr": -2.0}], metrics=("nr",))[1] == [10]
    assert run(HACK, action="off")[1] == []
    silence_between = [HACK[1], {"mix": 1.0}, HACK[2]]
    assert run(silence_between, patience=2)[1] == []


def test_a_margin_lets_small_falls_pass_and_no_large_ones() -> None:
    """The whole interval has to lie beyond it, in the direction that is worse for the metric."""
    assert run(HACK, margins={"psnr": 0.2})[1] == [20, 30]  # it fell by 0.8 and 1.5, give or take 0.1
    assert run(HACK, margins={"psnr": 1.1})[1] == [30]
    assert run(HACK, margins={"psnr": 0.75})[1] == [30]  # 0.8 is beyond it, its interval is not
    assert run(HACK, margins={"gmsd": 5.0})[1] == [20, 30]  # of another metric
    assert run([{"mix": 1.0, "gmsd": 0.8}], margins={"gmsd": 0.2})[1] == [10]
    assert run([{"mix": 1.0, "gmsd": 0.8}], margins={"gmsd": 1.1})[1] == []


def test_a_margin_holds_against_the_best_evaluation_too() -> None:
    curve = [{"mix": 0.5, "psnr": 1.5}, {"mix": 1.0, "psnr": 0.6}]
    assert run(curve, margins={"psnr": 0.3})[1] == [20]
    assert run(curve, margins={"psnr": 1.2})[1] == []


def test_what_failed_is_left_out() -> None:
    now = measured(1, mix=1.0, psnr=-1.0)
    now["psnr"][: TASKS - MIN_TASKS] = math.nan
    assert game(10, 0, BASE, now, {"psnr": True}) is not None  # six tasks are left, all far below
    now["psnr"][TASKS - MIN_TASKS] = math.nan
    assert game(10, 0, BASE, now, {"psnr": True}) is None  # five of five is chance
    now["mix"][:] = math.nan
    assert game(10, 0, BASE, now, {"psnr": True}) is None


@pytest.mark.parametrize("cut", [1, 2])
def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(cut: int) -> None:
    curve = [{"mix": 0.5, "psnr": 1.5}, {"mix": 1.0, "psnr": 0.6}, {"mix": 2.0, "psnr": 0.5}]
    straight, _ = run(curve, patience=2)
    first, _ = run(curve[:cut], patience=2)
    second = Alarm(AlarmConfig(patience=2), RUBRIC)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for index in range(cut, len(curve)):
        second.judge(10 * (index + 1), BASE, measured(index + 1, **curve[index]))
    assert second.state_dict() == straight.state_dict() and second.fired == straight.fired != []


def test_failed_scores_survive_a_checkpoint() -> None:
    alarm = Alarm(AlarmConfig(), RUBRIC)
    now = measured(1, mix=1.0)
    now["psnr"][0, 0] = math.nan
    assert alarm.judge(10, BASE, now).is_best
    again = Alarm(AlarmConfig(), RUBRIC)
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict(), allow_nan=False)))
    assert again.state_dict() == alarm.state_dict()
    assert again.judge(20, BASE, measured(2, mix=2.0, psnr=-1.0)).fires


def test_what_is_said_at_the_end() -> None:
    alarm, _ = run(HACK, action="rollback")
    alarm.returned_to = 10
    result = json.loads(json.dumps(alarm.result(), allow_nan=False))
    assert (
        result["fired"] and result["watched"] == ["psnr", "gmsd"] and [e["step"] for e in result["events"]] == [20, 30]
    )
    lines = alarm_lines(result)
    assert len(lines) == 3 and "went back to step 10" in lines[-1] and alarm.ends_run
    assert alarm_lines(run(HONEST)[0].result()) == [] == alarm_lines(None)
