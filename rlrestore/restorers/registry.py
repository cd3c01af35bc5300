"""Restorer families: `kind -> (config dataclass, class)`. One line a family; heavy imports inside the family's file."""

from __future__ import annotations

from rlrestore.restorers.base import Restorer
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer
from rlrestore.restorers.flux2_klein import Flux2KleinRestorer
from rlrestore.restorers.flux_controlnet import FluxControlNetConfig, FluxControlNetRestorer
from rlrestore.restorers.flux_kontext import FluxKontextConfig, FluxKontextRestorer
from rlrestore.restorers.ldm_sr import LdmSrRestorer
from rlrestore.restorers.one_step import OneStepConfig, OneStepRestorer
from rlrestore.restorers.pipeline import PipelineConfig
from rlrestore.restorers.qwen_image_edit import QwenImageEditPlusRestorer, QwenImageEditRestorer
from rlrestore.restorers.sd3_controlnet import Sd3ControlNetRestorer
from rlrestore.restorers.sd_controlnet import ControlNetConfig, SdControlNetRestorer
from rlrestore.restorers.sd_upscale import SdUpscaleConfig, SdUpscaleRestorer

RESTORERS: dict[str, tuple[type, type[Restorer]]] = {
    "embedded": (EmbeddedConfig, EmbeddedRestorer),
    "flux2_klein": (PipelineConfig, Flux2KleinRestorer),
    "flux_controlnet": (FluxControlNetConfig, FluxControlNetRestorer),
    "flux_kontext": (FluxKontextConfig, FluxKontextRestorer),
    "ldm_sr": (PipelineConfig, LdmSrRestorer),
    "one_step": (OneStepConfig, OneStepRestorer),
    "qwen_image_edit": (PipelineConfig, QwenImageEditRestorer),
    "qwen_image_edit_plus": (PipelineConfig, QwenImageEditPlusRestorer),
    "sd3_controlnet": (ControlNetConfig, Sd3ControlNetRestorer),
    "sd_controlnet": (ControlNetConfig, SdControlNetRestorer),
    "sd_upscale": (SdUpscaleConfig, SdUpscaleRestorer),
}
