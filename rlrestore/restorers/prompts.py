"""Prompt embeddings: computed once, kept as safetensors. A trainer never holds a text encoder.

Where they come from, in this order: a file that the config names (`rlrestore cache-prompts` writes one), the cache, the
pipeline's own text encoders, which are loaded alone, asked once, and dropped. The cache lies beside the hub's
(`HF_HOME/rlrestore/prompts`), under the sha256 of the pipeline's class, its text encoders' files and the prompt.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from rlrestore.restorers.pretrained import INDEX, check_safe

Embeddings = dict[str, Tensor]  # name -> [P, ...], one row a prompt
Encode = Callable[[Any, str], Embeddings]  # (pipeline with text encoders, prompt)


def prompt_embeddings(
    folder: Path, prompts: Mapping[str, str], file: str | None, encode: Encode
) -> tuple[tuple[str, ...], Embeddings]:
    """Embeddings of several prompts of the pipeline in `folder`, by what they are for, one row each, and their order.

    The first is the general one, for "". A `file` brings its own prompts and order.
    """
    if file is not None:
        return read_embeddings(Path(file))
    rows = []
    for prompt in prompts.values():
        cached = _cache_file(folder, prompt)
        if not cached.is_file():
            embeddings = encode_prompt(folder, prompt, encode)
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_embeddings(cached, embeddings, prompt)
        rows.append(read_embeddings(cached)[1])
    return tuple(prompts), stack_embeddings(rows)


def stack_embeddings(rows: Sequence[Embeddings]) -> Embeddings:
    """One row a prompt. Prompts of different lengths (Qwen's) are padded, and a mask says with what."""
    if len(rows) == 1:
        return rows[0]
    lengths = [row["prompt_embeds"].shape[1] for row in rows]
    if len(set(lengths)) > 1:
        rows = [_padded(row, max(lengths)) for row in rows]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _padded(row: Embeddings, length: int) -> Embeddings:
    embeds = row["prompt_embeds"]
    mask = row.get("prompt_embeds_mask", torch.ones(embeds.shape[:2], dtype=torch.int64))
    missing = length - embeds.shape[1]
    return {**row, "prompt_embeds": pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": pad(mask, (0, missing))}


@torch.no_grad()
def encode_prompt(folder: Path, prompt: str, encode: Encode) -> Embeddings:
    """Ask the pipeline's text encoders. ValueError if the folder has none."""
    import diffusers

    index = json.loads((folder / INDEX).read_text())
    encoders = _encoders(index)
    if not encoders:
        raise ValueError(
            f"restorer.weights: {folder} has no text encoder: set restorer.prompt_embeds to a file that `rlrestore "
            "cache-prompts` wrote from a pipeline that has"
        )
    for name in encoders:
        check_safe(folder / name)
    networks = {name: None for name in index if name in ("transformer", "unet", "vae", "controlnet")}
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder, use_safetensors=True, **networks)
    embeddings = {name: value.detach().cpu().contiguous() for name, value in encode(pipeline, prompt).items()}
    del pipeline
    gc.collect()
    return embeddings


def read_embeddings(file: Path) -> tuple[tuple[str, ...], Embeddings]:
    """(what each row is for, embeddings)."""
    try:
        with safe_open(file, "pt") as opened:
            types = json.loads((opened.metadata() or {}).get("types", '[""]'))
        return tuple(types), load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"restorer.prompt_embeds: {file} cannot be read ({error}): write it with `rlrestore cache-prompts`"
        ) from error


def write_embeddings(file: Path, embeddings: Mapping[str, Tensor], prompt: str, types: Sequence[str] = ("",)) -> None:
    """Whole or not at all; several ranks may write the same one."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        save_file(dict(embeddings), temporary, {"prompt": prompt, "types": json.dumps(list(types))})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _encoders(index: Mapping[str, Any]) -> list[str]:
    return [name for name, value in index.items() if name.startswith("text_encoder") and value[0] is not None]


def _cache_file(folder: Path, prompt: str) -> Path:
    from huggingface_hub import constants

    index = json.loads((folder / INDEX).read_text())
    key = hashlib.sha256(json.dumps([index["_class_name"], prompt]).encode())
    parts = [*_encoders(index), *(name for name in index if name.startswith(("tokenizer", "processor")))]
    for name in sorted(parts):
        for file in sorted((folder / name).glob("*")):
            with file.open("rb") as stream:
                key.update(f"{name}/{file.name}".encode() + hashlib.file_digest(stream, "sha256").digest())
    return Path(constants.HF_HOME) / "rlrestore" / "prompts" / f"{key.hexdigest()}.safetensors"
