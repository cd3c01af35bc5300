"""The model against runs that others have published: predicted seconds of an iteration, published ones, the error.

Two ways. *calibrated*: constants are fitted to some rows of a table and predict the others, which tests how the parts add up.
*from FLOPs*: nothing is fitted; FLOPs of the network over peak x MFU. Peaks are the vendors' dense bfloat16 figures; MFU is the
middle of what is usual, not measured. What a source leaves open is assumed, and said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlrestore.planning.pipeline import pipeline_of
from rlrestore.planning.simulate import simulate
from rlrestore.planning.workload import Bytes, Cluster, Constants, Cost, Workload

MFU = 0.4  # of the range 0.3 to 0.45 that is usual for diffusion transformers on H100-class devices
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12}
LORA_BACKWARD, FULL_BACKWARD, RECOMPUTED = 1.5, 2.0, 1.0  # forwards that a backward costs, and checkpointing adds
IB_NODE_BPS = 8 * 50e9  # eight 400 Gbit/s links


@dataclass(frozen=True)
class Check:
    """One published number beside ours. Seconds of an iteration."""

    run: str
    how: str  # "calibrated" | "from FLOPs"
    predicted_s: float
    published_s: float
    note: str

    @property
    def error(self) -> float:
        return self.predicted_s / self.published_s - 1


def dit_forward_flops(layers: int, hidden: int, image_tokens: int, text_tokens: int) -> float:
    """Of a two-stream transformer (12 hidden^2 weights a block and stream) on one image.

    2 * 12 L h^2 (S_image + S_text) for the linears, 4 L (S_image + S_text)^2 h for attention.
    """
    tokens = image_tokens + text_tokens
    return 24 * layers * hidden**2 * tokens + 4 * layers * tokens**2 * hidden


@dataclass(frozen=True)
class Published:
    """An iteration as its authors state it, for the simulation."""

    gpus: int
    groups: int
    samples: int
    forwards: float  # network evaluations of a rollout, guidance included
    points: int  # trained steps of a rollout
    evaluations: float  # forwards of a trained step: guidance doubles them
    backward: float  # forwards that its backward costs
    updates: int = 1
    nodes: int = 1
    sharded_bytes: int = 0  # weights that every forward and backward gathers

    def iteration_s(self, forward_s: float, train_s: float | None = None) -> float:
        """`forward_s` of one image on one GPU; `train_s` of one trained step, else from `evaluations` and `backward`."""
        train = forward_s * self.evaluations * (1 + self.backward) if train_s is None else train_s
        rows = max(1, self.groups * self.samples // self.gpus)
        work = Workload(
            groups=self.groups, samples=self.samples, chunk_rows=rows, micro_rows=max(1, rows // self.updates),
            points=self.points, updates=self.updates, kind="colocated", ranks=self.gpus, rollout_actors=0,
            reward_workers=self.gpus, staleness=0, iterations=1, evaluations=0, evaluation_rows=0, checkpoints=0,
            tasks_drawn=0, bytes=Bytes(0, 0, 0, 0, 0, self.sharded_bytes),
        )  # fmt: skip
        constants = Constants(
            Cost(0.0, forward_s * self.forwards), Cost(0.0, train), 0.0, Cost(), 0.0, 0.0, "published"
        )  # fmt: skip
        cluster = Cluster(
            self.nodes, self.gpus // self.nodes, gpus=True, link_Bps=IB_NODE_BPS / (self.gpus // self.nodes), call_s=0.0
        )
        return simulate(pipeline_of(work, constants, cluster), iterations=1, warmup=1).iteration_s


# arXiv 2509.06040, table 1: FLUX, 16 H200, 720 px; forwards of a rollout, trained steps, seconds of an iteration.
BRANCH_GRPO = {
    "DanceGRPO, all steps": (20.0, 20.0, 698.0),
    "DanceGRPO, 60 % of the steps": (20.0, 12.0, 469.0),
    "MixGRPO, window of 5": (20.0, 5.0, 289.0),
    "BranchGRPO": (13.68, 13.68, 493.0),
    "BranchGRPO, pruned": (13.68, 8.625, 314.0),
    "BranchGRPO-Mix": (13.68, 4.25, 148.0),
}
FITTED = ("DanceGRPO, all steps", "DanceGRPO, 60 % of the steps")


def branch_grpo() -> list[Check]:
    """Two rows give the seconds of a forward and of a trained step; the others follow."""
    (forwards, all_steps, all_s), (_, some_steps, some_s) = (BRANCH_GRPO[name] for name in FITTED)
    train_s = (all_s - some_s) / (all_steps - some_steps)
    forward_s = (all_s - all_steps * train_s) / forwards
    checks = []
    for name, (old, new, published_s) in BRANCH_GRPO.items():
        if name not in FITTED:
            run = Published(gpus=16, groups=16, samples=1, forwards=old, points=1, evaluations=1, backward=0)
            predicted_s = run.iteration_s(forward_s, new * train_s)
            checks.append(
                Check(f"{name} (FLUX, 16 H200)", "calibrated", predicted_s, published_s, "on both DanceGRPO rows")
            )
    return checks


def unirl() -> Check:
    """8 H20, BAGEL and a 7B judge (UniRL issue 307): 77.8 of 165 s were serial scoring, 4.4 s after it was spread."""
    return Check(
        "UniRL, judge on every rank (8 H20)", "calibrated", 165 - 77.8 + 4.4, 73, "on the step with a serial judge; it changed more"
    )  # fmt: skip


# Qwen-Image: 60 blocks, hidden 3072. Not stated and assumed: 512 px (1,024 tokens), 128 text tokens, 10 steps.
QWEN_FORWARD = dit_forward_flops(60, 3072, 1024, 128)
QWEN_BYTES = 2 * 20_430_000_000
SD1_FORWARD = 0.68e12  # Stable Diffusion 1.4's UNet at 512 px


def verl_omni() -> list[Check]:
    """docs/algo/performance.md of verl-omni: 32 x 16 images an iteration, 2 trained steps, 2 updates."""
    lora = Published(4, 32, 16, forwards=20, points=2, evaluations=2, backward=LORA_BACKWARD + RECOMPUTED, updates=2)
    full = Published(
        4, 32, 16, forwards=10, points=2, evaluations=1, backward=FULL_BACKWARD + RECOMPUTED, updates=2, sharded_bytes=QWEN_BYTES
    )  # fmt: skip
    many = replace(full, gpus=64, nodes=8)
    rows = [
        ("verl-omni FlowGRPO, LoRA, CFG (4 H800)", "H800", lora, 420, "the judge's time is not in the model"),
        ("verl-omni FlowGRPO, LoRA, CFG, judge apart (4 + 1 H800)", "H800", lora, 360, ""),
        ("verl-omni FlowDPPO, LoRA, CFG (4 H200)", "H200", lora, 540, ""),
        ("verl-omni FlowGRPO, full, no CFG (4 H200)", "H200", full, 250, ""),
        ("verl-omni FlowGRPO, full, no CFG (64 H100)", "H100", many, 105, ""),
    ]
    checks = [
        Check(name, "from FLOPs", run.iteration_s(QWEN_FORWARD / (PEAK_FLOPS[device] * MFU)), published_s, note)
        for name, device, run, published_s, note in rows
    ]
    return [*checks, _strong_scaling(full, many)]


def _strong_scaling(small: Published, large: Published) -> Check:
    """A forward's seconds from 4 GPUs (by bisection), used on 64."""
    low, high = 1e-6, 10.0
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if small.iteration_s(middle) < 250 else (low, middle)
    return Check(
        "verl-omni FlowGRPO, full, 4 -> 64 GPUs", "calibrated", large.iteration_s(low), 105, "on the 4: what does not shrink is unknown"
    )  # fmt: skip


def ddpo() -> Check:
    """8 A100, 4 h for 100 epochs: 256 images, 50 steps, all trained, classifier-free guidance."""
    run = Published(8, 256, 1, forwards=100, points=50, evaluations=2, backward=FULL_BACKWARD)
    predicted_s = run.iteration_s(SD1_FORWARD / (PEAK_FLOPS["A100"] * MFU))
    return Check(
        "DDPO (Stable Diffusion 1.4, 8 A100)", "from FLOPs", predicted_s, 4 * 3600 / 100, "256 images an epoch assumed"
    )


def checks() -> list[Check]:
    return [*branch_grpo(), unirl(), *verl_omni(), ddpo()]


def published_table() -> str:
    """Markdown."""
    text = ["| run | how | predicted, s | published, s | error | |", "|---|---|---|---|---|---|"]
    text += [
        f"| {check.run} | {check.how} | {check.predicted_s:.0f} | {check.published_s:.0f} | {check.error:+.0%} | {check.note} |"
        for check in checks()
    ]
    return "\n".join(text)
