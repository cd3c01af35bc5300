"""Gates, constraints and the alarm in real runs: 32-pixel photographs, the whole `rlrestore train`.

What the alarm should do is planted: the loop, the checkpoints and the files are real, the held-out values get a curve added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlrestore.checkpoint import load_tensors
from rlrestore.cli import app
from rlrestore.crew import Crew, LocalCrew
from rlrestore.evaluation.evaluate import Evaluation, Measured
from rlrestore.reporting.log import read_metrics
from tests.tiny import write_tiny

USAGE = 64
GUARDS = [
    "gates={consistency: {margin: 0.0, limit: 0.02, acts_on: [ssim_rgb]}, low_frequency: {form: hinge, against: lq, price: 0.5}}",
    "constraints={gmsd: {tolerance: 0.001, step: 1.0}, dark: {kind: psnr_rgb, threshold: 18.0, bound: 0.3}}",
]


def run_cli(*arguments: object) -> int:
    try:
        app([str(argument) for argument in arguments])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


# -- gates and constraints ---------------------------------------------------------------------------------------------


def test_gates_and_constraints_are_measured_priced_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", write_tiny(tmp_path), *GUARDS) == 0
    run = tmp_path / "runs" / "tiny"
    records = read_metrics(run / "metrics.jsonl")
    for record in records[1:]:
        assert 0 <= record["gate/open/consistency"] <= 1
        assert record["gate/unknown_frac/consistency"] == record["gate/unknown_frac/low_frequency"] == 0
        assert record["cost/base_forwards"] == 2 * 4 / 4  # 2 samples of 4 steps a task, over 4 rollouts a task
        for name in ("gmsd", "dark"):
            assert f"constraint/measured/{name}" in record and record[f"constraint/lambda/{name}"] >= 0
    # lambda follows the violation that was logged with it
    first = records[1]
    expected = min(max(0.1 * first["constraint/violation/dark"], 0.0), 10.0)
    assert first["constraint/lambda/dark"] == pytest.approx(expected)
    result = result_of(run)
    roles = {name: row["role"] for name, row in result["metrics"].items()}
    assert roles == {
        "mix": "reward", "ssim_rgb": "reward", "low_frequency": "reward", "consistency": "gate", "gmsd": "constraint",
        "dark": "constraint", "psnr_rgb": "gold",
    }  # fmt: skip
    assert result["constraints"]["dark"]["kind"] == "rate" and result["constraints"]["gmsd"]["kind"] == "mean"
    assert result["constraints"]["gmsd"]["lambda"] == records[-1]["constraint/lambda/gmsd"]
    assert result["constraints"]["gmsd"]["bound"] == pytest.approx(result["constraints"]["gmsd"]["base"] + 0.001)
    assert "constraint gmsd: mean" in capsys.readouterr().out
    # the same table again, from the checkpoint
    before = result["constraints"]
    assert run_cli("evaluate", tmp_path / "tiny_nft.yaml", *GUARDS) == 0
    assert result_of(run)["constraints"] == before and result_of(run)["alarm"] == result["alarm"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["gates={consistency: {form: soft}}"], "gates.consistency: form 'soft'"),
        (["gates={consistency: {acts_on: [nss]}}"], "no reward of this run: ssim_rgb, low_frequency"),
        (["gates={consistency: {margn: 1}}"], "Did you mean 'margin'"),
        (["gates={consistency: {}}"], "gates.consistency: no reward is of the quality block"),
        (
            ["gates={ssim_rgb: {kind: gmsd, acts_on: [ssim_rgb]}}"],
            "gates.ssim_rgb.kind=gmsd and another term of that name has ssim_rgb",
        ),
        (["constraints={gmsd: {step: 0}}"], "constraints.gmsd: step=0"),
        (["constraints={gmsd: {weight: 2}}"], "constraints.gmsd.weight: unknown key"),
        (["rewards.ssim_rgb.normalise=cdf"], "normalise 'cdf'; it is one of gaussian_cdf"),
        (["rewards.ssim_rgb.normalise=min_max", "credit.rank=true"], "credit.rank=True"),
        (["alarm.action=panic"], "alarm.action=panic is unknown"),
        (["alarm.action=stop"], "evaluate.every=0"),
        (["alarm.action=stop", "evaluate.every=1"], "needs 6 held-out tasks or more and evaluate.tasks=2"),
        (
            ["alarm.action=stop", "evaluate.every=1", "evaluate.tasks=6", "evaluate.gold.psnr_rgb.kind=nss"],
            "nothing to watch",
        ),
        (["alarm.metrics=[ssim_rgb]"], "'ssim_rgb', which is not in evaluate.gold: psnr_rgb"),
        (["alarm.margins.ssim_rgb=0.1"], "'ssim_rgb', which the alarm does not watch: psnr_rgb"),
        (["alarm.margins.psnr_rgb=-0.1"], "alarm.margins.psnr_rgb=-0.1 must be finite and >= 0"),
        (["rollout.base_samples=0"], "rollout.base_samples=0"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    (tmp_path / "weights").mkdir()  # never opened: the config is refused before
    assert run_cli("train", write_tiny(tmp_path), *overrides) == USAGE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_gradient_method_has_no_place_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").mkdir()
    assert run_cli("train", write_tiny(tmp_path, "draft"), "constraints={gmsd: {}}") == USAGE
    assert "climbs the gradient of the mix and constraints.gmsd cannot be part of it" in capsys.readouterr().err


# -- the alarm ---------------------------------------------------------------------------------------------------------

STEPS = ["run.steps=6", "evaluate.every=2", "checkpoint.every=2", "evaluate.tasks=6"]
HACK = {2: (0.3, 0.5), 4: (1.0, -3.0), 6: (2.0, -6.0)}  # step -> what is added to the held-out mix, and to gold


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[int, tuple[float, float]]], None]:
    """The tuned weights of an evaluation after n updates get the n-th point of a curve added to the base's values."""
    measure, update, load = Evaluation.measure, LocalCrew.update, LocalCrew.load
    done = {"n": 0}  # updates behind the weights that are in the crew
    base: dict[str, Measured] = {}

    def counted(crew: LocalCrew, *arguments: Any) -> Any:
        done["n"] += 1
        return update(crew, *arguments)

    def loaded(crew: LocalCrew, folder: Path) -> None:
        done["n"] = int(folder.name.removeprefix("step_"))
        load(crew, folder)

    def plant(curve: Mapping[int, tuple[float, float]]) -> None:
        def bent(evaluation: Evaluation, crew: Crew, which: str) -> Measured:
            values = measure(evaluation, crew, which)
            if which == "base":
                base["values"] = values
                return values
            mix, gold = curve.get(done["n"], (0.0, 0.0))
            bent_values = {name: value.clone() for name, value in base["values"].values.items()}
            bent_values["mix"] += mix
            bent_values["psnr_rgb"] += gold
            return Measured(bent_values, values.pictures)

        monkeypatch.setattr(Evaluation, "measure", bent)

    monkeypatch.setattr(LocalCrew, "update", counted)
    monkeypatch.setattr(LocalCrew, "load", loaded)
    return plant


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step_"))


def test_it_warns_in_the_log_in_tensorboard_at_the_end_and_in_the_result(
    tmp_path: Path, planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    planted(HACK)
    assert run_cli("train", write_tiny(tmp_path), *STEPS) == 0
    said = capsys.readouterr()
    run = tmp_path / "runs" / "tiny"
    assert "ALARM at step 4" in said.err and "psnr_rgb" in said.err
    assert "ALARM: the mix rose while gold metrics fell, at 2 evaluation(s)" in said.out
    result = result_of(run)
    assert result["alarm"]["fired"] and [event["step"] for event in result["alarm"]["events"]] == [4, 6]
    assert result["images"] == 6 * 4 * 4 and checkpoints(run)[-1] == "step_000006"  # a warning changes nothing
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    assert [event.value for event in board.Scalars("alarm/fired")] == [0, 1, 1]
    assert any("alarm" in tag for tag in board.Tags()["tensors"])
    assert [r["alarm/ringing"] for r in read_metrics(run / "metrics.jsonl") if "alarm/ringing" in r] == [0, 1, 1]


def test_it_keeps_silent_when_gold_rises_too(
    tmp_path: Path, planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    planted({step: (mix, abs(gold)) for step, (mix, gold) in HACK.items()})
    assert run_cli("train", write_tiny(tmp_path), *STEPS, "alarm.action=stop") == 0
    said = capsys.readouterr()
    assert "ALARM" not in said.err + said.out
    alarm = result_of(tmp_path / "runs" / "tiny")["alarm"]
    assert not alarm["fired"] and alarm["events"] == [] and alarm["stopped_at"] is None


def test_it_stops_the_run_and_the_same_command_does_not_go_on(
    tmp_path: Path, planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    planted(HACK)
    config = write_tiny(tmp_path)
    assert run_cli("train", config, *STEPS, "alarm.action=stop") == 0
    run = tmp_path / "runs" / "tiny"
    result = result_of(run)
    assert result["alarm"]["stopped_at"] == 4 and result["images"] == 4 * 4 * 4
    assert checkpoints(run)[-1] == "step_000004"
    log = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run_cli("train", config, *STEPS, "alarm.action=stop") == 0
    assert "its alarm ended it at step 4" in capsys.readouterr().out and (run / "metrics.jsonl").read_bytes() == log
    # a person may overrule it
    assert run_cli("train", config, *STEPS, "alarm.action=warn") == 0
    assert result_of(run)["images"] == 6 * 4 * 4 and checkpoints(run)[-1] == "step_000006"


def test_it_returns_to_the_best_checkpoint(
    tmp_path: Path, planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    planted(HACK)
    config = write_tiny(tmp_path)
    options = [*STEPS, "checkpoint.keep=1", "alarm.action=rollback"]
    assert run_cli("train", config, *options) == 0
    run = tmp_path / "runs" / "tiny"
    result = result_of(run)
    assert result["alarm"]["returned_to"] == 2 and result["images"] == 2 * 4 * 4
    assert checkpoints(run) == ["step_000002"]  # kept for that, though checkpoint.keep is 1; the later one is set aside
    assert list((run / "checkpoints").glob("aside_step_000004*"))
    assert result["metrics"]["psnr_rgb"]["delta"] == pytest.approx(0.5)  # measured with the weights of step 2
    assert "went back to step 2" in capsys.readouterr().out
    assert run_cli("train", config, *options) == 0
    assert "its alarm ended it at step 2" in capsys.readouterr().out


def test_it_returns_to_the_base_when_the_first_evaluation_rings(tmp_path: Path, planted: Callable[..., None]) -> None:
    planted({2: (1.0, -3.0)})
    assert run_cli("train", write_tiny(tmp_path), *STEPS, "alarm.action=rollback") == 0
    run = tmp_path / "runs" / "tiny"
    assert result_of(run)["alarm"]["returned_to"] == 0 and checkpoints(run) == ["step_000000"]
    tensors = [load_tensors(run / "checkpoints" / "step_000000" / f"{name}.safetensors") for name in ("base", "ema")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.slow
def test_a_no_reference_metric_alone_is_gamed_and_the_alarm_says_so(root: Path, tmp_path: Path) -> None:
    """`configs/hacking/alone.yaml` with half the iterations: the real thing, nothing planted. About three minutes."""
    options = [f"run.dir={tmp_path}", "run.name=alone", "run.steps=12"]
    assert run_cli("train", root / "configs" / "hacking" / "alone.yaml", *options) == 0
    result = result_of(tmp_path / "alone")
    assert result["metrics"]["niqe"]["ci95"][1] < 0  # better
    assert result["metrics"]["psnr_rgb"]["ci95"][1] < 0  # worse
    assert result["alarm"]["fired"]
