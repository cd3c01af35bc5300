"""LoRA on two trainer ranks: ZeRO-2 and ZeRO-3 sample and train as one process does, and export whole adapters.

Two plain processes with a learner each, as `actors` would hold them; one start serves all cases, because it costs more
than all of their arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from envs.base import Env
from rlrestore.build import LearnerRecipe, build_env, load_train_config
from rlrestore.commands.export import run_export
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import deal
from rlrestore.engine.build import free_port
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.stages import evaluation_chain, make_chunks, rollout_chain, update_requests
from rlrestore.learning.learner import Learner
from rlrestore.types import UpdateReport
from tests.e2e.test_export import LIMIT, difference
from tests.tiny_pipelines import family_config, open_pipeline, save_pipeline

IDENTITY = 1e-5
CASES = [
    *((algorithm, zero, "float32") for zero in (2, 3) for algorithm in ("grpo", "nft")),
    ("grpo", 2, "bfloat16"),  # of the frozen base, as the shipped configs have it; the adapter is float32
    ("grpo", 3, "bfloat16"),
]
BASE_BYTES = 310_080  # of the tiny transformer in float32
# micro-batches of 2, so that both ranks have one; the penalty asks for a reference adapter beside the others
OPTIONS = ["rollout.batch=2", "engine.micro_batch=2", "regularise.velocity=0.1", "engine.partition_threshold=0"]
pytestmark = pytest.mark.slow


def train(learner: Learner, config: TrainConfig, env: Env, rank: int, world: int) -> list[UpdateReport]:
    """Two iterations with advantages that need no judge."""
    reports = []
    for iteration in range(2):
        chain = rollout_chain(config.sampling, 0, iteration, learner.algorithm)
        chunks = make_chunks(env.draw(iteration, 2), 2, 2, 0, iteration)
        credit = Credit(torch.tensor([1.0, -1.0, -0.5, 0.5]), torch.ones(4), {})
        for index in deal(len(chunks), world)[rank]:
            learner.sample(chunks[index], chain)
        reports.append(learner.update(update_requests(chunks, credit, world, 2, 1, 0, iteration)[rank], chain))
    return reports


def pictures(learner: Learner, config: TrainConfig, env: Env, which: str) -> torch.Tensor:
    """Evaluation's way: every rank samples the same number of chunks."""
    learner.load_scratch(which)
    chain = evaluation_chain(config.sampling)
    chunks = make_chunks(env.held_out(1), 2, 2, 0)
    return torch.cat([learner.sample_with(chunk, chain, which).pixels for chunk in chunks])


def rank_main(rank: int, configs: dict[str, str], folder: str, port: int) -> None:
    """One trainer rank through all cases; rank 0 writes what it found."""
    torch.set_num_threads(1)
    from rlrestore.engine.group import join_group

    join_group(rank, 2, "127.0.0.1", port, 300.0)
    for algorithm, zero, precision in CASES:
        overrides = [*OPTIONS, "engine.kind=deepspeed", f"engine.zero={zero}", f"restorer.precision={precision}"]
        config = load_train_config(configs[algorithm], overrides)
        env, recipe, out = (
            build_env(config.env),
            LearnerRecipe.of(config),
            Path(folder) / f"{algorithm}_{zero}_{precision}",
        )
        learner = recipe.build(rank, 2)
        reports = train(learner, config, env, rank, 2)
        learner.probe(make_chunks(env.draw(0, 1), 2, 2, 0)[0], rollout_chain(config.sampling, 0, 0, learner.algorithm))
        found = dict(learner.weights("current"))
        for which in ("base", "current"):
            found[which] = pictures(learner, config, env, which)
        found["ratio"] = torch.tensor([report.maxima.get("ratio_deviation_max_on_policy", 0.0) for report in reports])
        found["norms"] = torch.tensor([report.grad_norms[0] for report in reports])
        if rank == 0:
            out.mkdir()
        torch.distributed.barrier()
        learner.export(out / "saved", "ema")
        learner.save(out)
        again = recipe.build(rank, 2)
        again.load(out)
        found["resumed"] = torch.tensor(
            all(torch.equal(value, found[name]) for name, value in again.weights("current").items())
        )
        if rank == 0:
            save_file({name: value.clone().contiguous() for name, value in found.items()}, out / "found.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora_zero")
    configs = {}
    for algorithm in ("grpo", "nft"):
        family_config(folder, "flux_kontext", algorithm)
        configs[algorithm] = str(folder / f"flux_kontext_{algorithm}.yaml")
    torch.multiprocessing.spawn(rank_main, (configs, str(folder), free_port()), nprocs=2)
    return folder


@pytest.mark.parametrize(("algorithm", "zero", "precision"), CASES)
def test_two_ranks_train_as_one(folder: Path, algorithm: str, zero: int, precision: str) -> None:
    found = load_file(folder / f"{algorithm}_{zero}_{precision}" / "found.safetensors")
    config = family_config(folder, "flux_kontext", algorithm, [*OPTIONS, f"restorer.precision={precision}"])
    env = build_env(config.env)
    alone = LearnerRecipe.of(config).build()
    reports = train(alone, config, env, 0, 1)
    if algorithm == "grpo":
        assert float(found["ratio"].max()) < IDENTITY
    norms = torch.tensor([report.grad_norms[0] for report in reports])
    loose = precision == "bfloat16"  # one process and two need not round bfloat16 alike; each agrees with itself, above
    assert float((found["norms"] / norms - 1).abs().max()) < (0.05 if loose else 1e-5)
    straight = alone.weights("current")
    gaps = torch.cat([(found[name] - straight[name]).abs().flatten() for name in straight])
    assert float((gaps > 1e-4).float().mean()) < (0.1 if loose else 1e-6)  # of steps of 1e-3
    for which in ("base", "current"):
        difference = found[which].int() - pictures(alone, config, env, which).int()
        assert int(difference.abs().max()) <= (3 if loose else 1)  # of 255
    assert not torch.equal(found["base"], found["current"])
    assert bool(found["resumed"])


@pytest.mark.parametrize("zero", [2, 3])
def test_diffusers_alone_opens_the_export(folder: Path, zero: int, tmp_path: Path) -> None:
    saved = folder / f"grpo_{zero}_float32" / "saved"
    run_export(saved, tmp_path / "lora", "lora", None, None)
    pipe = open_pipeline("flux_kontext", save_pipeline("flux_kontext", folder))
    base = difference(pipe, "flux_kontext", saved)
    pipe.load_lora_weights(tmp_path / "lora")
    assert difference(pipe, "flux_kontext", saved) < LIMIT < base


@pytest.mark.parametrize(("algorithm", "zero", "precision"), CASES)
def test_files_hold_whole_adapters_and_no_base(folder: Path, algorithm: str, zero: int, precision: str) -> None:
    out = folder / f"{algorithm}_{zero}_{precision}"
    tensors = load_file(out / "saved" / "weights.safetensors")
    assert tensors and all(value.numel() for value in tensors.values())
    adapter = 4 * sum(value.numel() for value in tensors.values())
    state = sum(file.stat().st_size for file in (out / "engine").rglob("*") if file.is_file())
    assert 3 * adapter < state < BASE_BYTES / 2  # weights and two moments of the adapter, and DeepSpeed's bookkeeping
