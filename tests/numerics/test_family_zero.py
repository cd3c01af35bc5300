"""Every family on two trainer ranks, ZeRO-2 and ZeRO-3: on policy, and an update moves its adapters and nothing else.

One start of two plain processes serves all cases (`test_lora_zero.py` has one family in depth: equality with one process, files,
resume). What must not move is compared by each rank on the shard that it holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from rlrestore.build import RESTORERS, LearnerRecipe, build_env, load_train_config
from rlrestore.crew import deal
from rlrestore.engine.build import free_port
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.stages import make_chunks, rollout_chain, update_requests
from rlrestore.learning.learner import Learner
from tests.tiny_pipelines import family_config

IDENTITY = 1e-5
FAMILIES = sorted(set(RESTORERS) - {"embedded"})
CASES = [
    (kind, algorithm, zero, "none")
    for kind in FAMILIES
    for algorithm in ("grpo", "nft")
    for zero in (2, 3)
    if (kind, algorithm) != ("one_step", "grpo")  # it has no density
] + [
    ("sd_controlnet", "dpo", 2, "none"),
    ("sd_controlnet", "dpo", 3, "none"),
    ("flux_kontext", "grpo", 2, "optimiser"),  # the same arithmetic on the host
    ("flux_kontext", "grpo", 3, "weights"),
]
OPTIONS = ["rollout.batch=2", "engine.micro_batch=2", "engine.kind=deepspeed", "engine.partition_threshold=0"]
pytestmark = pytest.mark.slow


def held(learner: Learner) -> dict[str, Tensor]:
    """Every parameter of the denoiser and the VAE as this rank has it: its shard under ZeRO-3."""
    restorer = learner.restorer
    named = [*restorer.denoiser.named_parameters(), *restorer.vae.named_parameters(prefix="vae")]
    return {name: getattr(value, "ds_tensor", value).detach().clone() for name, value in named}


def iteration(learner: Learner, config, rank: int) -> tuple[float, float]:
    """(largest deviation of the on-policy ratio from 1, gradient norm) of one iteration with given advantages."""
    env = build_env(config.env)
    chain = rollout_chain(config.sampling, 0, 0, learner.algorithm)
    chunks = make_chunks(env.draw(0, 2), 2, 2, 0, 0)
    for index in deal(len(chunks), 2)[rank]:
        learner.sample(chunks[index], chain)
    credit = Credit(torch.tensor([1.0, -1.0, -0.5, 0.5]), torch.ones(4), {})
    report = learner.update(update_requests(chunks, credit, 2, 2, 1, 0, 0)[rank], chain)
    return report.maxima.get("ratio_deviation_max_on_policy", 0.0), report.grad_norms[0]


def rank_main(rank: int, configs: dict[str, str], folder: str, port: int) -> None:
    torch.set_num_threads(1)
    from rlrestore.engine.group import join_group

    join_group(rank, 2, "127.0.0.1", port, 300.0)
    for kind, algorithm, zero, offload in CASES:
        overrides = [*OPTIONS, f"engine.zero={zero}", f"engine.offload={offload}"]
        config = load_train_config(configs[f"{kind}_{algorithm}"], overrides)
        learner = LearnerRecipe.of(config).build(rank, 2)
        before = held(learner)
        ratio, norm = iteration(learner, config, rank)
        after = held(learner)
        found = {
            "ratio": ratio, "norm": norm, "sharded": before["vae.encoder.conv_in.weight"].numel() == 0,
            "moved": [name for name, value in after.items() if not torch.equal(value, before[name])],
            "trained": list(learner.base.shapes),
            "weights": torch.cat([value.flatten() for value in learner.weights("current").values()]).tolist()
            if (kind, algorithm) == ("flux_kontext", "grpo")
            else [],
        }  # fmt: skip
        Path(folder, f"{kind}_{algorithm}_{zero}_{offload}_{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family_zero")
    configs = {}
    for kind, algorithm, *_ in CASES:
        family_config(folder, kind, algorithm)
        configs[f"{kind}_{algorithm}"] = str(folder / f"{kind}_{algorithm}.yaml")
    torch.multiprocessing.spawn(rank_main, (configs, str(folder), free_port()), nprocs=2)
    return folder


def read(folder: Path, *case: object) -> dict:
    return json.loads((folder / f"{'_'.join(map(str, case))}.json").read_text())


@pytest.mark.parametrize(("kind", "algorithm", "zero", "offload"), CASES)
def test_two_ranks(folder: Path, kind: str, algorithm: str, zero: int, offload: str) -> None:
    ranks = [read(folder, kind, algorithm, zero, offload, rank) for rank in (0, 1)]
    trained = set(ranks[0]["trained"])
    assert trained and all(".lora_" in name and ".default." in name for name in trained)
    copies = {name.replace(".default.", ".old.") for name in trained} if algorithm == "nft" else set()
    moved = set(ranks[0]["moved"]) | set(ranks[1]["moved"])
    # B is 0 at the start, so A has no gradient in the first step
    assert moved & trained and moved <= trained | copies
    assert not any(".lora_A." in name for name in moved)
    assert all(rank["norm"] > 0 for rank in ranks) and ranks[0]["norm"] == pytest.approx(ranks[1]["norm"])
    assert not any(rank["sharded"] for rank in ranks)  # the VAE is frozen, and nobody's to shard
    if algorithm == "grpo":
        assert max(rank["ratio"] for rank in ranks) < IDENTITY
    if offload != "none":
        plain = read(folder, kind, algorithm, zero, "none", 0)["weights"]
        assert ranks[0]["weights"] == pytest.approx(plain, abs=1e-7) and plain
