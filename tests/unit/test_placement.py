"""Where the processes of a run go, on nodes that are only described."""

from __future__ import annotations

import pytest

from rlrestore.config.files import ConfigError
from rlrestore.config.sections import PlacementConfig
from rlrestore.placement import (
    Node,
    PlacementError,
    amounts,
    assign,
    check_placement,
    lacking,
    parse_nodes,
    pools,
    total,
)


def test_pools_hold_what_the_placement_asks_for() -> None:
    config = PlacementConfig("separate", 8, 4, 2, gpus=True, rollout_gpus=0.5, reward_gpus=0.25, rank_cpus=4)
    trainers, rollouts, rewards = pools(config)
    assert trainers.each == {"CPU": 4, "GPU": 1} and trainers.strategy == "PACK" and trainers.count == 8
    assert rollouts.each == {"CPU": 1, "GPU": 0.5} and rollouts.strategy == "SPREAD"
    assert rewards.total == {"CPU": 2, "GPU": 0.5}
    assert total(pools(config)) == {"CPU": 8 * 4 + 4 + 2, "GPU": 8 + 2 + 0.5}
    assert [pool.name for pool in pools(PlacementConfig("colocated", 2))] == ["trainer ranks", "reward workers"]


def test_ranks_are_packed_and_workers_spread_over_unequal_nodes() -> None:
    """8 GPUs on one node, 4 on two others: 10 ranks fill the large one, then 2 go to the next. Rollouts then see
    4, 2 and 0 free GPUs at half a GPU each: they alternate between the nodes that have any. Rewards go everywhere."""
    nodes = parse_nodes("2x32c4g,64c8g")
    placed = assign(
        pools(PlacementConfig("separate", ranks=10, rollout_actors=4, reward_workers=3, gpus=True, rollout_gpus=0.5)),
        nodes,
    )
    assert placed["trainer ranks"] == ["node2"] * 8 + ["node0"] * 2
    assert sorted(placed["rollout actors"]) == ["node0", "node0", "node1", "node1"]
    assert sorted(placed["reward workers"]) == ["node0", "node1", "node2"]


def test_what_is_lacking_is_named() -> None:
    nodes = parse_nodes("2x8c2g")
    four, eight = (pools(PlacementConfig("colocated", ranks=n, gpus=True)) for n in (4, 8))
    assert lacking(four, nodes) is None
    assert lacking(eight, nodes) == "4 GPU too few for 4 of 8 trainer ranks"
    wide = pools(PlacementConfig("colocated", ranks=1, rank_cpus=12))
    assert lacking(wide, nodes) == "1 of 1 trainer ranks fit on no node: each needs 12 CPU in one place"
    with pytest.raises(PlacementError, match="10 CPU too few for 10 of 26 reward workers"):
        assign(pools(PlacementConfig("colocated", ranks=0, reward_workers=26)), nodes)


def test_fractions_fill_a_gpu_exactly() -> None:
    """0.1 is no binary fraction: ten of them must still fit on one GPU."""
    config = PlacementConfig("separate", 1, rollout_actors=10, reward_workers=1, gpus=True, rollout_gpus=0.1)
    assert assign(pools(config), [Node("a", {"CPU": 16, "GPU": 2})])["rollout actors"] == ["a"] * 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": True, "ranks": 2, "rank_gpus": 0.5}, r"placement\.rank_gpus=0\.5 with placement\.ranks=2"),
        ({"rollout_gpus": 1.5}, r"placement\.rollout_gpus=1\.5: above 1 it must be a whole number"),
        ({"rank_cpus": 0}, r"placement\.rank_cpus=0 must be positive"),
        ({"reward_gpus": -1}, r"placement\.reward_gpus=-1 must be 0 or positive"),
    ],
)
def test_impossible_shares_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_placement(PlacementConfig(**options))
    check_placement(PlacementConfig())


def test_nodes_are_read_from_one_word() -> None:
    assert [amounts(node.resources) for node in parse_nodes("2x64c8g, 16c")] == ["64 CPU, 8 GPU"] * 2 + ["16 CPU"]
    with pytest.raises(ConfigError, match="--nodes '8g': write COUNTxCPUSc"):
        parse_nodes("8g")
