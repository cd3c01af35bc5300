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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrestore.restorers.pretrained import INDEX, check_safe

Embeddings = dict[str, Tensor]  # name -> [1, ...]
Encode = Callable[[Any, str], Embeddings]  # (pipeline with text encoders, prompt)


def prompt_embeddings(folder: Path, prompt: str, file: str | None, encode: Encode) -> Embeddings:
    """Embeddings of `prompt` for the pipeline in `folder`, each with a batch axis of 1."""
    if file is not None:
        return read_embeddings(Path(file))
    cached = _cache_file(folder, prompt)
    if cached.is_file():
        return read_embeddings(cached)
    embeddings = encode_prompt(folder, prompt, encode)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_embeddings(cached, embeddings, prompt)
    return embeddings


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


def read_embeddings(file: Path) -> Embeddings:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"restorer.prompt_embeds: {file} cannot be read ({error}): write it with `rlrestore cache-prompts`"
        ) from error


def write_embeddings(file: Path, embeddings: Mapping[str, Tensor], prompt: str) -> None:
    """Whole or not at all; several ranks may write the same one."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        save_file(dict(embeddings), temporary, {"prompt": prompt})
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
