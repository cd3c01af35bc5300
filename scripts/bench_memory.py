"""Peak memory a rank, measured beside the formula of `rlrestore.planning.memory`, for a random transformer of 220 M parameters.

A Kontext pipeline is saved to disk and trained by two CPU ranks for one GRPO iteration (sample, update, EMA, evaluation's
weights), once a row. Measured is the largest resident set of either rank (VmHWM) less what the process had after its imports, phase
by phase; opening the pipeline does not count. Needs 10 GB of memory and 2 GB of disk:

    python scripts/bench_memory.py [--size 48] [--only lora]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
import yaml

from rlrestore.build import LearnerRecipe, build_env, load_train_config
from rlrestore.engine.build import free_port
from rlrestore.iteration.credit import Credit
from rlrestore.iteration.stages import make_chunks, rollout_chain, update_requests
from rlrestore.planning.memory import (
    Copies,
    Memory,
    Network,
    Sharding,
    Transformer,
    saved_by_transformer,
    trainer_memory,
)
from rlrestore.quiet import quiet

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
RANKS, ROWS = 2, 1  # rows of a chunk and of a micro-batch
HIDDEN, HEAD, DOUBLE, SINGLE, TEXT = 1024, 128, 4, 4, 6
VAE_PX = 4  # pixels of a token's side: the tiny VAE halves, a token is 2 x 2 cells
CASES = [(mode, zero, checkpointing) for checkpointing in (False, True) for mode in ("lora", "full") for zero in (2, 3)]


def save_kontext(folder: Path, heads: int = HIDDEN // HEAD, layers: tuple[int, int] = (DOUBLE, SINGLE)) -> int:
    """A random pipeline, its transformer in bfloat16; returns the number of the transformer's parameters."""
    import diffusers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=layers[0], num_single_layers=layers[1], attention_head_dim=HEAD, num_attention_heads=heads,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    ).to(torch.bfloat16)  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip
    diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, transformer=transformer,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    ).save_pretrained(folder / "kontext")  # fmt: skip
    save_file(
        {"prompt_embeds": torch.randn(1, TEXT, 64), "pooled_prompt_embeds": torch.randn(1, 64)},
        folder / "prompt.safetensors",
    )
    return sum(parameter.numel() for parameter in transformer.parameters())


def write_config(folder: Path, mode: str, zero: int, checkpointing: bool, size: int) -> Path:
    lora = mode == "lora"
    config: dict[str, Any] = {
        "run": {"name": "bench", "dir": str(folder / "runs"), "steps": 1},
        "env": {"kind": "photos", "size": size},
        "restorer": {
            "kind": "flux_kontext", "weights": str(folder / "kontext"), "prompt_embeds": str(folder / "prompt.safetensors"),
            "lora_rank": 32 if lora else 0, "checkpointing": checkpointing,
        },
        "algorithm": {"kind": "grpo", "updates": 1},
        "rewards": {"ssim_rgb": {}},
        "rollout": {"groups": 1, "samples": RANKS * ROWS, "batch": ROWS},
        "sampling": {"steps": 2, "window": 1, "window_range": [0, 1]},
        "engine": {"kind": "deepspeed", "zero": zero, "precision": "float32" if lora else "bfloat16", "micro_batch": ROWS},
        "placement": {"kind": "colocated", "ranks": RANKS},
    }  # fmt: skip
    path = folder / f"{mode}_{zero}_{checkpointing}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def give_back_what_is_freed() -> None:
    """From here on the peak is of tensors, not of glibc's heap: blocks of 64 KiB and more have pages of their own.

    By default the heap keeps freed blocks of up to 32 MiB, and ZeRO-3 frees a layer of the network after the other. Environment
    variables come too late: glibc reads them when the process starts.
    """
    libc = ctypes.CDLL("libc.so.6")
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        if libc.mallopt(parameter, 65536) != 1:
            raise SystemExit("error: glibc's mallopt refused: measured would be its heap")


def status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Peak:
    """Puts the largest resident set between its two ends into `peaks`, less `before`, kB."""

    def __init__(self, peaks: dict[str, int], name: str, before: int):
        self.peaks, self.name, self.before = peaks, name, before

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is resident

    def __exit__(self, *_: object) -> None:
        self.peaks[self.name] = status_kb("VmHWM") - self.before


def iteration(rank: int, config_path: str) -> dict[str, Any]:
    """Build, sample, update, load evaluation's weights; the peak of each, kB, less what the process had before."""
    config = load_train_config(config_path)
    env = build_env(config.env)
    tasks = env.draw(0, 1)
    gc.collect()
    before = status_kb("VmRSS")
    learner = LearnerRecipe.of(config).build(rank, RANKS)
    gc.collect()
    peaks = {"resident": status_kb("VmRSS") - before}
    chain = rollout_chain(config.sampling, 0, 0, learner.algorithm)
    chunks = make_chunks(tasks, RANKS * ROWS, ROWS, 0, 0)
    with Peak(peaks, "sample", before):
        learner.sample(chunks[rank], chain)
    credit = Credit(torch.tensor([1.0, -1.0] * ROWS), torch.ones(ROWS * RANKS), {})
    step, backward = learner.engine.step, Peak(peaks, "backward", before)

    def measured_step(lr: float) -> float:
        backward.__exit__()
        with Peak(peaks, "step", before):
            return step(lr)

    learner.engine.step = measured_step  # type: ignore[method-assign]
    backward.__enter__()
    learner.update(update_requests(chunks, credit, RANKS, ROWS, 1, 0, 0)[rank], chain)
    with Peak(peaks, "copies", before):
        learner.load_scratch("ema")
    return {"peaks": peaks, "trained": learner.trained}


def rank_main(rank: int, config_path: str, warm_path: str, port: int, answer: str) -> None:
    """An iteration of a tiny model, so that nothing is loaded for the first time later; then the one that is measured."""
    torch.set_num_threads(1)
    from rlrestore.engine.group import join_group

    join_group(rank, RANKS, "127.0.0.1", port, 1800.0)
    iteration(rank, warm_path)
    gc.collect()
    Path(f"{answer}{rank}").write_text(json.dumps(iteration(rank, config_path)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_a_fork(function: Callable[[Path], int], folder: Path) -> int:
    """Run it in a child, so that this process never computes and can still be forked."""
    answer = folder / "answer"
    child = torch.multiprocessing.get_context("fork").Process(target=lambda: answer.write_text(str(function(folder))))
    child.start()
    child.join()
    return int(answer.read_text())


def reckon(mode: str, zero: int, checkpointing: bool, size: int, parameters: int, trained: int) -> Memory:
    lora = mode == "lora"
    network = Network(
        parameters + trained if lora else parameters, trained, lora, trained_bytes=4 if lora else 2, beside=44_000
    )
    tokens = TEXT + 2 * (size // VAE_PX) ** 2
    model = Transformer((("flux_double", DOUBLE), ("flux_single", SINGLE)), HIDDEN, tokens)
    saved = saved_by_transformer(model, ROWS, lora=lora, checkpointing=checkpointing)
    return trainer_memory(network, Sharding("deepspeed", zero, RANKS), Copies(), saved=saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="side of the photos in pixels (default 48)")
    parser.add_argument("--only", help="e.g. lora, or lora-3")
    parser.add_argument("--items", action="store_true", help="print what the formula is made of")
    options = parser.parse_args()
    quiet()
    give_back_what_is_freed()
    os.environ["DS_ACCELERATOR"] = "cpu"
    import diffusers
    import peft  # noqa: F401

    import rlrestore.engine.deepspeed_engine  # noqa: F401  (what libraries take is not the model's)

    _ = diffusers.FluxKontextPipeline, diffusers.FluxTransformer2DModel, diffusers.AutoencoderKL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = in_a_fork(save_kontext, folder)
        (folder / "tiny").mkdir()
        in_a_fork(lambda path: save_kontext(path, heads=1, layers=(1, 1)), folder / "tiny")
        print(f"{parameters / 1e6:.0f} M parameters, {RANKS} ranks; MB a rank, measured / formula\n")
        print(
            "| weights | ZeRO | checkpointing | resident | sample | backward | step | copies | peak | formula | error |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for mode, zero, checkpointing in CASES:
            if options.only not in (None, mode, f"{mode}-{zero}"):
                continue
            config, answer = write_config(folder, mode, zero, checkpointing, options.size), str(folder / "answer")
            warm = write_config(folder / "tiny", mode, zero, checkpointing, options.size)
            # forked, so that two dozen processes do not import everything again; nothing has computed here yet
            torch.multiprocessing.start_processes(
                rank_main, (str(config), str(warm), free_port(), answer), nprocs=RANKS, start_method="fork"
            )
            found = [json.loads(Path(f"{answer}{rank}").read_text()) for rank in range(RANKS)]
            peaks = {name: max(item["peaks"][name] for item in found) * 1.024e-3 for name in found[0]["peaks"]}
            memory = reckon(mode, zero, checkpointing, options.size, parameters, found[0]["trained"])
            peak, reckoned = max(peaks.values()), memory.peak / 1e6
            cells = [f"{peaks[name]:.0f} / {memory.phase(name) / 1e6:.0f}" for name in ("sample", "backward", "step")]
            print(
                f"| {mode} | {zero} | {'on' if checkpointing else 'off'} | {peaks['resident']:.0f} / {memory.resident / 1e6:.0f} | "
                f"{' | '.join(cells)} | {peaks['copies']:.0f} | {peak:.0f} | {reckoned:.0f} | {reckoned / peak - 1:+.0%} |",
                flush=True,
            )
            if options.items:
                for item in memory.items:
                    print(
                        f"  {item.name}: {item.bytes / 1e6:.0f} = {item.formula} ({', '.join(item.phases)})", flush=True
                    )


if __name__ == "__main__":
    main()
