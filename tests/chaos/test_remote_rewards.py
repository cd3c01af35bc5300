"""A run whose judge lives behind HTTP: what the server does wrong costs samples, is counted in result.json, and never 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.registry import build_reward
from rewards.rubric import RewardBudgetError
from tests.reward_server import TOKEN, Answer, our_server, scripted
from tests.tiny import tiny_config, train_tiny


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLRESTORE_JUDGE_TOKEN", TOKEN)


def options(url: str, budget: float, **params: Any) -> list[str]:
    values = {
        "url": url, "reward": "x", "higher_is_better": "false", "block": "fidelity", "scale": 0.005, "attempts": 2,
        "backoff_s": 0.01, "deadline_s": 5, "batch_size": 2, **params,
    }  # fmt: skip
    return [
        "rewards.low_frequency.kind=remote", *(f"rewards.low_frequency.params.{k}={v}" for k, v in values.items()),
        f"reward_budget.max_fraction={budget}", "reward_budget.min_scores=1", "run.steps=1",
    ]  # fmt: skip


def test_a_run_with_a_remote_reward_is_the_run_with_a_local_one(tmp_path: Path) -> None:
    with our_server({"x": build_reward("low_frequency")}) as (url, service):
        run, rows = train_tiny(tiny_config(tmp_path / "remote", "nft", options(url, 0.0)))
        assert service.counts.rows[("x", True)] >= 16
    other, wanted = train_tiny(tiny_config(tmp_path / "local", "nft", ["run.steps=1"]))
    result, local = (json.loads((path / "result.json").read_text()) for path in (run, other))
    assert result["metrics"] == local["metrics"] and rows.keys() == wanted.keys()
    assert result["reward_failures"]["low_frequency"] == {"failed": 0, "reasons": {}}


def test_a_server_that_fails_now_and_then_costs_samples_and_is_counted(tmp_path: Path) -> None:
    """Every fourth request is answered with 500, twice: its two rows are masked, the run goes on."""
    served = build_reward("low_frequency")
    spec = {
        "version": "1", "higher_is_better": False, "range": [0, 1], "needs": ["lq"], "block": "fidelity", "scale": 0.005,
    }  # fmt: skip
    bad: set[str] = set()
    kinds: list[bool] = []

    def script(path: str, body: Any, before: int) -> Answer:
        if body is None:
            return 200, json.dumps({"rewards": {"x": spec}}).encode()
        key = body["items"][0]["image"]
        if not kinds or key not in bad:
            kinds.append(len(kinds) % 4 == 1)
            bad.update({key} if kinds[-1] else ())
        if key in bad:
            return 500, b"{}"
        from rewards.remote.wire import decode_item, encode_rows

        scores = served.score([decode_item(row, 10**6) for row in body["items"]])
        rows = encode_rows([row["id"] for row in body["items"]], scores)
        return 200, json.dumps({"reward": "x", "version": "1", "rows": rows}).encode()

    with scripted(script) as server:
        run, _ = train_tiny(tiny_config(tmp_path, "nft", options(server.url, 1.0, concurrency=1)))
    first = next(r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["step"] == 1)
    told = json.loads((run / "result.json").read_text())["reward_failures"]["low_frequency"]
    assert told["failed"] > 0 and first["reward/failed_frac/low_frequency"] == told["failed"] / 16
    assert first["group/masked_samples"] == told["failed"]
    assert all("answers 500" in reason for reason in told["reasons"])
    assert first["train/grad_norm"] > 0


def test_a_server_that_dies_stops_the_run_by_its_budget(tmp_path: Path) -> None:
    with our_server({"x": build_reward("low_frequency")}) as (url, _):
        config = tiny_config(tmp_path, "nft", options(url, 0.05, deadline_s=1))
        from rlrestore.build import check_parts

        check_parts(config)
        build = build_reward("remote", config.rewards["low_frequency"].params)
    assert build.spec.version == "1"
    with pytest.MonkeyPatch.context() as patch:  # as if it had died after the start: the client is there already
        patch.setattr(
            "rlrestore.build.build_reward",
            lambda kind, params: build if kind == "remote" else build_reward(kind, params),
        )
        with pytest.raises(RewardBudgetError, match=r"reward 'low_frequency' failed on .*infra: ConnectionError"):
            train_tiny(config)
    assert not (tmp_path / "runs" / "tiny" / "result.json").exists()
