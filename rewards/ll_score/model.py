"""LL-Score: a Qwen3-VL that reads (LQ, restoration, task) and gives a quality score and a hallucination logit.

After the method figure of LL-Bench (arXiv 2606.02535): vision encoder frozen, projector (merger and DeepStack mergers)
trained, LoRA on the language model, a head at the hidden state of `<HAL>` and one at `<QUAL>`. Head shapes, LoRA rank and
losses are not published: ours are in docs/ll_score.md. Any Qwen3-VL checkpoint that transformers opens will do; the
vocabulary projection is left out.

Files of a judge: peft's adapter (LoRA, projector, the two token rows), `heads.safetensors`, `judge.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from rewards.judges.base import Judge, Judged
from rewards.ll_score.prompt import HAL, PROMPT_VERSION, QUAL, prompt_for

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
PARTS = {"lora": "lora_", "projector": "modules_to_save", "tokens": "trainable_tokens"}  # by a piece of the name
HEADS, JUDGE = "heads.safetensors", "judge.json"
MODEL_KEYS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


@dataclass(frozen=True)
class LLScoreConfig:
    """How a judge is made of a base checkpoint."""

    base: str  # folder or hub id of a Qwen3-VL checkpoint
    revision: str | None = None
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    min_px: int = 256 * 256  # area of a picture, as the image processor counts
    max_px: int = 512 * 512
    hallucination_rate: float = 0.2  # of the training labels: where the untrained hallucination head stands
    dtype: str = "float32"  # of the base: float32 | bfloat16
    seed: int = 0  # of LoRA and heads


class Head(nn.Module):
    """w2 gelu(w1 layernorm(h)) in float32; the last layer starts at 0, so that the first scores are `bias`."""

    def __init__(self, width: int, bias: float):
        super().__init__()
        self.norm, self.first, self.last = (
            nn.LayerNorm(width),
            nn.Linear(width, max(1, width // 4)),
            nn.Linear(max(1, width // 4), 1),
        )
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.fill_(bias)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(self.norm(hidden_ND.float()))))[:, 0]


class LLScore(Judge):
    """`forward(**batch) -> Judged`; `batch` comes from `encode`. Build with `new_ll_score` or `load_ll_score`."""

    def __init__(self, network: PeftModel, processor: Any, config: LLScoreConfig, temperature: float = 1.0):
        super().__init__()
        self.settings, self.processor, self.temperature = config, processor, temperature
        tokenizer = processor.tokenizer
        self.ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (HAL, QUAL)}
        self.network = network
        width = network.config.text_config.hidden_size
        rate = config.hallucination_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.quality = Head(width, 0.0)
            self.hallucination = Head(width, math.log(rate / (1 - rate)))

    @property
    def device(self) -> torch.device:
        return self.quality.last.weight.device

    def forward(self, **batch: Tensor) -> Judged:
        """quality [N] and hallucination logit [N] of N rows."""
        hidden_NLD = self.network(**{key: batch[key] for key in MODEL_KEYS}).last_hidden_state
        at = {token: _only_place(batch["input_ids"], number, token) for token, number in self.ids.items()}
        row = torch.arange(len(hidden_NLD), device=hidden_NLD.device)
        return Judged(self.quality(hidden_NLD[row, at[QUAL]]), self.hallucination(hidden_NLD[row, at[HAL]]))

    def encode(self, rows: Sequence[tuple[Any, Any, str]]) -> dict[str, Tensor]:
        """Batch of (lq, restoration, task) rows; pictures are PIL RGB. The LQ is resampled to the restoration's size."""
        images, texts = [], []
        for lq, restored, task in rows:
            images += [lq if lq.size == restored.size else lq.resize(restored.size, resample=3), restored]
            texts.append(prompt_for(task))
        batch = self.processor(text=texts, images=images, return_tensors="pt", padding=True)
        return {key: batch[key] for key in MODEL_KEYS}

    @torch.inference_mode()
    def score(self, rows: Sequence[tuple[Any, Any, str]], batch_size: int = 8) -> tuple[Tensor, Tensor]:
        """(quality [N], hallucination probability [N]) on the CPU."""
        training = self.training
        self.eval()
        quality, probability = [], []
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(self.device) for k, v in self.encode(rows[start : start + batch_size]).items()}
            judged = self(**batch)
            quality.append(judged.quality_N.float().cpu())
            probability.append(torch.sigmoid(judged.hallucination_logit_N.float() / self.temperature).cpu())
        self.train(training)
        return torch.cat(quality or [torch.empty(0)]), torch.cat(probability or [torch.empty(0)])

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {part: [] for part in (*PARTS, "heads")}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = next((part for part, piece in PARTS.items() if piece in name), "heads")
                groups[part].append(parameter)
        return groups

    def save(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write the files of a judge into an existing folder; `facts` (splits, metrics) go into judge.json."""
        self.network.save_pretrained(str(folder), save_embedding_layers=False)
        heads = {f"{n}.{k}": v for n in ("quality", "hallucination") for k, v in getattr(self, n).state_dict().items()}
        save_file({k: v.detach().float().cpu().contiguous() for k, v in heads.items()}, folder / HEADS)
        values = {
            "kind": "ll_score", "config": asdict(self.settings), "prompt": PROMPT_VERSION, "tokens": self.ids,
            "temperature": self.temperature, **(facts or {}),
        }  # fmt: skip
        (folder / JUDGE).write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _only_place(input_ids_NL: Tensor, number: int, token: str) -> Tensor:
    """[N] position of a token that each row has exactly once."""
    found = input_ids_NL == number
    assert bool((found.sum(1) == 1).all()), f"a row has {found.sum(1).tolist()} {token}, wanted one each"
    return found.int().argmax(1)


def _open_base(config: LLScoreConfig) -> tuple[Any, Any]:
    """(Qwen3VLModel without its vocabulary projection, processor with the two tokens). ValueError if it is no Qwen3-VL."""
    try:
        processor = AutoProcessor.from_pretrained(config.base, revision=config.revision)
        whole = AutoModelForImageTextToText.from_pretrained(
            config.base, revision=config.revision, dtype=getattr(torch, config.dtype), use_safetensors=True
        )
    except OSError as error:
        raise ValueError(f"base {config.base!r} cannot be opened: {str(error).splitlines()[0]}") from error
    network = whole.model
    if not hasattr(network.visual, "deepstack_merger_list"):
        raise ValueError(f"base {config.base!r} is a {type(whole).__name__}; LL-Score needs a Qwen3-VL checkpoint")
    processor.image_processor.size = {"shortest_edge": config.min_px, "longest_edge": config.max_px}
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([HAL, QUAL], special_tokens=True)
    rows = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:  # a checkpoint's table is often larger than its tokenizer: never shrink it
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return network, processor


def new_ll_score(config: LLScoreConfig) -> LLScore:
    """An untrained judge on a base checkpoint. ValueError if the base cannot be used."""
    network, processor = _open_base(config)
    ids = processor.tokenizer.convert_tokens_to_ids([HAL, QUAL])
    mergers = [f"visual.deepstack_merger_list.{i}" for i in range(len(network.visual.deepstack_merger_list))]
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=LORA_TARGETS, modules_to_save=["visual.merger", *mergers],
        trainable_token_indices={"embed_tokens": ids},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        wrapped = get_peft_model(network, lora)
    return LLScore(wrapped, processor, config)


def load_ll_score(folder: Path, base: str | None = None) -> LLScore:
    """A saved judge, ready to score; `base` replaces the checkpoint's address. ValueError if the files do not fit."""
    if not (folder / JUDGE).is_file():
        raise ValueError(f"{folder / JUDGE} does not exist; give a folder that `rlrestore judge train` wrote")
    values = json.loads((folder / JUDGE).read_text("utf-8"))
    if values.get("kind") != "ll_score":
        raise ValueError(f"{folder / JUDGE} is not of an LL-Score judge")
    if values["prompt"] != PROMPT_VERSION:
        raise ValueError(
            f"{folder} was trained with prompt {values['prompt']} and this version asks {PROMPT_VERSION}: "
            "train it again, or use the version of rlrestore that trained it"
        )
    config = LLScoreConfig(**{**values["config"], **({"base": base} if base else {})})
    network, processor = _open_base(config)
    judge = LLScore(PeftModel.from_pretrained(network, str(folder)), processor, config, values["temperature"])
    if judge.ids != values["tokens"]:
        raise ValueError(
            f"base {config.base!r} numbers {HAL} and {QUAL} {judge.ids}, the judge {values['tokens']}: not its base"
        )
    heads = load_file(folder / HEADS)
    for name in ("quality", "hallucination"):
        part = {k.removeprefix(f"{name}."): v for k, v in heads.items() if k.startswith(f"{name}.")}
        getattr(judge, name).load_state_dict(part)
    return judge.eval().requires_grad_(False)
