"""Opening a pipeline in diffusers' folder format: a local folder, or a hub id at a pinned commit. safetensors, no foreign code.

Everything is checked before a tensor is read: that it is a pipeline, of a class that the family speaks, made of
diffusers' own classes, and without pickles. Errors are ValueErrors that say what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# What else a pipeline class can be opened with, for the remedy.
KIND_OF_PIPELINE = {
    "Flux2KleinPipeline": "flux2_klein",
    "FluxControlNetPipeline": "flux_controlnet",
    "FluxKontextPipeline": "flux_kontext",
    "LDMSuperResolutionPipeline": "ldm_sr",
    "QwenImageEditPipeline": "qwen_image_edit",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
    "StableDiffusion3ControlNetPipeline": "sd3_controlnet",
    "StableDiffusionControlNetPipeline": "sd_controlnet",
    "StableDiffusionPipeline": "one_step",
    "StableDiffusionUpscalePipeline": "sd_upscale",
}


def local_folder(weights: str, revision: str | None, key: str = "restorer.weights") -> Path:
    """`weights` itself if it is a folder, else the hub's snapshot at commit `revision`, downloaded if it is not cached."""
    folder = Path(weights)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or not _HUB_ID.fullmatch(weights):
        raise ValueError(f"{key}={weights} is neither a folder nor a hub id such as owner/name: give one of them")
    if revision is None or not _COMMIT.fullmatch(revision):
        raise ValueError(
            f"{key}={weights} is a hub id and its revision is {revision}: pin one with the 40-character commit, because a "
            "branch moves"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors", "*.jinja"]  # no pickles, no code
    try:
        return Path(snapshot_download(weights, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{key}={weights} could not be downloaded ({reason}): give a folder instead") from error


def open_index(folder: Path, kind: str, pipelines: Collection[str]) -> dict[str, Any]:
    """The pipeline's index, if its class is one of `pipelines`."""
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"restorer.weights: {folder} is no pipeline in diffusers' format (it has no {INDEX}): give a folder that "
            "save_pretrained wrote"
        )
    index = json.loads((folder / INDEX).read_text())
    name = index.get("_class_name")
    if name not in pipelines:
        other = KIND_OF_PIPELINE.get(str(name))
        remedy = f"set restorer.kind={other}" if other else f"give a {' or '.join(sorted(pipelines))}"
        raise ValueError(f"restorer.weights: {folder} holds a {name} and restorer.kind={kind} cannot use it: {remedy}")
    return index


def load_part(folder: Path, cls: type, dtype: Any) -> Any:
    """One network of a pipeline from its own folder, in evaluation mode and without gradients."""
    check_safe(folder)
    saved = json.loads((folder / "config.json").read_text()).get("_class_name")
    if saved != cls.__name__:
        raise ValueError(f"restorer.weights: {folder} is a {saved}, not the {cls.__name__} of this family")
    try:
        part = cls.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype)  # type: ignore[attr-defined]
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"restorer.weights: {folder} cannot be loaded ({reason}): copy it again") from error
    return part.eval().requires_grad_(False)


def check_safe(folder: Path) -> None:
    """ValueError unless the folder of a network has a config and safetensors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"restorer.weights: {folder / 'config.json'} is missing: copy the pipeline again")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"restorer.weights: {folder} holds {pickles[0]} and no safetensors; a pickle can run code and is not opened: convert "
            "it where you trust it, with pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    raise ValueError(f"restorer.weights: {folder} has no *.safetensors: copy the pipeline again")
