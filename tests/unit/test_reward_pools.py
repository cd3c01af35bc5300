"""Which workers score which term: pure data, and the routing of chunks, with plain objects in Ray's place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rewards.base import Scores
from rlrestore.actors.rewards import RewardPools
from rlrestore.build import load_train_config
from rlrestore.config.files import ConfigError, dump
from rlrestore.config.sections import PlacementConfig, RewardPoolConfig
from rlrestore.placement import pools, split_terms, total
from tests.tiny import write_tiny


def placement(**pools: RewardPoolConfig) -> PlacementConfig:
    return PlacementConfig(kind="colocated", reward_pools=pools)


def test_terms_are_split_and_every_pool_gets_its_resources() -> None:
    config = placement(judge=RewardPoolConfig(["ll_score", "ll_score_hallucination"], workers=2, cpus=2, gpus=0.5))
    assert split_terms(["nss", "ll_score", "ll_score_hallucination"], config) == {
        "reward workers": ["nss"], "reward workers (judge)": ["ll_score", "ll_score_hallucination"],
    }  # fmt: skip
    # a trainer, a reward worker and two judges: 1 + 1 + 2 x 2 CPUs, 2 x 0.5 GPUs
    assert total(pools(config)) == {"CPU": 6.0, "GPU": 1.0}
    assert split_terms(["nss"], placement()) == {"reward workers": ["nss"]}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"a": RewardPoolConfig(["x"])}, "names the term 'x'; this run has nss"),
        ({"a": RewardPoolConfig(["nss"]), "b": RewardPoolConfig(["nss"])}, "has the term 'nss' in two places"),
    ],
)
def test_terms_in_no_run_or_in_two_pools_are_refused(made: dict[str, RewardPoolConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_terms(["nss"], placement(**made))


def test_a_config_names_pools(tmp_path: Path) -> None:
    file = write_tiny(tmp_path)
    options = [
        "placement.kind=colocated",
        "placement.reward_pools.slow.terms=[ssim_rgb]",
        "placement.reward_pools.slow.workers=3",
    ]
    config = load_train_config(file, options)
    assert config.placement.reward_pools["slow"].workers == 3 and "workers: 3" in dump(config)
    for bad in ("workers=0", "terms=[nss]", "gpus=1.5"):
        with pytest.raises(ConfigError, match=r"reward_pools"):
            load_train_config(file, [*options, f"placement.reward_pools.slow.{bad}"])


class Plain:
    """A pool without processes: what was asked of it, and scores that say by whom."""

    def __init__(self, value: float, terms: list[str], workers: int) -> None:
        self.value, self.terms, self.workers = value, dict.fromkeys(terms), [object()] * workers
        self.ready, self.replaced, self.jobs = [value], 0, {}  # type: ignore[var-annotated]

    def submit(self, key: int, chunk: Any, chunk_ref: Any, images_ref: Any, names: list[str]) -> None:
        self.jobs[key] = names

    def collect(self, key: int) -> dict[str, Scores]:
        return {n: Scores(torch.tensor([self.value]), torch.tensor([True]), ("",)) for n in self.jobs.pop(key)}


def test_a_chunk_goes_to_the_pools_of_its_terms() -> None:
    fast, slow = Plain(1.0, ["nss", "niqe"], 2), Plain(2.0, ["judge"], 3)
    both = RewardPools({"fast": fast, "slow": slow})  # type: ignore[dict-item]
    assert both.cycle == 6 and len(both.workers) == 5 and both.ready == [1.0, 2.0]
    both.submit(0, SimpleNamespace(), None, None, ["judge", "nss"])  # type: ignore[arg-type]
    both.submit(1, SimpleNamespace(), None, None, ["niqe"])  # type: ignore[arg-type]
    assert fast.jobs == {0: ["nss"], 1: ["niqe"]} and slow.jobs == {0: ["judge"]}
    scores = both.collect(0)
    assert list(scores) == ["judge", "nss"] and [float(s.value_N) for s in scores.values()] == [2.0, 1.0]
    assert list(both.collect(1)) == ["niqe"] and not fast.jobs and not slow.jobs and not both.asked
