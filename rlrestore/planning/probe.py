"""A short probe: the real restorer, algorithm, engine and rewards of a config do a little of each stage in this process.

Measured: seconds of a chunk at two sizes, of a micro-batch, of an optimiser step, of scoring by term, of drawing a task;
and, for memory, the process before anything is built, what a backward saves, and what sampling adds. With `threads` as a rank
of the placement would have. On a CPU machine as many ranks are probed together as the placement has and the cores carry
(`ranks_together`), since they share memory's bandwidth and their collectives are not free. Nothing is kept: one checkpoint is timed
in a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing
from torch import Tensor

from envs.base import Env
from rlrestore.algorithms.base import Algorithm, Batch
from rlrestore.build import LearnerRecipe, build_algorithm, build_env, build_scorer
from rlrestore.config.sections import TrainConfig, all_terms
from rlrestore.diffusion.sampling import Chain
from rlrestore.engine.build import free_port
from rlrestore.engine.group import join_group
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.scoring import Scorer
from rlrestore.iteration.stages import evaluation_chain, make_chunks, rollout_chain, update_requests
from rlrestore.learning.learner import Learner
from rlrestore.planning.memory import BYTES, Copies, Network
from rlrestore.planning.workload import Bytes, Constants, Cost, Workload, byte_sizes, workload_of
from rlrestore.quiet import quiet
from rlrestore.types import Chunk, Images

REPEATS = 3


@dataclass(frozen=True)
class Footprint:
    """Bytes of this process, for `memory.trainer_memory`."""

    process: int  # before env and networks: the interpreter and its libraries
    saved: int  # by one micro-batch's forward for its backward
    sampling: int  # that sampling a chunk adds for a while


def rank_threads(config: TrainConfig) -> int:
    """Of a trainer rank; what `actors.crew` gives it, and torch's default in one process."""
    if config.placement.threads:
        return config.placement.threads
    cores = os.cpu_count() or 1
    if config.placement.kind == "local":
        return torch.get_num_threads()
    samplers = config.placement.rollout_actors if config.placement.kind == "separate" else config.placement.ranks
    return max(1, cores // max(config.placement.ranks, samplers))


def ranks_together(config: TrainConfig) -> int:
    """Ranks that a probe runs at once; more would wait for each other's cores, which the simulation reckons itself."""
    placement = config.placement
    if placement.kind == "local" or placement.gpus:
        return 1
    return max(1, min(placement.ranks, (os.cpu_count() or 1) // rank_threads(config)))


@dataclass
class Parts:
    """What a probe works with, built once."""

    config: TrainConfig
    learner: Learner
    env: Env
    chain: Chain
    work: Workload
    threads: int
    ranks: int  # that are probed together
    process: int  # bytes resident before anything was built

    @property
    def network(self) -> Network:
        return network_of(self.learner, self.config)

    @property
    def copies(self) -> Copies:
        return Copies(old=self.learner.old is not None, reference=self.learner.reference is not None)

    def measure(self) -> Constants:
        config = self.config
        scorer = build_scorer(all_terms(config))
        constants = _measure(config, self.learner, self.env, scorer, self.chain, self.work, self.threads)
        return constants.replace(ranks=self.ranks)

    def footprint(self) -> Footprint:
        return _footprint(self.process, self.config, self.learner, self.env, self.chain)


@contextlib.contextmanager
def parts_of(config: TrainConfig, ranks: int = 1) -> Iterator[Parts]:
    """ConfigError for what the config cannot have, as `train` says it. With several `ranks` the others run in processes of
    their own, which take every step of a probe (`measure`, then `footprint`) with this one and end with it."""
    if ranks == 1:
        with _parts_of_rank(config, 0, 1, free_port()) as parts:
            yield parts
        return
    port = free_port()
    others = torch.multiprocessing.start_processes(
        _other_rank, (config, ranks, port), nprocs=ranks - 1, join=False, daemon=True, start_method="spawn"
    )
    try:
        with _parts_of_rank(config, 0, ranks, port) as parts:
            yield parts
    finally:
        for process in others.processes:
            process.terminate()


def _other_rank(index: int, config: TrainConfig, ranks: int, port: int) -> None:
    """Rank `index` + 1: the same calls in the same order, since the engine's collectives need every rank."""
    quiet()
    with _parts_of_rank(config, index + 1, ranks, port) as parts:
        parts.measure()
        parts.footprint()


@contextlib.contextmanager
def _parts_of_rank(config: TrainConfig, rank: int, ranks: int, port: int) -> Iterator[Parts]:
    threads = rank_threads(config)
    torch.set_num_threads(threads)
    if config.placement.kind != "local":
        import rlrestore.actors.crew  # noqa: F401  # a rank has Ray in its process
    process = resident_bytes()
    algorithm = build_algorithm(config.algorithm)
    if config.engine.kind == "deepspeed" or ranks > 1:
        join_group(rank, ranks, "127.0.0.1", port, config.placement.stage_timeout_s)
    learner = LearnerRecipe.of(config).build(rank, ranks)
    try:
        env = build_env(config.env)
        chain = rollout_chain(config.sampling, config.run.seed, 0, algorithm)
        points = len(algorithm.points(chain, 0))
        work = workload_of(config, chain, points, algorithm.updates, _sizes(config, learner, env, chain))
        yield Parts(config, learner, env, chain, work, threads, ranks, process)
    finally:
        learner.close()


def _sizes(config: TrainConfig, learner: Learner, env: Env, chain: Chain) -> Bytes:
    task = env.draw(0, 1)[0]
    restorer = learner.restorer
    latent = restorer.latent_shape(restorer.condition(task.lq[None].to(restorer.device)))
    trained = learner.trained
    stage3 = config.engine.kind == "deepspeed" and config.engine.zero == 3
    whole = sum(parameter.numel() for parameter in learner.scratch.parameters()) if stage3 else 0
    size = (task.lq.shape[-2], task.lq.shape[-1])
    return byte_sizes(size, task.gt is not None, latent, chain, trained, BYTES[config.engine.precision], whole)


def network_of(learner: Learner, config: TrainConfig) -> Network:
    denoiser = list(learner.scratch.named_parameters())
    trained, names = learner.trained, learner.base.shapes
    beside = [
        parameter
        for network in vars(learner.restorer).values()
        if isinstance(network, torch.nn.Module) and network is not learner.restorer.denoiser
        for parameter in network.parameters()
    ]
    layers = [sum(p.numel() for p in module.parameters(recurse=False)) for module in learner.scratch.modules()]
    frozen = [parameter for name, parameter in denoiser if name not in names]
    return Network(
        parameters=sum(parameter.numel() for _, parameter in denoiser), trained=trained,
        lora=getattr(config.restorer.config, "lora_rank", 0) > 0,
        frozen_bytes=frozen[0].element_size() if frozen else 4,
        trained_bytes=BYTES[config.engine.precision], largest_layer=max(layers),
        beside=sum(parameter.numel() for parameter in beside),
    )  # fmt: skip


# -- seconds -------------------------------------------------------------------------------------------------------


def _measure(
    config: TrainConfig, learner: Learner, env: Env, scorer: Scorer, chain: Chain, work: Workload, threads: int
) -> Constants:
    seed = config.run.seed
    tasks = env.draw(0, work.groups)  # opens files; later draws find them open
    start = time.perf_counter()
    env.draw(1, work.groups)
    draw_s = (time.perf_counter() - start) / work.groups
    chunks = make_chunks(tasks, work.samples, work.chunk_rows, seed, 0)[:2]
    half = make_chunks(tasks[:1], work.samples, max(1, work.chunk_rows // 2), seed, 0)[0]
    names = list(config.rewards)

    def sample(chunk: Chunk) -> Images:
        learner.sampler.forget()  # an iteration encodes each LQ once
        return learner.sample(chunk, chain)

    images = [sample(chunk) for chunk in chunks]  # warms up
    whole_s, spread = seconds_of(lambda: sample(chunks[0]))
    half_s, _ = seconds_of(lambda: sample(half))
    restorations = images[0].restorations(chunks[0])
    scorer.score(restorations)
    terms_s = {
        name: seconds_of(lambda name=name: scorer.score(restorations, [name]))[0] / len(restorations)  # type: ignore[misc]
        for name in scorer.terms
    }
    one, two = (_update_seconds(config, learner, chunks[:count], chain, work) for count in (1, len(chunks)))
    micro_batches = sum(-(-len(chunk.rows) // work.micro_rows) for chunk in chunks)
    extra = micro_batches - -(-len(chunks[0].rows) // work.micro_rows)
    micro_s = (two - one) / (extra * work.points) if extra else one / (micro_batches * work.points)
    step_s = max(0.0, one - (micro_batches - extra) * work.points * micro_s) / work.updates
    return Constants(
        sample=line_through(len(half.rows), half_s, len(chunks[0].rows), whole_s),
        train=Cost(0.0, micro_s / min(work.micro_rows, work.chunk_rows)),
        step_s=step_s if extra else 0.0,
        score=Cost(0.0, sum(terms_s[name] for name in names)),
        draw_s=draw_s, driver_s=0.0, source=f"probe, {threads} thread{'s' * (threads > 1)}", terms_s=terms_s,
        evaluation_row_s=_evaluation_row_s(config, learner, chunks[0]) + sum(terms_s.values()),
        checkpoint_s=_checkpoint_s(config, learner),
        noise=spread, threads=threads,
    )  # fmt: skip


def _update_seconds(
    config: TrainConfig, learner: Learner, chunks: Sequence[Chunk], chain: Chain, work: Workload
) -> float:
    """An iteration's update on some chunks, which are sampled again before each: it forgets them."""
    rows = sum(len(chunk.rows) for chunk in chunks)
    sign_N = torch.tensor([1.0 if row % 2 else -1.0 for row in range(rows)])
    credit = Credit(sign_N, torch.ones(rows), {})
    seconds = []
    for _ in range(REPEATS):
        for chunk in chunks:
            learner.sample(chunk, chain)
        request = update_requests(chunks, credit, 1, config.engine.micro_batch, work.updates, config.run.seed, 0)[0]
        start = time.perf_counter()
        learner.update(request, chain)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _evaluation_row_s(config: TrainConfig, learner: Learner, chunk: Chunk) -> float:
    chain = evaluation_chain(config.sampling)
    seconds, _ = seconds_of(lambda: learner.sample_with(chunk, chain, "current"), repeats=1)
    return seconds / len(chunk.rows)


def _checkpoint_s(config: TrainConfig, learner: Learner) -> float:
    """Into this machine's temporary folder; a shared file system may be slower."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        start = time.perf_counter()
        learner.save(Path(folder))
        learner.export(Path(folder) / "restorer", config.evaluate.weights)
        return time.perf_counter() - start


def seconds_of(call: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """(median seconds of a call, std over mean)."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    spread = statistics.pstdev(seconds) / statistics.fmean(seconds) if repeats > 1 else 0.0
    return statistics.median(seconds), spread


def line_through(rows_a: int, a_s: float, rows_b: int, b_s: float) -> Cost:
    """The cost that fits two measurements; none of its parts below 0."""
    if rows_a == rows_b:
        return Cost(0.0, b_s / rows_b)
    row_s = max(0.0, (b_s - a_s) / (rows_b - rows_a))
    row_s = min(row_s, b_s / rows_b)
    return Cost(b_s - rows_b * row_s, row_s)


# -- bytes ---------------------------------------------------------------------------------------------------------


def _footprint(process: int, config: TrainConfig, learner: Learner, env: Env, chain: Chain) -> Footprint:
    rollout = config.rollout
    tasks = env.draw(0, rollout.groups)
    chunk = make_chunks(tasks, rollout.samples, rollout.batch, config.run.seed, 0)[0]
    reset_peak()
    before = resident_bytes()
    learner.sample(chunk, chain)
    sampling = max(0, peak_bytes() - before)
    return Footprint(process, _saved_bytes(learner, config, chunk, chain, learner.algorithm), sampling)


def _saved_bytes(learner: Learner, config: TrainConfig, chunk: Chunk, chain: Chain, algorithm: Algorithm) -> int:
    """Of one micro-batch, each storage once, without the parameters themselves."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in learner.restorer.denoiser.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    latents, device = learner.latents[chunk.index], learner.restorer.device
    rows = slice(0, config.engine.micro_batch)
    trajectory = latents.trajectory and latents.trajectory.take(rows).to(device)
    ones = torch.ones(len(chunk.rows[rows]), device=device)
    batch = Batch(
        learner.sampler.condition(chunk).take(rows), latents.z_0[rows].to(device), trajectory, ones, ones,
        chunk.rows[rows], chunk.tasks_of(rows),
    )  # fmt: skip
    point = algorithm.points(chain, 0)[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = algorithm.loss(learner.policies, batch, point)
    del loss
    learner.latents.clear()
    return sum(storages.values())


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def reset_peak() -> None:
    """Let VmHWM start again from what is resident now (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the whole process


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)
