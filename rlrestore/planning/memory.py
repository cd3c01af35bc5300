"""Bytes that one trainer rank holds, from counts: a pure reckoning of what `Learner`, the engines and the families keep.

In: how many parameters there are and move (`Network`), who shards what (`Sharding`), which further policies the method keeps
(`Copies`), what a backward saves (`saved_by_transformer`). Out: a `Memory` of named items, each with its formula. An item counts
in the phases in which it lives; the peak is what always lives and the largest phase. Letters: N all parameters of the denoiser,
T trained ones, F = N - T, W ranks, b and t bytes of a frozen and of a trained weight.

Not counted: the process itself (`process` is given), the reward workers, fragmentation (`slack`), and what lies in the host's
memory for a while: a base that is being opened (b F + t T on every rank), weights that rank 0 saves or publishes (4 T).
Beside measurements: `python scripts/bench_memory.py`, docs/families.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PHASES = ("load", "sample", "backward", "step")
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Network:
    """The denoiser and what lies frozen beside it."""

    parameters: int  # N
    trained: int  # T: the adapter's with LoRA
    lora: bool  # copies of the policy are adapters of T parameters, not whole networks
    frozen_bytes: int = 2  # b: bytes of a frozen weight
    trained_bytes: int = 4  # t: of a trained one as the engine has it: 4, with engine.precision=bfloat16 2
    largest_layer: int = 0  # parameters that ZeRO-3 has to hold whole together, however few it may
    beside: int = 0  # parameters of VAE and the like, float32

    @property
    def frozen(self) -> int:
        return self.parameters - self.trained


@dataclass(frozen=True)
class Sharding:
    engine: str = "torch"  # torch | deepspeed
    zero: int = 0  # of deepspeed
    ranks: int = 1  # W
    offload: str = "none"  # none | optimiser | weights
    bucket: int = 50_000_000  # elements that DeepSpeed reduces or gathers together
    live: int = 150_000_000  # elements that ZeRO-3 holds whole at a time, prefetched ones included

    @property
    def stage(self) -> int:
        return self.zero if self.engine == "deepspeed" else 0

    @property
    def optimiser(self) -> int:
        """Ranks over which optimiser state and master weights are split."""
        return self.ranks if self.stage >= 1 else 1

    @property
    def gradients(self) -> int:
        return self.ranks if self.stage >= 2 else 1

    @property
    def weights(self) -> int:
        return self.ranks if self.stage == 3 else 1


@dataclass(frozen=True)
class Copies:
    """Policies beside the current one. Evaluation's `scratch`, the start (`base`) and the EMA are always kept."""

    old: bool = False  # the algorithm keeps a slow copy (NFT)
    reference: bool = False  # a penalty or a method asks for the frozen start

    @property
    def twins(self) -> int:
        """Networks (adapters, with LoRA) that can be asked beside the current one."""
        return 1 + self.old + self.reference


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    formula: str  # with the letters of this module
    phases: tuple[str, ...] = PHASES  # in which it lives
    host: bool = False  # offloaded: in the host's memory and not the GPU's


@dataclass(frozen=True)
class Memory:
    """What one rank holds."""

    items: tuple[Item, ...]

    @property
    def resident(self) -> int:
        """Bytes on the device that live in every phase."""
        return sum(item.bytes for item in self.items if item.phases == PHASES and not item.host)

    @property
    def host(self) -> int:
        """Bytes that were offloaded."""
        return sum(item.bytes for item in self.items if item.host)

    def phase(self, name: str) -> int:
        """Bytes on the device that live in this phase, the resident ones included."""
        return sum(item.bytes for item in self.items if name in item.phases and not item.host)

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.phase)

    @property
    def peak(self) -> int:
        return self.phase(self.peak_phase)


def trainer_memory(
    network: Network,
    sharding: Sharding,
    copies: Copies,
    *,
    saved: int = 0,
    sampling: int = 0,
    process: int = 0,
    slack: float = 0.0,
) -> Memory:
    """Bytes of one trainer rank.

    saved: activations of one micro-batch's backward (`saved_by_transformer`). sampling: live tensors of one chunk's forward and
    decode. process: libraries and, on a GPU, its context. slack: fraction added for the allocator (0.1 is usual on a GPU).
    """
    items = [
        Item("process", process, "given"),
        *_offloaded(sharding, [*_weights(network, sharding), *_optimiser(network, sharding)]),
        *_copies(network, sharding, copies),
        Item("activations", saved, "saved by one micro-batch", ("backward",)),
        Item("sampling", sampling, "one chunk", ("sample",)),
    ]
    if slack:
        held = Memory(tuple(items))
        items.append(Item("allocator slack", round(slack * (held.peak - process)), f"{slack:.0%} of the peak"))
    return Memory(tuple(item for item in items if item.bytes))


def rollout_memory(network: Network, *, sampling: int = 0, process: int = 0) -> Memory:
    """Bytes of one rollout actor (placement `separate`): whole weights, no optimiser, published weights as they arrive."""
    b, t = network.frozen_bytes, network.trained_bytes
    items = (
        Item("process", process, "given"),
        Item("weights", b * network.frozen + t * network.trained, "b F + t T"),
        Item("VAE", 4 * network.beside, "4 per parameter"),
        Item("published weights", 8 * network.trained, "4 T as bytes, 4 T as tensors", ("load",)),
        Item("sampling", sampling, "one chunk", ("sample",)),
    )
    return Memory(tuple(item for item in items if item.bytes))


OFFLOADED = {
    "none": (),
    "optimiser": ("master weights", "moments", "gradients", "float32 gradients", "step's scratch"),
}
OFFLOADED["weights"] = (*OFFLOADED["optimiser"], "frozen weights", "trained weights")


def _offloaded(sharding: Sharding, items: list[Item]) -> list[Item]:
    return [replace(item, host=item.name in OFFLOADED[sharding.offload]) for item in items]


def _weights(network: Network, sharding: Sharding) -> list[Item]:
    b, t, over = network.frozen_bytes, network.trained_bytes, sharding.weights
    split = "" if over == 1 else " / W"
    items = [
        Item("frozen weights", b * network.frozen // over, f"b F{split}"),
        Item("trained weights", t * network.trained // over, f"t T{split}"),
        Item("VAE", 4 * network.beside, "4 per parameter"),
    ]
    if sharding.stage == 3:
        items += [
            Item(
                "gathered layers",
                b * max(network.largest_layer, min(network.parameters, sharding.live)),
                "b max(largest layer, min(N, live))",
                ("sample", "backward"),
            ),
        ]
    return items


def _optimiser(network: Network, sharding: Sharding) -> list[Item]:
    """AdamW's moments, master weights, gradients and what a step needs for a while."""
    t, trained, stage = network.trained_bytes, network.trained, sharding.stage
    split = "" if sharding.optimiser == 1 else " / W"
    master = 4 if stage >= 1 or t == 2 else 0  # stage 0 and torch step on the weights themselves
    moments = (
        8 if sharding.engine == "deepspeed" or t == 4 else 2 * t
    )  # torch's AdamW has its state in the weights' precision
    gradients = t * trained // sharding.gradients
    bucket = min(sharding.bucket, trained) * t
    learn = ("backward", "step")
    items = [
        Item("master weights", master * trained // sharding.optimiser, f"4 T{split}"),
        Item("moments", moments * trained // sharding.optimiser, f"{moments} T{split}"),
        Item(
            "gradients",
            gradients,
            "t T" if sharding.gradients == 1 else "t T / W",
            PHASES if stage == 3 else learn,  # stage 3 keeps its buffer
        ),
        # AdamW's root and its quotient, of all that one rank steps at once (DeepSpeed hands it one flat tensor)
        Item("step's scratch", 8 * trained // sharding.optimiser, f"8 T{split}", ("step",)),
    ]
    if stage >= 1:
        items += [
            Item("float32 gradients", 4 * trained // sharding.optimiser, "4 T / W", ("step",)),
            Item("reduce bucket", bucket, "t min(bucket, T)", ("backward",)),
        ]
    elif sharding.ranks > 1:
        items.append(Item("summed gradients", t * trained, "t T", ("step",)))
    return items


def _copies(network: Network, sharding: Sharding, copies: Copies) -> list[Item]:
    """`Learner.base`, `.ema`, `.old_shadow` (kept by slices) and the twins: adapters, or whole networks on every rank."""
    t, trained = network.trained_bytes, network.trained
    if network.lora:
        each, formula = t * trained // sharding.weights, "t T" if sharding.weights == 1 else "t T / W"
    else:
        each, formula = network.frozen_bytes * network.frozen + t * trained, "b F + t T, whole on every rank"
    kept = 4 * trained // sharding.ranks
    return [
        Item("scratch of evaluation", each, formula),
        Item("old policy", each * copies.old, formula),
        Item("reference policy", each * copies.reference, formula),
        Item("start (base)", kept, "4 T / W"),
        Item("EMA", kept, "4 T / W"),
        Item("old policy in float32", kept * copies.old, "4 T / W"),
    ]


# Saved bytes a token, hidden unit and byte of precision, of one block: counted with saved-tensor hooks (bfloat16 base, SDPA).
# With LoRA on the attention layers, what only frozen linears would need is not saved; each float32 adapter saves its input in float32.
BLOCK_FULL = {"flux_double": 28, "flux_single": 25, "qwen": 28, "sd3": 29}
BLOCK_LORA = {"flux_double": 22, "flux_single": 19, "qwen": 24, "sd3": 24}


@dataclass(frozen=True)
class Transformer:
    """What a backward through a diffusion transformer saves depends on."""

    blocks: tuple[tuple[str, int], ...]  # (kind of BLOCK_FULL, how many)
    hidden: int
    tokens: int  # of one sample: text, image and LQ
    bytes: int = 2  # of an activation

    @property
    def layers(self) -> int:
        return sum(count for _, count in self.blocks)


def saved_by_transformer(model: Transformer, micro_batch: int, *, lora: bool, checkpointing: bool) -> int:
    """Bytes that one micro-batch's forward keeps for its backward.

    With checkpointing each block keeps its input, and the block that is being repeated all that it needs.
    """
    unit = model.tokens * model.hidden * model.bytes * micro_batch
    costs = BLOCK_LORA if lora else BLOCK_FULL
    if checkpointing:
        return unit * (model.layers + max(costs[kind] for kind, _ in model.blocks))
    return unit * sum(costs[kind] * count for kind, count in model.blocks)
