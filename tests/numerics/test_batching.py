"""How an iteration is cut into work must not change what is computed: chunks, shares, micro-batches, windows, seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from envs.types import Task
from rewards.base import Scores
from rewards.rubric import Rubric, RubricScores, TermConfig
from rlrestore.algorithms.grpo import Grpo, GrpoConfig
from rlrestore.algorithms.nft import Nft, NftConfig
from rlrestore.build import build_env, build_restorer
from rlrestore.config.sections import CreditConfig, SamplingConfig
from rlrestore.crew import deal
from rlrestore.diffusion.sampling import Chain, sample
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.rollout import Sampler
from rlrestore.iteration.stages import assign_credit, evaluation_chain, make_chunks, rollout_chain, update_requests
from rlrestore.restorers.base import Condition, Restorer
from rlrestore.types import plan_updates
from tests.tiny import tiny_config

# Alone or in a batch, a sample goes through the same sums, but the convolutions of another batch size may split them
# otherwise. Latents are of the order of 1, four network evaluations a sample; measured: at most 2e-6.
SAME_SAMPLE = 2e-5

GRPO, NFT = Grpo(GrpoConfig()), Nft(NftConfig())  # one needs stochastic steps, the other none


@pytest.fixture(scope="module")
def restorer(tmp_path_factory: pytest.TempPathFactory) -> Restorer:
    return build_restorer(tiny_config(tmp_path_factory.mktemp("batching")).restorer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    return build_env(tiny_config(tmp_path_factory.mktemp("tasks")).env).draw(0, 3)


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_seed_gives_the_same_sample_alone_and_in_a_batch(
    restorer: Restorer, tasks: list[Task], stochastic: bool
) -> None:
    chain = rollout_chain(SamplingConfig(steps=4, window=2, window_range=(0, 3)), 0, 0, GRPO if stochastic else NFT)
    conditions = [restorer.condition(task.lq[None]) for task in tasks]
    seeds = [11, 12, 13]
    together, _ = sample(restorer, Condition.cat(conditions), seeds, chain)
    for row, (condition, seed) in enumerate(zip(conditions, seeds, strict=True)):
        alone, _ = sample(restorer, condition, [seed], chain)
        assert float((together[row] - alone[0]).abs().max()) < SAME_SAMPLE
    other, _ = sample(restorer, conditions[0], [99], chain)
    assert float((together[0] - other[0]).abs().max()) > 0.1  # so the tolerance tells samples apart


def test_the_size_of_chunks_changes_no_picture(restorer: Restorer, tasks: list[Task]) -> None:
    """6 rollouts in chunks of 1, 3 and 6: after rounding to 8 bits, at most a few pixels differ by one level."""
    chain, pictures = evaluation_chain(SamplingConfig(steps=4)), []
    for batch in (1, 3, 6):
        sampler = Sampler(restorer)
        chunks = make_chunks(tasks, 2, batch, 5, 0)
        pixels = [sampler.sample(chunk, chain, restorer.denoiser, 0, "")[0].pixels for chunk in chunks]
        pictures.append(torch.cat(pixels).int())
    for other in pictures[1:]:
        gap = (other - pictures[0]).abs()
        assert int(gap.max()) <= 1 and float((gap > 0).float().mean()) < 1e-3


# -- chunks and shares -----------------------------------------------------------------------------------------------


def test_chunks_are_group_major_and_keep_their_seeds(tasks: list[Task]) -> None:
    """3 tasks of 4 rollouts in batches of 6: the second task is split, and its rows keep their seeds."""
    chunks = make_chunks(tasks, 4, 6, 1, 7)
    assert [chunk.index for chunk in chunks] == [0, 1]
    members = [(row.group, row.member) for chunk in chunks for row in chunk.rows]
    assert members == [(group, member) for group in range(3) for member in range(4)]
    assert [chunk.groups for chunk in chunks] == [[0, 1], [1, 2]]
    assert [set(chunk.tasks) for chunk in chunks] == [{0, 1}, {1, 2}]
    whole = make_chunks(tasks, 4, 12, 1, 7)
    assert [row for chunk in chunks for row in chunk.rows] == list(whole[0].rows)


def test_every_rollout_has_its_own_seed(tasks: list[Task]) -> None:
    """2 run seeds x 5 iterations x 3 tasks x 4 members, all different; the same again for the same counters."""
    seeds = [
        row.seed
        for seed in range(2)
        for iteration in range(5)
        for chunk in make_chunks(tasks, 4, 12, seed, iteration)
        for row in chunk.rows
    ]
    assert len(set(seeds)) == len(seeds) == 120
    assert [row.seed for row in make_chunks(tasks, 4, 12, 0, 0)[0].rows] == seeds[:12]


@pytest.mark.parametrize(("count", "workers"), [(4, 1), (4, 2), (5, 2), (7, 3), (2, 3), (0, 2)])
def test_deal(count: int, workers: int) -> None:
    shares = deal(count, workers)
    assert [item for share in shares for item in share] == list(range(count))  # in order, each once
    sizes = [len(share) for share in shares]
    assert len(sizes) == workers and max(sizes) - min(sizes) <= 1


def test_plan_updates() -> None:
    # chunks of 4 and 6 rows in micro-batches of 4: a micro-batch never spans two chunks, the last may be short
    micro = [(0, 0, 4), (1, 0, 4), (1, 4, 6)]
    assert plan_updates([4, 6], 4, 1) == [micro]
    assert plan_updates([4, 6], 4, 3) == [[micro[0]], [micro[1]], [micro[2]]]
    assert plan_updates([8, 8], 4, 2) == [[(0, 0, 4), (0, 4, 8)], [(1, 0, 4), (1, 4, 8)]]
    assert plan_updates([4], 8, 1) == [[(0, 0, 4)]]  # a micro-batch larger than the chunk is the chunk
    assert plan_updates([], 4, 2) == [[], []]


def test_totals_do_not_depend_on_the_number_of_ranks(tasks: list[Task]) -> None:
    """12 rows, weights 1 but for rows 0, 5 and 6: one update sums to 9, however the 4 chunks of 3 rows are dealt.

    Two updates: one rank has rows 0-5 then 6-11 (4 and 5). Two ranks have rows 0-2 + 6-8, then 3-5 + 9-11 (4 and 5).
    """
    chunks = make_chunks(tasks, 4, 3, 0, 0)
    weight = torch.ones(12)
    weight[[0, 5, 6]] = 0
    credit = Credit(torch.arange(12.0), weight, {})
    for ranks in (1, 2, 4):
        requests = update_requests(chunks, credit, ranks, 3, 1, 0, 0)
        assert [request.totals for request in requests] == [(9.0,)] * ranks
        advantages = torch.cat([a for request in requests for a in request.advantages])
        assert advantages.tolist() == list(range(12))
        assert len({request.point_seed for request in requests}) == 1
    assert update_requests(chunks, credit, 1, 3, 2, 0, 0)[0].totals == (4.0, 5.0)
    assert [request.totals for request in update_requests(chunks, credit, 2, 3, 2, 0, 0)] == [(4.0, 5.0)] * 2


# -- the window ------------------------------------------------------------------------------------------------------


def test_the_window_follows_from_seed_and_iteration() -> None:
    """2 of the steps 1..4 of 6: it may start at 1, 2 or 3, and does so about equally often."""
    config = SamplingConfig(steps=6, window=2, window_range=(1, 5))
    windows = [rollout_chain(config, 3, iteration, GRPO).window for iteration in range(300)]
    assert windows == [rollout_chain(config, 3, iteration, GRPO).window for iteration in range(300)]
    counts = {start: windows.count((start, start + 1)) for start in (1, 2, 3)}
    # binomial(300, 1/3): mean 100, std 8.2; five of them
    assert sum(counts.values()) == 300 and all(abs(count - 100) < 41 for count in counts.values())
    assert windows != [rollout_chain(config, 4, iteration, GRPO).window for iteration in range(300)]


def test_a_window_as_wide_as_its_range_stands_still() -> None:
    config = SamplingConfig(steps=6, window=4, window_range=(0, 4))
    assert {rollout_chain(config, 0, iteration, GRPO).window for iteration in range(9)} == {(0, 1, 2, 3)}


def test_no_noise_where_none_is_asked_for() -> None:
    config = SamplingConfig(steps=6)
    assert rollout_chain(config, 0, 0, NFT) == evaluation_chain(config)
    chain: Chain = evaluation_chain(config)
    assert chain.kernel == "ode" and chain.window == () and len(chain.times) == 7


# -- the shuffled control --------------------------------------------------------------------------------------------


def scores_of(ssim_N: Tensor, psnr_N: Tensor) -> RubricScores:
    rubric = Rubric([TermConfig("ssim_rgb", name="ssim"), TermConfig("psnr_rgb", name="psnr")])
    valid = {"ssim": ssim_N.isfinite(), "psnr": psnr_N.isfinite()}
    reasons = {name: tuple("" if ok else "x" for ok in valid_N.tolist()) for name, valid_N in valid.items()}
    values = {"ssim": ssim_N, "psnr": psnr_N}
    return rubric.combine({name: Scores(values[name], valid[name], reasons[name]) for name in values})


def test_the_control_permutes_rewards_inside_groups() -> None:
    """Each group keeps its rewards, so its mean and its spread; only who gets which changes. Rewards move together."""
    ssim = torch.rand(32, generator=torch.Generator().manual_seed(1))
    scores = scores_of(ssim, 30 * ssim)  # the second is a multiple of the first: it must stay one
    true = assign_credit(scores, CreditConfig(), 4, 0, 0)
    control = assign_credit(scores, CreditConfig(shuffle=True), 4, 0, 0)
    for name in ("group_spread_mean", "adv_std", "kept_samples"):
        assert control.stats[name] == pytest.approx(true.stats[name], rel=1e-6)
    mine, theirs = true.advantage_N.reshape(4, 8), control.advantage_N.reshape(4, 8)
    torch.testing.assert_close(mine.sort(1).values, theirs.sort(1).values)
    assert all(not torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    # means are 0 up to float32
    assert float(theirs.mean(1).abs().max()) < 1e-6


def test_the_control_shuffles_anew_each_iteration_and_repeats_itself() -> None:
    scores = scores_of(torch.linspace(0.1, 0.9, 16), torch.linspace(20, 30, 16))
    config = CreditConfig(shuffle=True)
    first, second = (assign_credit(scores, config, 2, 0, iteration).advantage_N for iteration in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, assign_credit(scores, config, 2, 0, 0).advantage_N)


def test_the_control_over_many_shuffles_says_nothing() -> None:
    """Mean advantage of a row over 400 shuffles: 0 within five standard errors, 1 / sqrt(400) each (unit std)."""
    scores = scores_of(torch.linspace(0.1, 0.9, 8), torch.linspace(20, 30, 8))
    config = CreditConfig(shuffle=True)
    credits = [assign_credit(scores, config, 1, 0, iteration).advantage_N for iteration in range(400)]
    assert float(torch.stack(credits).mean(0).abs().max()) < 5 / math.sqrt(400)


def test_a_failed_rollout_stays_masked_in_the_control() -> None:
    ssim = torch.linspace(0.1, 0.9, 8)
    ssim[3] = math.nan
    control = assign_credit(scores_of(ssim, torch.linspace(20, 30, 8)), CreditConfig(shuffle=True), 1, 0, 0)
    assert float(control.weight_N[3]) == 0
    assert 6 <= float(control.weight_N.sum()) <= 7  # the row that was given the missing score is masked, too


def test_a_sliding_window_moves_by_one_and_starts_again():
    # 5 places for a window of 2 in [0, 6), 3 iterations each
    config = SamplingConfig(steps=8, window=2, window_range=(0, 6), window_every=3)
    starts = [rollout_chain(config, 0, iteration, GRPO).window[0] for iteration in range(18)]
    assert starts == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [0] * 3


def test_the_size_of_a_step():
    times = (1.0, 0.6, 0.5, 0.0)
    assert Chain(times, "flow_sde", 0.7, (1,)).step_scale(1) == pytest.approx(0.1)
    # cps: |d mean / d v| = .238197, as in test_kernels
    assert Chain(times, "cps", 0.8, (1,)).step_scale(1) == pytest.approx(0.238197, abs=1e-6)


def test_photos_of_several_sizes_never_share_a_chunk() -> None:
    """Groups of 4: two of 32 x 32, one of 32 x 48. Batches of 8 end where the size changes."""
    sizes = [(32, 32), (32, 32), (32, 48)]
    tasks = [Task(str(index), torch.zeros(3, *size), ()) for index, size in enumerate(sizes)]
    assert [[row.group for row in chunk.rows] for chunk in make_chunks(tasks, 4, 8, 0)] == [[0] * 4 + [1] * 4, [2] * 4]
    assert [len(chunk.rows) for chunk in make_chunks(tasks, 4, 2, 0)] == [2] * 6
