"""A tuned family as files that diffusers opens alone: a LoRA file, or the whole pipeline with the adapter merged in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlrestore.restorers.lora import DEFAULT
from rlrestore.restorers.pipeline import CONFIG, TENSORS, PipelineRestorer


def save_lora(restorer: PipelineRestorer, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors` for the pipeline's `load_lora_weights`, with its alpha in the metadata.

    ValueError if the run trained no adapter, or if the pipeline loads none.
    """
    import diffusers
    from peft import get_peft_model_state_dict

    name, pipeline = restorer.lora_part, getattr(diffusers, restorer.pipelines[0])
    if not restorer.config.lora_rank:
        raise ValueError("the networks themselves were trained and there is no adapter: use --format pipeline")
    if not hasattr(pipeline, "save_lora_weights"):
        raise ValueError(f"{restorer.pipelines[0]} loads no LoRA: use --format pipeline")
    part: Any = getattr(restorer.denoiser, name)
    tensors = get_peft_model_state_dict(part, adapter_name=DEFAULT)
    empty = [key for key, value in tensors.items() if value.numel() == 0]
    assert tensors and not empty, f"an adapter without values would be written: {empty[:3]}"
    pipeline.save_lora_weights(
        folder,
        **{
            f"{name}_lora_layers": {key: value.contiguous() for key, value in tensors.items()},
            f"{name}_lora_adapter_metadata": part.peft_config[DEFAULT].to_dict(),
        },
    )


def save_pipeline(restorer: PipelineRestorer, folder: Path) -> None:
    """The base's pipeline with the tuned networks, in the base's precision; `DiffusionPipeline.from_pretrained` opens it."""
    import diffusers

    parts = {name: restorer.part_folder(name) for name in restorer.parts}
    own = {
        name: getattr(diffusers, restorer.parts[name]).from_pretrained(path, use_safetensors=True, torch_dtype="auto")
        for name, path in parts.items()
    }
    for name, network in own.items():
        merge_into(network, getattr(restorer.denoiser, name))
    absent = {name: None for name, entry in restorer.index.items() if isinstance(entry, list) and entry[0] is None}
    pipeline = getattr(diffusers, restorer.pipelines[0]).from_pretrained(
        restorer.folder, use_safetensors=True, torch_dtype="auto", **absent, **own
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def save_for_restore(restorer: PipelineRestorer, folder: Path, pipeline: Path | None) -> None:
    """What `rlrestore restore --checkpoint` opens: the adapter, or nothing beside the exported `pipeline` around it."""
    folder.mkdir()
    restorer.save(folder, None if pipeline is None else {})
    if pipeline is not None:
        config = json.loads((folder / CONFIG).read_text())
        config |= {"weights": "..", "revision": None, "lora_rank": 0, "controlnet": None}
        known = vars(restorer.config)
        (folder / CONFIG).write_text(
            json.dumps({key: value for key, value in config.items() if key == "kind" or key in known}, indent=1) + "\n"
        )
    assert (folder / TENSORS).is_file()


@torch.no_grad()
def merge_into(network: nn.Module, tuned: nn.Module) -> None:
    """Make a freshly opened network what the tuned one is: its adapter added to the weights, or its weights copied."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in tuned.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        network.load_state_dict(tuned.state_dict())
        return
    weights = dict(network.named_parameters())
    for name, layer in layers.items():
        delta: Any = layer.get_delta_weight(DEFAULT)
        weight = weights[f"{name}.weight"]
        weight.copy_((weight.float() + delta.float()).to(weight.dtype))
