"""What LL-Score is asked. The task's name selects a sentence of ours; no text of a user or a policy reaches the judge.

`<HAL>` and `<QUAL>` mark the two places whose hidden states are read; `<QUAL>` comes last, so it sees `<HAL>`. Whoever
changes a word here changes `PROMPT_VERSION`, and with it every score.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

HAL, QUAL = "<HAL>", "<QUAL>"
GENERAL = "General Restoration"  # of ours, for mixed degradations: LL-Bench has no such task

# The 16 tasks of LL-Bench (datasets of the paper), and GENERAL.
TASKS: dict[str, str] = {
    "Compression Artifact Removal": "remove compression blocks and ringing, keep genuine texture, edges and colours",
    "Defocus Deblur": "remove the defocus of the subject, leave a natural depth of field alone",
    "Dehaze": "remove the haze and bring back contrast and natural colour, invent no clouds",
    "Denoise": "remove the noise, keep genuine texture, edges and colours",
    "Derain": "remove falling rain and its veil, keep wet ground, the overcast mood and colours",
    "Desnow": "remove the flakes in the air and their veil, keep lying snow and colours",
    "Flare Removal": "remove the lens flare, keep everything else as it is",
    GENERAL: "remove noise, compression traces and blur, recover real detail, keep content, framing and colours",
    "HDR Enhancement": "recover detail in shadows and highlights with natural tones, content unchanged",
    "Low-light Enhancement": "brighten the picture and remove noise in its dark parts, invent nothing in black areas",
    "Motion Deblur": "remove unintended motion blur, leave the natural depth of field alone",
    "Old Photo": "repair scratches, stains, creases and fading, keep identity and period, do not colourise",
    "Raindrop Removal": "remove the drops on the lens, keep everything else as it is",
    "Reflection Removal": "remove the reflection on the glass, keep everything else as it is",
    "Shadow Removal": "remove the cast shadow, keep everything else as it is",
    "Super Resolution": "raise the resolution with plausible fine texture, without a change of content or colours",
    "Underwater Enhancement": "remove the water's colour cast and veil with natural tones, content unchanged",
}

# Degradation types of `Task.types` -> task; several types are GENERAL unless they say the same.
TYPE_TASKS: dict[str, str] = {
    "blur": "Motion Deblur", "compression": "Compression Artifact Removal", "defocus": "Defocus Deblur", "denoise": "Denoise",
    "flare": "Flare Removal", "haze": "Dehaze", "hdr": "HDR Enhancement", "lowlight": "Low-light Enhancement",
    "motion": "Motion Deblur", "noise": "Denoise", "oldphoto": "Old Photo", "rain": "Derain",
    "raindrop": "Raindrop Removal", "reflection": "Reflection Removal", "shadow": "Shadow Removal",
    "snow": "Desnow", "sr": "Super Resolution", "underwater": "Underwater Enhancement",
}  # fmt: skip

TEMPLATE = (
    "<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
    "The first picture is a degraded photograph, the second is what a restorer made of it. Task: {task}: {sentence}. "
    "Judge how far the degradation named by the task is gone, how clean and natural the second picture looks, and "
    "whether it still shows the same scene. Count as hallucination: objects, text, faces or structures without evidence "
    "in the first picture, things that vanished, moved or were reshaped, and recolouring that the task does not call for. "
    f"Hallucination: {HAL} Overall quality: {QUAL}"
)
PROMPT_VERSION = hashlib.sha256((TEMPLATE + repr(sorted(TASKS.items()))).encode()).hexdigest()[:12]


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_BY_KEY = {_key(name): name for name in TASKS}
# Spellings seen in LL-Bench's files and figures
_BY_KEY |= {"hdrimaging": "HDR Enhancement", "uncompleted": "Old Photo", "superresolutionwogt": "Super Resolution"}


def known_task(name: str) -> str:
    """LL-Bench's name of a task in any spelling of case and separators; ValueError with the list for another text."""
    found = _BY_KEY.get(_key(name))
    if found is None:
        raise ValueError(f"task {name[:60]!r} is unknown; known: {', '.join(TASKS)}")
    return found


def task_of_types(types: Sequence[str]) -> str:
    """The task of a photo with these degradation types; GENERAL if they name several tasks or none."""
    tasks = {TYPE_TASKS[t] for t in types if t in TYPE_TASKS}
    return tasks.pop() if len(tasks) == 1 else GENERAL


def prompt_for(task: str) -> str:
    """The whole text of one row; ValueError for an unknown task."""
    name = known_task(task)
    return TEMPLATE.format(task=name, sentence=TASKS[name])
