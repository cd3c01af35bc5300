"""`rlrestore cache-prompts`: embed a prompt once, on any host, so that no trainer ever loads a text encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from envs.sources.rows import parse_types
from rlrestore.build import RESTORERS
from rlrestore.errors import InputError
from rlrestore.quiet import quiet
from rlrestore.restorers.pipeline import PipelineRestorer
from rlrestore.restorers.pretrained import INDEX, KIND_OF_PIPELINE, local_folder, open_index
from rlrestore.restorers.prompts import encode_prompt, stack_embeddings, write_embeddings


def run_cache_prompts(
    weights: str, target: Path, prompt: str, for_type: Sequence[str], revision: str | None, kind: str | None
) -> None:
    """Write the embeddings of `prompt`, and of those of single degradation types ("haze=Remove the haze."), to `target`."""
    quiet()
    if target.exists():
        raise InputError(f"{target} exists already: choose another OUT")
    if not target.parent.is_dir():
        raise InputError(f"folder {target.parent} does not exist: create it, or choose another OUT")
    prompts = {"": prompt, **dict(_pair(text) for text in for_type)}
    try:
        folder = local_folder(weights, revision)
        kind = kind or _kind(folder)
        family = RESTORERS[kind][1]
        assert issubclass(family, PipelineRestorer)
        open_index(folder, kind, family.pipelines)
        embeddings = stack_embeddings([encode_prompt(folder, text, family.encode_text) for text in prompts.values()])
    except ValueError as error:
        raise InputError(str(error)) from error
    write_embeddings(target, embeddings, prompt, list(prompts))
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in embeddings.items())
    print(f"wrote {target}: {shapes}\nuse it   restorer.prompt_embeds={target}")


def _pair(text: str) -> tuple[str, str]:
    """ "haze=Remove the haze." -> its two sides; "rain|haze" is written as tasks have it, "haze|rain"."""
    types, equals, prompt = text.partition("=")
    if not equals or not types or not prompt:
        raise InputError(f"--for '{text}' is not TYPE=PROMPT, e.g. --for 'haze=Remove the haze.'")
    try:
        return "|".join(sorted(parse_types(types).split("|"))), prompt
    except ValueError as error:
        raise InputError(f"--for '{text}': {error}") from error


def _kind(folder: Path) -> str:
    name = json.loads((folder / INDEX).read_text()).get("_class_name") if (folder / INDEX).is_file() else None
    if name not in KIND_OF_PIPELINE:
        raise ValueError(f"{folder} is no pipeline of a known family: one of {', '.join(sorted(KIND_OF_PIPELINE))}")
    return KIND_OF_PIPELINE[name]
