"""Tiny random pipelines of every family, saved in diffusers' own format: what stands in for weights of gigabytes.

Same classes, same folders, same options as the real ones. The last layers of a fresh model are often 0; all parameters
are shaken, so that the photo, the prompt and the time all matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rlrestore.build import RESTORERS, build_restorer, load_train_config
from rlrestore.config.files import Plugin
from rlrestore.config.sections import TrainConfig

PROMPT = "restore the photo"


def shake(network: nn.Module, seed: int, scale: float = 0.05) -> Any:
    """The same network, every parameter moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def kl_vae(channels: tuple[int, ...] = (8, 16), quant: bool = True, **options: Any) -> Any:
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **options,
    )
    return shake(vae, 1, 0.02)


def clip(projection: bool = False) -> Any:
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=600,
        projection_dim=16, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    torch.manual_seed(2)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def clip_tokenizer() -> Any:
    """One token a byte, and the same at the end of a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def t5(width: int = 16) -> Any:
    torch.manual_seed(3)
    return T5EncoderModel(T5Config(d_model=width, d_ff=32, d_kv=8, num_heads=2, num_layers=1, vocab_size=300)).eval()


def t5_tokenizer() -> Any:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{chr(c): c for c in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def flow_scheduler(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def ddim(prediction: str) -> Any:
    """SD's betas; trailing spacing and a last step to pure x0, as our schedules have them."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
    )  # fmt: skip


FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


SHAKE = 0.2  # enough that the photo reaches the output


def flux_transformer() -> Any:
    torch.manual_seed(0)
    return shake(diffusers.FluxTransformer2DModel(**FLUX), 4, SHAKE)


def flux_text() -> dict[str, Any]:
    return {
        "text_encoder": clip(), "tokenizer": clip_tokenizer(), "text_encoder_2": t5(), "tokenizer_2": t5_tokenizer(),
    }  # fmt: skip


def flux_vae() -> Any:
    return kl_vae(quant=False, shift_factor=0.1159, scaling_factor=0.3611)


def flux_kontext() -> Any:
    return diffusers.FluxKontextPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=flux_vae(),
        transformer=flux_transformer(),
        **flux_text(),
    )


def flux_controlnet() -> Any:
    transformer = flux_transformer()
    controlnet = diffusers.FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2
    )
    return diffusers.FluxControlNetPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True), vae=flux_vae(), transformer=transformer,
        controlnet=shake(controlnet, 5, SHAKE), **flux_text(),
    )  # fmt: skip


def sd3_controlnet() -> Any:
    sd3 = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32,
        "pos_embed_max_size": 32, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    }  # fmt: skip
    torch.manual_seed(0)
    control = {key: value for key, value in sd3.items() if key not in ("qk_norm", "dual_attention_layers")}
    return diffusers.StableDiffusion3ControlNetPipeline(
        scheduler=flow_scheduler(shift=3.0),
        vae=kl_vae(quant=False, shift_factor=0.0609, scaling_factor=1.5305),
        transformer=shake(diffusers.SD3Transformer2DModel(**sd3), 4, SHAKE),
        controlnet=shake(diffusers.SD3ControlNetModel(**{**control, "num_layers": 1}), 5, SHAKE),
        text_encoder=clip(True), tokenizer=clip_tokenizer(), text_encoder_2=clip(True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(32), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def qwen(pipeline: type) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 0.8, 1.2, 0.9],
    )  # fmt: skip
    return pipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        vae=shake(vae, 1, 0.02), transformer=shake(transformer, 4, SHAKE), text_encoder=None, tokenizer=None,
        processor=None,
    )  # fmt: skip


def flux2_klein() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    vae.bn.running_mean.copy_(0.1 * torch.randn(16))
    vae.bn.running_var.copy_(0.5 + torch.rand(16))
    return diffusers.Flux2KleinPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True), vae=shake(vae, 1, 0.02),
        transformer=shake(transformer, 4, SHAKE), text_encoder=None, tokenizer=None, is_distilled=True,
    )  # fmt: skip


def sd_unet(channels: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), sample_size=16, **options,
    )  # fmt: skip
    return shake(unet, 4, 0.02)


def sd_text() -> dict[str, Any]:
    return {"text_encoder": clip(), "tokenizer": clip_tokenizer()}


def sd_upscale() -> Any:
    return diffusers.StableDiffusionUpscalePipeline(
        vae=kl_vae((8, 8, 16), scaling_factor=0.08333), scheduler=ddim("v_prediction"),
        unet=sd_unet(7, num_class_embeds=1000, only_cross_attention=(False, True)),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        **sd_text(),
    )  # fmt: skip


def sd_controlnet() -> Any:
    unet = sd_unet(use_linear_projection=True)
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    return diffusers.StableDiffusionControlNetPipeline(
        vae=kl_vae(), scheduler=ddim("epsilon"), unet=unet, controlnet=shake(controlnet, 5, SHAKE), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **sd_text(),
    )  # fmt: skip


def one_step() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=kl_vae(), scheduler=ddim("epsilon"), unet=sd_unet(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **sd_text(),
    )  # fmt: skip


def ldm_sr() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=3, num_vq_embeddings=32,
        norm_num_groups=4,
    )  # fmt: skip
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=shake(vqvae, 1, 0.02), unet=shake(unet, 4), scheduler=ddim("epsilon")
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux2_klein": flux2_klein,
    "flux_controlnet": flux_controlnet,
    "flux_kontext": flux_kontext,
    "ldm_sr": ldm_sr,
    "one_step": one_step,
    "qwen_image_edit": lambda: qwen(diffusers.QwenImageEditPipeline),
    "qwen_image_edit_plus": lambda: qwen(diffusers.QwenImageEditPlusPipeline),
    "sd3_controlnet": sd3_controlnet,
    "sd_controlnet": sd_controlnet,
    "sd_upscale": sd_upscale,
}
POOLED = ("flux_controlnet", "flux_kontext")
WITHOUT_TEXT_ENCODER = ("flux2_klein", "qwen_image_edit", "qwen_image_edit_plus")  # large ones: embeddings from a file


def save_pipeline(kind: str, folder: Path) -> Path:
    """The pipeline of a family under folder/kind, unless it is there."""
    target = folder / kind
    if not target.exists():
        PIPELINES[kind]().save_pretrained(target)
    return target


def prompt_options(kind: str, folder: Path, short: bool = False) -> dict[str, str]:
    """What a restorer's config needs for its prompt; `short`: 6 tokens where FLUX's own text side makes 512."""
    if kind not in WITHOUT_TEXT_ENCODER and not (short and kind in POOLED):
        return {"prompt": PROMPT}
    names = {"prompt_embeds": (1, 6, 16), **({"pooled_prompt_embeds": (1, 16)} if kind in POOLED else {})}
    file = folder / f"prompt_{len(names)}.safetensors"
    if not file.exists():
        generator = torch.Generator().manual_seed(6)
        save_file({name: torch.randn(shape, generator=generator) for name, shape in names.items()}, file)
    return {"prompt_embeds": str(file)}


def open_pipeline(kind: str, folder: Path) -> Any:
    """By diffusers alone."""
    absent = {"text_encoder": None, "tokenizer": None, "processor": None} if kind in WITHOUT_TEXT_ENCODER else {}
    if kind == "flux2_klein":
        absent.pop("processor")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


YAML = """
run: {{name: {kind}, dir: {folder}/runs, seed: 0, steps: 1}}
env: {{kind: photos, size: 32, recipe: mild}}
restorer: {{kind: {kind}, weights: {weights}, precision: float32, lora_rank: 2{options}}}
algorithm: {{kind: {algorithm}, updates: 1{algorithm_options}}}
rewards: {{ssim_rgb: {{weight: 1.0}}, low_frequency: {{weight: 1.0}}}}
evaluate: {{tasks: 2, samples: 1, batch: 2}}
rollout: {{groups: 2, samples: 2, batch: 4}}
sampling: {{steps: {steps}, times: {times}, window: 1, window_range: [0, 1]}}
engine: {{kind: torch, lr: 1.0e-3, micro_batch: 4}}
log: {{image_tasks: 1}}
"""


def family_config(folder: Path, kind: str, algorithm: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A run of one family on its tiny pipeline: 2 groups of 2, on the family's own times."""
    weights = save_pipeline(kind, folder)
    options = prompt_options(kind, folder, short=True)
    one = kind == "one_step"
    times = build_restorer(
        Plugin(kind, RESTORERS[kind][0](weights=str(weights), precision="float32", lora_rank=2, **options))
    ).times(1 if one else 3, (32, 32))
    path = folder / f"{kind}_{algorithm}.yaml"
    path.write_text(
        YAML.format(
            kind=kind, folder=folder, weights=weights, algorithm=algorithm, steps=len(times) - 1, times=times,
            options="".join(f", {key}: {value}" for key, value in options.items()),
            algorithm_options=", times: 2" if algorithm == "nft" else "",
        )
    )  # fmt: skip
    return load_train_config(path, list(overrides))
