"""Images a second of a random Kontext of 82 M parameters, beside plain loops over its diffusers pipeline at the same steps.

Three ways to make K samples of each of G photos, run in turn so that a busy machine treats them alike: our sampler (each LQ encoded
once, full batches), the pipeline called once a sample, and the pipeline called once a photo for K samples. All pictures are of one
size and float32; the first round warms up and is not counted. Run it on an idle machine:

    python scripts/bench_families.py [--groups 2] [--samples 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from envs.types import Task
from rlrestore.build import RESTORERS
from rlrestore.diffusion.sampling import Chain
from rlrestore.iteration.rollout import Sampler
from rlrestore.iteration.stages import make_chunks
from rlrestore.quiet import quiet

HIDDEN, DOUBLE, SINGLE, TEXT = 768, 3, 2, 16
SIZE, STEPS, GUIDANCE = 128, 4, 2.5


def save_kontext(folder: Path) -> float:
    """A random pipeline with a VAE of the usual depth; returns millions of parameters of its transformer."""
    import diffusers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=128, num_attention_heads=HIDDEN // 128,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip
    diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, transformer=transformer,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    ).save_pretrained(folder / "kontext")  # fmt: skip
    text = {"prompt_embeds": torch.randn(1, TEXT, 64), "pooled_prompt_embeds": torch.randn(1, 64)}
    save_file(text, folder / "prompt.safetensors")
    return sum(parameter.numel() for parameter in transformer.parameters()) / 1e6


class Stopwatch:
    """Seconds inside a module's forward."""

    def __init__(self, module: torch.nn.Module):
        self.seconds, self.start = 0.0, 0.0
        module.register_forward_pre_hook(lambda *_: setattr(self, "start", time.perf_counter()))
        module.register_forward_hook(self._stop)

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=2, help="photos (default 2)")
    parser.add_argument("--samples", type=int, default=4, help="samples of each (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default 3)")
    options = parser.parse_args()
    quiet()
    groups, samples = options.groups, options.samples
    with tempfile.TemporaryDirectory() as name:
        millions = save_kontext(Path(name))
        ways = build_ways(Path(name), groups, samples)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    inside: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way, (run, watch) in ways.items():
            watch.seconds = 0.0
            start = time.perf_counter()
            run()
            if turn:
                seconds[way].append(time.perf_counter() - start)
                inside[way].append(watch.seconds)
    print(
        f"{millions:.0f} M parameters, {groups} photos x {samples} samples of {SIZE} px, {STEPS} steps, median of {options.rounds}\n"
    )
    print("| way | images/s | outside the transformer |\n|---|---|---|")
    for way in ways:
        whole = statistics.median(seconds[way])
        outside = 1 - statistics.median(a / b for a, b in zip(inside[way], seconds[way], strict=True))
        print(f"| {way} | {groups * samples / whole:.3f} | {outside:.0%} |")


def build_ways(folder: Path, groups: int, samples: int) -> dict[str, tuple[Callable[[], None], Stopwatch]]:
    import diffusers

    schema, family = RESTORERS["flux_kontext"]
    restorer = family(
        schema(
            weights=str(folder / "kontext"), prompt_embeds=str(folder / "prompt.safetensors"), precision="float32", lora_rank=0
        )
    )  # fmt: skip
    restorer.denoiser.requires_grad_(False)
    pipe: Any = diffusers.FluxKontextPipeline.from_pretrained(
        folder / "kontext", text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    )
    pipe.set_progress_bar_config(disable=True)
    photos = torch.rand(groups, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    tasks = [Task(f"photo{index}", photo, ()) for index, photo in enumerate(photos)]
    chunks = make_chunks(tasks, samples, groups * samples, 0)
    chain = Chain(tuple(restorer.times(STEPS, (SIZE, SIZE))))
    text = restorer.prompt

    def ours() -> None:
        sampler = Sampler(restorer)
        for chunk in chunks:
            sampler.sample(chunk, chain, restorer.denoiser, 0, "")

    def call(photo: Tensor, count: int) -> None:
        pipe(
            image=photo[None], prompt_embeds=text["prompt_embeds"], pooled_prompt_embeds=text["pooled_prompt_embeds"],
            height=SIZE, width=SIZE, max_area=SIZE * SIZE, _auto_resize=False, num_inference_steps=STEPS,
            guidance_scale=GUIDANCE, num_images_per_prompt=count, output_type="pt",
        )  # fmt: skip

    transformer: Any = restorer.denoiser.transformer
    theirs = Stopwatch(pipe.transformer)
    return {
        "rlrestore": (ours, Stopwatch(transformer)),
        "pipeline, a call a sample": (lambda: [call(photo, 1) for photo in photos for _ in range(samples)], theirs),  # type: ignore[dict-item]
        "pipeline, a call a photo": (lambda: [call(photo, samples) for photo in photos], theirs),  # type: ignore[dict-item]
    }


if __name__ == "__main__":
    main()
