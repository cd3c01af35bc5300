"""What all families of diffusers pipelines share: opening, VAE, prompt, LoRA, saving. A family says the rest in its file.

The state is the VAE latent [c, h, w] in float32 in the pipeline's own normalisation; token layouts, VP coordinates and
predictions are changed at the family's edge, in `predict`. The LQ is padded to `multiple` and never resized. VAE
latents are modes, not samples, so that a condition has no randomness.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from omegaconf import MISSING
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from envs.sources.rows import parse_types
from rlrestore.restorers.base import Condition, Restorer
from rlrestore.restorers.colour import check_fix
from rlrestore.restorers.lora import DEFAULT, TRAINED, LoraSpec, Policy, add_lora, new_policy
from rlrestore.restorers.pretrained import load_part, local_folder, open_index
from rlrestore.restorers.prompts import Embeddings, prompt_embeddings, write_embeddings

CONFIG, TENSORS, PROMPT, NEGATIVE = "config.json", "weights.safetensors", "prompt.safetensors", "negative.safetensors"


@dataclass
class PipelineConfig:
    """`weights`: a pipeline's folder, a hub id with `revision`, or a folder that rlrestore saved."""

    weights: str = MISSING
    revision: str | None = None  # commit of a hub id
    prompt: str = ""
    prompts: dict[str, str] = field(default_factory=dict)  # degradation type ("haze", "haze|rain") -> its own prompt
    prompt_embeds: str | None = (
        None  # safetensors of `rlrestore cache-prompts`; null: the pipeline's text encoders, once
    )
    negative_prompt: str = ""  # used if cfg is not 1
    negative_prompt_embeds: str | None = None
    cfg: float = 1.0  # classifier-free guidance: v = v_neg + cfg (v - v_neg); 1 is off and costs one forward, not two
    lora_rank: int = 32  # 0 trains the networks themselves
    lora_alpha: int = 0  # 0: equal to the rank, so that readers that ignore alpha agree
    lora_targets: tuple[str, ...] = ()  # names, or ends of names, of layers; () is the family's attention layers
    init_seed: int = 0  # of the adapter
    precision: str = "bfloat16"  # of the frozen weights: bfloat16 | float32; adapters and the VAE are float32
    checkpointing: bool = False  # gradient checkpointing: activations of one block instead of all
    colour_fix: str = (
        "none"  # none | wavelet | adain: large-scale colour of the LQ, for rewards, metrics and `restore` alike
    )
    vae_tiling: bool = False  # encode and decode large photos in tiles; not neutral


@dataclass(frozen=True)
class LatentCondition(Condition):
    hint: Tensor  # [B, c', h', w'] what the family shows its network of the LQ
    shape: tuple[int, int, int]  # (c, h, w) of the state
    prompt_B: Tensor  # [B] int64, which of the restorer's prompts


class PipelineRestorer(Restorer):
    """One family: class attributes, the denoiser of its parts, `predict`, and what differs from a KL-VAE."""

    kind: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # diffusers' class names that it opens
    parts: ClassVar[dict[str, str]]  # folder -> diffusers class of what the denoiser is made of
    lora_part: ClassVar[str]  # the part that LoRA is put on: the one that pipelines load it into
    lora_targets: ClassVar[tuple[str, ...]]
    vae_class: ClassVar[str] = "AutoencoderKL"
    vae_folder: ClassVar[str] = "vae"
    vae_slices: ClassVar[bool] = True
    text: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # embeddings that `predict` reads; () for no text
    patch: int = 1  # latent cells that a side of the latent must be a multiple of: a token's, or a UNet's levels

    saves_frozen = False

    def __init__(self, config: PipelineConfig):
        import diffusers

        config, self.saved = _opened(config, self.kind)
        self.config = config
        if config.precision not in ("bfloat16", "float32"):
            raise ValueError(f"restorer.precision is '{config.precision}': choose bfloat16 or float32")
        check_fix(config.colour_fix, "restorer.colour_fix")
        self.colour_fix = config.colour_fix
        self.folder = local_folder(config.weights, config.revision)
        self.index = open_index(self.folder, self.kind, self.pipelines)
        dtype = getattr(torch, config.precision)
        networks = {
            name: load_part(self.part_folder(name), getattr(diffusers, cls), dtype) for name, cls in self.parts.items()
        }
        self.vae = load_part(self.folder / self.vae_folder, getattr(diffusers, self.vae_class), torch.float32)
        if self.vae_slices:
            self.vae.enable_slicing()  # one photo at a time, so that a decode does not depend on its batch
        if config.vae_tiling:
            self.vae.enable_tiling()
        self.prepare(networks)
        self.multiple = self.vae_factor * self.patch
        self.denoiser = self.make_denoiser(networks)
        self._make_trainable()
        self.prompt_types, self.prompt, self.negative = self._load_text(config)

    # -- what a family says ----------------------------------------------------------------------------------------

    def prepare(self, networks: dict[str, Any]) -> None:
        """Read schedulers, and refuse networks that do not fit one another."""

    @abstractmethod
    def make_denoiser(self, networks: dict[str, Any]) -> nn.Module:
        """A module with the networks as children, by their folders' names."""

    @abstractmethod
    def predict(self, net: nn.Module, z_t: Tensor, t_B: Tensor, condition: LatentCondition, text: Embeddings) -> Tensor:
        """v at [B, c, h, w] in float32; `text` has B rows, in the network's precision."""

    def hint(self, lq_BCHW: Tensor) -> Tensor:
        """What the network sees of a padded LQ in [0, 1]: its latent."""
        return self.encode_pixels(lq_BCHW)

    @staticmethod
    def encode_text(pipeline: Any, prompt: str) -> Embeddings:
        """Ask the text encoders of a pipeline."""
        raise NotImplementedError

    def part_folder(self, name: str) -> Path:
        """Where part `name` lies."""
        return self.folder / name

    # -- the convention --------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str, denoiser: bool = True) -> Self:
        if denoiser:
            self.denoiser.to(device)
        self.vae.to(device)
        for text in (self.prompt, self.negative):
            text.update({name: value.to(device) for name, value in text.items()})
        return self

    @torch.no_grad()
    def condition(self, lq_BCHW: Tensor, types_B: Sequence[Collection[str]] = ()) -> LatentCondition:
        height, width = lq_BCHW.shape[-2:]
        padded = self.padded(lq_BCHW)
        shape = (self.latent_channels, padded.shape[-2] // self.vae_factor, padded.shape[-1] // self.vae_factor)
        self.check_shape(shape)
        prompt_B = torch.tensor([self.prompt_of(types) for types in types_B] or [0] * len(lq_BCHW))
        return LatentCondition((height, width), self.hint(padded).float(), shape, prompt_B.to(lq_BCHW.device))

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        assert isinstance(condition, LatentCondition)
        return condition.shape

    def velocity(self, z_t: Tensor, t_B: Tensor, condition: Condition, net: nn.Module | None = None) -> Tensor:
        assert isinstance(condition, LatentCondition) and z_t.dtype == torch.float32
        net = self.denoiser if net is None else net
        rows, dtype = len(z_t), dtype_of(net)
        v = self.predict(net, z_t, t_B, condition, _chosen(self.prompt, condition.prompt_B, dtype))
        if self.config.cfg == 1:
            return v
        return self.guide(v, self.predict(net, z_t, t_B, condition, _rows(self.negative, rows, dtype)))

    def guide(self, v: Tensor, v_negative: Tensor) -> Tensor:
        return v_negative + self.config.cfg * (v - v_negative)

    def decode(self, z_0: Tensor, condition: Condition) -> Tensor:
        height, width = condition.size
        return ((self.decode_latent(z_0)[..., :height, :width] + 1) / 2).clamp(0, 1)

    def encode(self, image_BCHW: Tensor, condition: Condition) -> Tensor:
        return self.encode_pixels(self.padded(image_BCHW))

    # -- the VAE ---------------------------------------------------------------------------------------------------

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    def encode_pixels(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> normalised latent."""
        z = self.vae.encode(2 * image_BCHW - 1).latent_dist.mode()
        return (z - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode_latent(self, z: Tensor) -> Tensor:
        """Normalised latent -> pixels in [-1, 1]."""
        return self.vae.decode(z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)).sample

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """ValueError for a latent that the networks have no positions for."""

    def padded(self, image_BCHW: Tensor) -> Tensor:
        height, width = image_BCHW.shape[-2:]
        below, right = -height % self.multiple, -width % self.multiple
        if not below and not right:
            return image_BCHW
        return pad(
            image_BCHW, (0, right, 0, below), mode="reflect" if below < height and right < width else "replicate"
        )

    # -- the prompt ------------------------------------------------------------------------------------------------

    def prompt_of(self, types: Collection[str]) -> int:
        """Which prompt a photo of these degradation types gets: that of all of them, of one of them, or the general one."""
        together = "|".join(sorted(types))
        known = [name for name in self.prompt_types if name and (name == together or name in types)]
        return self.prompt_types.index(max(known, key=len)) if known else 0

    def _load_text(self, config: PipelineConfig) -> tuple[tuple[str, ...], Embeddings, Embeddings]:
        """(degradation types that have a prompt, the general one first as "", their embeddings in a row, the negative one's)."""
        if not self.text:
            return ("",), {}, {}
        try:
            named = {"|".join(sorted(parse_types(types).split("|"))): text for types, text in config.prompts.items()}
        except ValueError as error:
            raise ValueError(f"restorer.prompts: {error}") from error
        types, prompt = prompt_embeddings(
            self.folder, {"": config.prompt, **named}, config.prompt_embeds, self.encode_text
        )
        negative: Embeddings = {}
        if config.cfg != 1:
            _, negative = prompt_embeddings(
                self.folder, {"": config.negative_prompt}, config.negative_prompt_embeds, self.encode_text
            )
        for key, embeddings in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative)):
            if embeddings and (missing := set(self.text) - set(embeddings)):
                raise ValueError(
                    f"restorer.{key} has no {', '.join(sorted(missing))}: write it with `rlrestore cache-prompts` from this "
                    "family's pipeline"
                )
        return types, prompt, negative

    # -- what is trained -------------------------------------------------------------------------------------------

    def _make_trainable(self) -> None:
        config, part = self.config, getattr(self.denoiser, self.lora_part)
        if config.checkpointing:
            for child in self.denoiser.children():
                child.enable_gradient_checkpointing()  # type: ignore[operator]
        if config.lora_rank:
            spec = LoraSpec(
                config.lora_rank, config.lora_alpha or config.lora_rank, config.lora_targets or self.lora_targets
            )
            add_lora(part, spec, config.init_seed)
            self.trainable = TRAINED
        else:
            self.denoiser.requires_grad_(True)
        if self.saved is not None:
            _load_trained(self.saved, self.trained_module())

    def trained_module(self) -> nn.Module:
        """What training may move: the adapter, or all of the denoiser."""
        return Policy(self.denoiser, DEFAULT) if self.config.lora_rank else self.denoiser

    def twin(self, role: str) -> nn.Module:
        return new_policy(self.denoiser, role) if self.config.lora_rank else super().twin(role)

    def supervised_modules(self) -> dict[str, nn.Module]:
        return {"lora" if self.config.lora_rank else "denoiser": self.trained_module()}

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path, denoiser: Mapping[str, Tensor] | None = None) -> None:
        """What differs from the pipeline, and where that is: the base itself is not copied."""
        tensors = dict(self.trained_module().named_parameters()) if denoiser is None else denoiser
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / TENSORS)
        for name, text in ((PROMPT, self.prompt), (NEGATIVE, self.negative)):
            if text:
                write_embeddings(
                    folder / name,
                    {key: value.cpu() for key, value in text.items()},
                    self.config.prompt,
                    self.prompt_types if name == PROMPT else ("",),
                )
        is_local = Path(self.config.weights).is_dir()
        config = {**asdict(self.config), "weights": str(self.folder) if is_local else self.config.weights}
        (folder / CONFIG).write_text(json.dumps({"kind": self.kind, **config}, indent=1) + "\n")

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.kind.encode())
        trained = {id(parameter) for parameter in self.trained_module().parameters()}
        frozen = {name: p for name, p in self.denoiser.named_parameters() if id(p) not in trained}
        for name, tensor in sorted({**frozen, **dict(self.vae.named_parameters(prefix="vae")), **self.prompt}.items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def dtype_of(net: nn.Module) -> torch.dtype:
    """The precision of a network's frozen weights, which is what its inputs must have; adapters are float32."""
    network = net.network if isinstance(net, Policy) else net
    return next(value.dtype for name, value in network.named_parameters() if ".lora_" not in name)


def _opened(config: PipelineConfig, kind: str) -> tuple[PipelineConfig, Path | None]:
    """The config to go by, and the folder that `save` wrote if that is what `weights` names: it brings its own config.

    Only what costs memory and not results (`checkpointing`) is taken from the config that was given.
    """
    folder = Path(config.weights)
    if not (folder / TENSORS).is_file() or not (folder / CONFIG).is_file():
        return config, None
    given = json.loads((folder / CONFIG).read_text())
    if (folder / given.get("weights", "")).is_dir():  # an exported pipeline lies around it
        given["weights"] = str((folder / given["weights"]).resolve())
    if (name := given.pop("kind", None)) != kind:
        raise ValueError(f"restorer.weights: {folder} was saved from a {name}: set restorer.kind={name}")
    known = {item.name for item in fields(config)}
    own: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key in known
    }
    texts = {
        key: str(folder / name)
        for key, name in (("prompt_embeds", PROMPT), ("negative_prompt_embeds", NEGATIVE))
        if (folder / name).is_file()
    }
    return type(config)(**{**own, **texts, "checkpointing": config.checkpointing}), folder


@torch.no_grad()
def _load_trained(folder: Path, module: nn.Module) -> None:
    own = dict(module.named_parameters())
    try:
        tensors = load_file(folder / TENSORS)
        for name, value in tensors.items():
            own[name].copy_(value)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"restorer.weights: {folder / TENSORS} does not fit its base ({error}): copy it again"
        ) from error


def _chosen(text: Embeddings, prompt_B: Tensor, dtype: torch.dtype) -> Embeddings:
    """Row b gets prompt `prompt_B[b]`."""
    if all(len(value) == 1 for value in text.values()):
        return _rows(text, len(prompt_B), dtype)
    return {name: (value.to(dtype) if value.is_floating_point() else value)[prompt_B] for name, value in text.items()}


def _rows(text: Embeddings, count: int, dtype: torch.dtype) -> Embeddings:
    return {
        name: (value.to(dtype) if value.is_floating_point() else value).expand(count, *value.shape[1:])
        for name, value in text.items()
    }
