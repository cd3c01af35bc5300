"""What a run keeps and moves besides memory: traffic, files, money. Each number with its formula and inputs."""

from __future__ import annotations

from dataclasses import dataclass

from rlrestore.planning.memory import Copies, Network, Sharding
from rlrestore.planning.pipeline import Stages
from rlrestore.planning.workload import Constants, Workload

NOT_KNOWN = "left out: --probe measures it"
IN_FLIGHT_SHARE = 0.3  # of the object store that an iteration's live objects may fill before it spills


@dataclass(frozen=True)
class Line:
    """One number of a plan."""

    name: str
    value: float
    unit: str
    formula: str


def traffic(work: Workload) -> list[Line]:
    """Bytes of one iteration through the object store; nothing in `local`."""
    size = work.bytes
    chunks = len(work.chunks)
    if work.kind == "local":
        return [Line("object store", 0.0, "B", "one process: nothing is sent")]
    tasks = _tasks_in_chunks(work) * size.task
    images = work.rollouts * size.image
    lines = [
        Line("tasks to samplers and rewards", tasks, "B", f"{_tasks_in_chunks(work)} tasks in {chunks} chunks x {size.task} B"),
        Line("images to rewards", images, "B", f"{work.rollouts} rollouts x {size.image} B (uint8)"),
    ]  # fmt: skip
    if work.kind == "separate":
        latents = work.rollouts * size.latent
        lines += [
            Line("latents to trainers", latents, "B", f"{work.rollouts} rollouts x {size.latent} B"),
            Line("weights to samplers", size.published * work.samplers, "B", f"{work.samplers} x {size.published} B"),
        ]
    lines.append(Line("object store", sum(line.value for line in lines), "B", "sum of the above"))
    return lines


def in_flight(work: Workload) -> float:
    """Bytes that live in the object store at once, at the most: an iteration's chunks and images, and what may lag behind."""
    size = work.bytes
    one = _tasks_in_chunks(work) * size.task + work.rollouts * size.image
    if work.kind == "separate":
        one += work.rollouts * size.latent + size.published
    return one * (1 + work.staleness)


def _tasks_in_chunks(work: Workload) -> int:
    """A group that is cut by a chunk's edge travels with both."""
    edges, start, total = [], 0, 0
    for rows in work.chunks:
        edges.append((start, start + rows))
        start += rows
    for first, last in edges:
        total += (last - 1) // work.samples - first // work.samples + 1
    return total


def checkpoint_bytes(network: Network, sharding: Sharding, copies: Copies) -> list[Line]:
    """One checkpoint on shared storage; tensors in safetensors, DeepSpeed's own files as it writes them."""
    trained, t = network.trained, network.trained_bytes
    whole = network.parameters if not network.lora else trained
    if sharding.engine == "deepspeed":
        master = 4 * trained if sharding.stage >= 1 or t == 2 else 0
        engine = Line(
            "engine", t * trained + master + 8 * trained, "B", f"{t} T weights + {master // max(1, trained)} T master + 8 T moments"
        )  # fmt: skip
    else:
        engine = Line("engine", t * trained + 2 * t * trained, "B", f"{t} T weights + {2 * t} T moments")
    lines = [
        engine,
        Line("EMA", 4 * trained, "B", "4 T"),
        Line("start (base)", t * trained, "B", f"{t} T"),
        Line(
            "what `restore` opens", 4 * whole + 4 * network.beside, "B", "4 N + 4 per parameter beside, with LoRA 4 T"
        ),
    ]
    if copies.old:
        lines.append(Line("old policy", 4 * trained, "B", "4 T"))
    return [*lines, Line("checkpoint", sum(line.value for line in lines), "B", "sum of the above")]


def run_seconds(work: Workload, constants: Constants, iteration_s: float) -> list[Line]:
    """The whole run: iterations, evaluations of base and tuned, checkpoints."""
    evaluations = work.evaluations * work.evaluation_rows * constants.evaluation_row_s / work.ranks
    lines = [
        Line("iterations", work.iterations * iteration_s, "s", f"{work.iterations} x {iteration_s:.3g} s"),
        Line(
            "evaluations", evaluations, "s",
            f"{work.evaluations} x {work.evaluation_rows} images x {constants.evaluation_row_s:.3g} s / {work.ranks} ranks"
            if constants.evaluation_row_s else NOT_KNOWN,
        ),
        Line(
            "checkpoints", work.checkpoints * constants.checkpoint_s, "s",
            f"{work.checkpoints} x {constants.checkpoint_s:.3g} s" if constants.checkpoint_s else NOT_KNOWN,
        ),
    ]  # fmt: skip
    return [*lines, Line("run", sum(line.value for line in lines), "s", "sum of the above")]


def cost(gpus: int, seconds: float, price_eur: float) -> Line:
    return Line(
        "cost", gpus * seconds / 3600 * price_eur, "EUR", f"{gpus} GPUs x {seconds / 3600:.3g} h x {price_eur:g} EUR"
    )


def stage_lines(stages: Stages) -> list[Line]:
    """An iteration by stage, from the closed forms of `pipeline.py`."""
    return [
        Line("sample", stages.sample, "s", "chunks of the busiest sampler x (fixed + rows x row)"),
        Line("score", stages.score, "s", "what sampling does not hide"),
        Line("update", stages.update, "s", "micro-batches of the busiest rank x points x micro + updates x (step + all-reduce)"),
        Line("publish", stages.publish, "s", "weights to the samplers' nodes, in a tree"),
        Line("driver", stages.driver, "s", "tasks x draw + chunks x calls + credit and log"),
    ]  # fmt: skip
