"""`rlrestore export`: a tuned diffusers family as a LoRA or a pipeline, with a model card, on disk or on the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from rlrestore.commands.restore import load_restorer
from rlrestore.errors import InputError
from rlrestore.quiet import quiet
from rlrestore.restorers.export import save_for_restore, save_lora, save_pipeline
from rlrestore.restorers.pipeline import PipelineRestorer

FORMATS = ("lora", "pipeline")


def run_export(source: Path, target: Path, form: str, licence: str | None, push_to_hub: str | None) -> None:
    """Write `target`, whole or not at all. `source`: a run (its newest checkpoint) or a checkpoint."""
    quiet()
    if form not in FORMATS:
        raise InputError(f"--format {form} is unknown: choose one of {', '.join(FORMATS)}")
    if target.exists():
        raise InputError(f"{target} exists already: choose another OUT")
    restorer = load_restorer(source)
    if not isinstance(restorer, PipelineRestorer):
        raise InputError(
            f"{source} is of the embedded restorer, which diffusers does not know: copy its restorer/ folder"
        )
    licence = licence or _base_licence(restorer)
    if push_to_hub and not licence:
        raise InputError(
            "the base names no licence, and nothing is published without one: add --licence, e.g. apache-2.0"
        )
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        temporary.mkdir(parents=True)
        try:
            (save_lora if form == "lora" else save_pipeline)(restorer, temporary)
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
        save_for_restore(restorer, temporary / "restorer", temporary if form == "pipeline" else None)
        (temporary / "README.md").write_text(_card(restorer, source, form, licence))
        if (source / "config.resolved.yaml").is_file():
            shutil.copy(source / "config.resolved.yaml", temporary / "config.resolved.yaml")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"exported {form}: {target}\ntry it   rlrestore restore PHOTO OUT.png --checkpoint {target}")
    if push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=False)
        print(f"pushed   {api.upload_folder(repo_id=push_to_hub, folder_path=target)}")


# -- the card ------------------------------------------------------------------------------------------------------


def _card(restorer: PipelineRestorer, source: Path, form: str, licence: str | None) -> str:
    header: dict[str, Any] = {
        "base_model": restorer.config.weights,
        "library_name": "diffusers",
        "tags": ["image-restoration", "rlrestore", *(["lora"] if form == "lora" else [])],
    }
    if licence:
        header["license"] = licence
    name = restorer.pipelines[0]
    load = (
        f'pipe = {name}.from_pretrained("{restorer.config.weights}")\npipe.load_lora_weights("THIS FOLDER")'
        if form == "lora"
        else f'pipe = {name}.from_pretrained("THIS FOLDER"{_absent(restorer)})'
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {source.name}: {restorer.kind}, tuned with rlrestore

    from diffusers import {name}
    {load.replace(chr(10), chr(10) + "    ")}

`rlrestore restore PHOTO OUT.png --checkpoint THIS_FOLDER` needs no code. Base: {restorer.config.weights}
(revision {restorer.config.revision or "of a local folder"}). Licence: {licence or "that of the base, which names none"}.
Prompt: "{restorer.config.prompt}". Guidance (cfg): {restorer.config.cfg:g}. Adapter: rank {restorer.config.lora_rank}.
Colour fix: {restorer.config.colour_fix}{_colour_note(restorer)}.

## Measured

{_table(source)}

## How it was trained

{_training(source)}
"""


def _colour_note(restorer: PipelineRestorer) -> str:
    """What diffusers leaves out."""
    return "" if restorer.config.colour_fix == "none" else ", which `rlrestore restore` applies and diffusers does not"


def _absent(restorer: PipelineRestorer) -> str:
    """Parts that the base does not have, and that diffusers wants to be told about."""
    names = [name for name, entry in restorer.index.items() if isinstance(entry, list) and entry[0] is None]
    return "".join(f", {name}=None" for name in names if name not in ("safety_checker", "feature_extractor"))


def _table(source: Path) -> str:
    file = source / "result.json"
    if not file.is_file():
        return "Nothing: this is a checkpoint of a run that has no result yet."
    metrics = json.loads(file.read_text())["metrics"]
    cell = lambda value: "none" if value is None else f"{value:.4f}"  # noqa: E731
    lines = ["| metric | role | base | tuned | delta | 95% interval | tasks |", "|---|---|---|---|---|---|---|"]
    for name, row in metrics.items():
        low, high = (cell(edge) for edge in row["ci95"])
        lines.append(
            f"| {name} ({'up' if row['higher_is_better'] else 'down'}) | {row['role']} | {cell(row['base'])} | "
            f"{cell(row['tuned'])} | {cell(row['delta'])} | {low} to {high} | {row['n']} |"
        )
    return "\n".join(lines) + "\n\nHeld-out tasks, base and tuned at equal noise; gold metrics were never rewarded."


def _training(source: Path) -> str:
    file = source / "config.resolved.yaml"
    if not file.is_file():
        return "The configuration is in the run that this checkpoint is of."
    config = yaml.safe_load(file.read_text())
    rewards = ", ".join(f"{name} {term['weight']:g}" for name, term in config["rewards"].items())
    data = config["env"].get("lq_dir") or config["env"]["kind"]
    sampling = config["sampling"]
    return (
        f"{config['run']['steps']} iterations of {config['algorithm']['kind']}, {config['rollout']['groups']} photos x "
        f"{config['rollout']['samples']} samples each, on {data}. Rewards: {rewards}. Sampling: {sampling['steps']} steps, "
        f"shift {sampling['shift']:g}, times {sampling['times'] or 'of that shift'}. Every key: config.resolved.yaml."
    )


def _base_licence(restorer: PipelineRestorer) -> str | None:
    """The licence field of the base's own card."""
    card = restorer.folder / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text(), flags=re.DOTALL) if card.is_file() else None
    return (yaml.safe_load(front[1]) or {}).get("license") if front else None
