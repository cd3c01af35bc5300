"""`rlrestore train --dry-run`: what a run would start and where, its arithmetic and its memory. Starts and writes nothing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlrestore.build import build_algorithm, build_restorer, check_parts, first_draw, load_train_config
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import deal
from rlrestore.iteration.stages import rollout_chain
from rlrestore.learning.optimiser import select_trainable
from rlrestore.placement import amounts, assign, parse_nodes, pools, total
from rlrestore.planning.memory import Copies, Network, Sharding, rollout_memory, trainer_memory
from rlrestore.quiet import quiet
from rlrestore.types import plan_updates


def run_dry(config_path: Path, overrides: Sequence[str], nodes: str | None) -> None:
    quiet()
    config = load_train_config(config_path, overrides)
    env = check_parts(config)
    height, width = first_draw(env, 1)[0].lq.shape[-2:]
    sections = {
        "placement": placement_lines(config, nodes),
        "an iteration": batch_lines(config, int(height), int(width)),
        "memory a rank, without activations": memory_lines(config),
        "commands": command_lines(config, config_path, overrides),
    }
    for title, lines in sections.items():
        print(f"\n{title}\n" + "\n".join(f"  {line}" for line in lines))
    print("\nnothing was started or written")


def placement_lines(config: TrainConfig, nodes: str | None) -> list[str]:
    if config.placement.kind == "local":
        return ["local: one process, without Ray"]
    wanted = pools(config.placement)
    lines = [f"{'':16}{'count':>6}  each, on Ray"]
    lines += [f"{pool.name:16}{pool.count:6}  {amounts(pool.each)}; {pool.strategy.lower()}" for pool in wanted]
    lines.append(f"{'together':16}{sum(pool.count for pool in wanted):6}  {amounts(total(wanted))}")
    if nodes is None:
        return [*lines, "where they go: --nodes 2x64c8g (two nodes with 64 CPUs and 8 GPUs) shows it"]
    homes = {pool: Counter(names) for pool, names in assign(wanted, parse_nodes(nodes)).items()}
    for node in parse_nodes(nodes):
        here = ", ".join(f"{names[node.name]} {pool}" for pool, names in homes.items() if names[node.name])
        lines.append(f"{node.name} ({amounts(node.resources)}): {here or 'idle'}")
    return lines


def batch_lines(config: TrainConfig, height: int, width: int) -> list[str]:
    """Counts of an iteration, each from its factors."""
    rollout, placement, algorithm = config.rollout, config.placement, build_algorithm(config.algorithm)
    images = rollout.groups * rollout.samples
    chunks = images // rollout.batch
    samplers = placement.rollout_actors if placement.kind == "separate" else placement.ranks
    most = max(map(len, deal(chunks, samplers)))
    chain = rollout_chain(config.sampling, config.run.seed, 0, algorithm)
    share = [rollout.batch] * (chunks // placement.ranks)
    micro = sum(map(len, plan_updates(share, config.engine.micro_batch, algorithm.updates)))
    points = len(algorithm.points(chain, 0))
    pixels_mb = images * 3 * height * width / 1e6
    return [
        f"rollouts         {rollout.groups} tasks x {rollout.samples} samples = {images}, {chain.evaluations} network evaluations each",
        f"sampling         {chunks} chunks of {rollout.batch} over {samplers} sampler(s): at most {most} each",
        f"training         {images // placement.ranks} rollouts a rank = {micro} micro-batches of {config.engine.micro_batch} x "
        f"{points} points, {algorithm.updates} optimiser step(s)",
        f"images           {width}x{height} px, {pixels_mb:.3g} MB of uint8 to the reward workers",
        f"run              {config.run.steps} iterations = {images * config.run.steps} rollouts; evaluation "
        f"{config.evaluate.tasks} tasks x {config.evaluate.samples} seeds",
    ]


def memory_lines(config: TrainConfig) -> list[str]:
    """What a trainer rank (and a rollout actor) holds whatever the batch is, by the formulas of `planning.memory`."""
    restorer, engine = build_restorer(config.restorer), config.engine
    named = dict(restorer.denoiser.named_parameters())
    trained = set(select_trainable(restorer.denoiser, engine.trainable or restorer.trainable))
    frozen = [value for name, value in named.items() if name not in trained]
    network = Network(
        parameters=sum(value.numel() for value in named.values()),
        trained=sum(named[name].numel() for name in trained),
        lora=getattr(config.restorer.config, "lora_rank", 0) > 0,
        frozen_bytes=frozen[0].element_size() if frozen else 4,
        trained_bytes=2 if engine.precision == "bfloat16" else 4,
        largest_layer=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in restorer.denoiser.modules()),
    )
    needs = build_algorithm(config.algorithm).needs
    copies = Copies(needs.old_policy, needs.reference or config.regularise.asks_reference)
    memory = trainer_memory(network, Sharding(engine.kind, engine.zero, config.placement.ranks), copies)
    lines = [f"{item.name:16} {item.bytes / 1e6:10,.1f} MB  {item.formula}" for item in memory.items]
    lines.append(f"{'peak':16} {memory.peak / 1e6:10,.1f} MB  while it is in '{memory.peak_phase}'")
    if config.placement.kind == "separate":
        lines.append(f"{'rollout actor':16} {rollout_memory(network).peak / 1e6:10,.1f} MB")
    return [*lines, "activations, libraries and the price in time: rlrestore plan"]


def command_lines(config: TrainConfig, config_path: Path, overrides: Sequence[str]) -> list[str]:
    command = shlex.join(["rlrestore", "train", str(config_path), *overrides])
    if config.placement.kind == "local" or config.ray.address is None:
        return [f"{command}      # on this machine; the same command resumes"]
    return [
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=TOKEN_FILE      # on every node: the same file, mode 600",
        "ray start --head --port=6379                                  # on the first node",
        "ray start --address=HEAD:6379                                 # on each other node",
        f"{command}      # on any of them; the same command resumes",
        "or let scripts/launch/ do it: SLURM, ray job submit, KubeRay (docs/launching.md)",
    ]
