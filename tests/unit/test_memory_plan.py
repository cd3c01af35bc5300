"""The memory of a trainer rank: numbers that can be derived by hand from the published formulas (ZeRO, arXiv 1910.02054)."""

from __future__ import annotations

import pytest

from rlrestore.planning.memory import (
    PHASES,
    Copies,
    Network,
    Sharding,
    Transformer,
    rollout_memory,
    saved_by_transformer,
    trainer_memory,
)

N = 1_000_000
FULL = Network(N, N, lora=False, trained_bytes=2)  # bfloat16 weights with float32 masters
LORA = Network(N, 10_000, lora=True)  # bfloat16 base, float32 adapter
ENGINE = ("frozen weights", "trained weights", "master weights", "moments")


def held(network: Network, sharding: Sharding, names: tuple[str, ...] = ENGINE) -> int:
    memory = trainer_memory(network, sharding, Copies())
    return sum(item.bytes for item in memory.items if item.name in names)


@pytest.mark.parametrize(
    ("zero", "ranks", "expected"),
    [
        (1, 2, 8 * N),  # 2 N + 12 N / 2
        (2, 4, 5 * N),  # 2 N + 12 N / 4
        (3, 2, 7 * N),  # (2 + 12) N / 2; its gradient buffer is an item of its own
    ],
)
def test_full_weights(zero: int, ranks: int, expected: int) -> None:
    assert held(FULL, Sharding("deepspeed", zero, ranks)) == expected


def test_lora() -> None:
    frozen = 2 * 990_000
    assert held(LORA, Sharding("deepspeed", 2, 2)) == frozen + 4 * 10_000 + 12 * 10_000 // 2
    assert held(LORA, Sharding("deepspeed", 3, 2)) == (frozen + 16 * 10_000) // 2
    assert held(LORA, Sharding()) == frozen + 12 * 10_000  # torch: weights and two moments, no master beside them


def test_copies_are_adapters_or_networks() -> None:
    def copies(network: Network, which: Copies) -> int:
        return trainer_memory(network, Sharding("deepspeed", 2, 2), which).resident

    # one adapter in float32, and for the old policy half of its float32 shadow, whose other half the other rank keeps
    assert copies(LORA, Copies(reference=True)) - copies(LORA, Copies()) == 4 * 10_000
    assert copies(LORA, Copies(old=True)) - copies(LORA, Copies()) == 6 * 10_000
    assert copies(FULL, Copies(reference=True)) - copies(FULL, Copies()) == 2 * N


def test_the_peak_is_the_largest_phase_on_top_of_what_stays() -> None:
    quiet = trainer_memory(LORA, Sharding("deepspeed", 2, 2), Copies(), saved=0)
    busy = trainer_memory(LORA, Sharding("deepspeed", 2, 2), Copies(), saved=10**9)
    assert busy.peak_phase == "backward" and busy.resident == quiet.resident
    assert busy.peak - busy.resident == 10**9 + 4 * 5_000 + 4 * 10_000  # activations, gradients' half, the bucket
    assert busy.peak == max(busy.phase(name) for name in PHASES)


def test_slack_is_of_what_we_hold_and_not_of_the_process() -> None:
    plain = trainer_memory(LORA, Sharding(), Copies(), process=500)
    slack = trainer_memory(LORA, Sharding(), Copies(), process=500, slack=0.1)
    assert slack.peak - plain.peak == round(0.1 * (plain.peak - 500))


def test_stage_3_gathers_no_more_than_it_may_hold() -> None:
    big = Network(2_000_000_000, 10_000_000, lora=True)
    live = {item.name: item.bytes for item in trainer_memory(big, Sharding("deepspeed", 3, 8), Copies()).items}
    assert live["gathered layers"] == 2 * 150_000_000
    wide = Network(2_000_000_000, 10_000_000, lora=True, largest_layer=200_000_000)
    live = {item.name: item.bytes for item in trainer_memory(wide, Sharding("deepspeed", 3, 8), Copies()).items}
    assert live["gathered layers"] == 2 * 200_000_000
    small = {item.name: item.bytes for item in trainer_memory(LORA, Sharding("deepspeed", 3, 8), Copies()).items}
    assert small["gathered layers"] == 2 * N


def test_offloaded_parts_are_the_hosts() -> None:
    on_gpu = trainer_memory(FULL, Sharding("deepspeed", 3, 2), Copies())
    off = trainer_memory(FULL, Sharding("deepspeed", 3, 2, offload="weights"), Copies())
    # weights 2 N / 2, master 4 N / 2, moments 8 N / 2, gradients 2 N / 2; a step's 12 N / 2 come on top
    assert on_gpu.resident - off.resident == 8 * N and (on_gpu.host, off.host) == (0, 14 * N)


def test_a_rollout_actor_holds_whole_weights_and_no_optimiser() -> None:
    memory = rollout_memory(LORA)
    assert memory.resident == 2 * 990_000 + 4 * 10_000
    assert memory.peak == memory.resident + 8 * 10_000


def test_activations_of_kontext_at_1024_px() -> None:
    """4096 + 4096 + 512 tokens x 3072 x 2 bytes x (57 inputs + 28, or with LoRA 22, of the repeated block): 4.5 GB."""
    model = Transformer((("flux_double", 19), ("flux_single", 38)), 3072, 4096 + 4096 + 512)
    saved = saved_by_transformer(model, 1, lora=False, checkpointing=True)
    assert saved == 8704 * 3072 * 2 * 85 == pytest.approx(4.5e9, rel=0.02)
    assert saved_by_transformer(model, 2, lora=True, checkpointing=True) == 2 * 8704 * 3072 * 2 * 79
    assert saved_by_transformer(model, 1, lora=True, checkpointing=False) == 8704 * 3072 * 2 * (22 * 19 + 19 * 38)
