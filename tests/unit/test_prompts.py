"""The text sides that the tiny pipelines leave out, Qwen2.5-VL and Qwen3, asked as `cache-prompts` asks them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlrestore.restorers.flux2_klein import Flux2KleinRestorer
from rlrestore.restorers.qwen_image_edit import QwenImageEditRestorer
from tests.tiny_pipelines import PROMPT, flow_scheduler

SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")


def tokenizer() -> Any:
    """One token a byte."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<|{name}|>" for name in SPECIAL)]
    made = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in SPECIAL]})
    return made


@pytest.mark.parametrize("pipeline", [diffusers.QwenImageEditPipeline, diffusers.QwenImageEditPlusPipeline])
def test_qwen_edits_prompt_is_embedded_without_a_photo(pipeline: Any) -> None:
    words = tokenizer()
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(words),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 32,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template="x",
    )
    pipe = pipeline(
        scheduler=flow_scheduler(),
        vae=None,
        text_encoder=encoder,
        tokenizer=words,
        processor=processor,
        transformer=None,
    )
    template, skipped = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
    with torch.no_grad():
        found = QwenImageEditRestorer.encode_text(pipe, PROMPT)
    photo = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = len(words(template.replace(photo, "").format(PROMPT))["input_ids"]) - skipped
    assert {name: tuple(value.shape) for name, value in found.items()} == {"prompt_embeds": (1, expected, 16)}


def test_kleins_prompt_is_three_layers_side_by_side() -> None:
    words = tokenizer()
    words.chat_template = "{{ messages[0]['content'] }}"
    words.pad_token = "<|endoftext|>"
    config = Qwen3Config(
        hidden_size=4, intermediate_size=8, num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1, head_dim=4,
        vocab_size=len(words),
    )  # fmt: skip
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=flow_scheduler(),
        vae=None,
        text_encoder=Qwen3ForCausalLM(config).eval(),
        tokenizer=words,
        transformer=None,
    )
    with torch.no_grad():
        found = Flux2KleinRestorer.encode_text(pipe, PROMPT)
        other = Flux2KleinRestorer.encode_text(pipe, PROMPT[::-1])
    assert tuple(found["prompt_embeds"].shape) == (1, 512, 12)  # layers 9, 18, 27
    assert not torch.equal(found["prompt_embeds"], other["prompt_embeds"])
