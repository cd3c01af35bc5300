"""The text sides that the tiny pipelines leave out, Qwen2.5-VL and Qwen3, asked as `cache-prompts` asks them."""

from __future__ import annotations

from pathlib import Path
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

from rlrestore.build import RESTORERS
from rlrestore.cli import app
from rlrestore.restorers.flux2_klein import Flux2KleinRestorer
from rlrestore.restorers.prompts import stack_embeddings
from rlrestore.restorers.qwen_image_edit import QwenImageEditRestorer
from tests.tiny_pipelines import PROMPT, flow_scheduler, save_pipeline

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


# -- several prompts ---------------------------------------------------------------------------------------------------


def test_prompts_of_different_lengths_are_padded_and_masked() -> None:
    short, long = torch.ones(1, 2, 4), torch.full((1, 3, 4), 2.0)
    stacked = stack_embeddings([{"prompt_embeds": short}, {"prompt_embeds": long}])
    assert stacked["prompt_embeds"].shape == (2, 3, 4)
    assert stacked["prompt_embeds_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert float(stacked["prompt_embeds"][0, 2].abs().max()) == 0


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a tiny pipeline with text encoders, embeddings of three prompts written by the command)."""
    folder = tmp_path_factory.mktemp("prompts")
    weights, target = save_pipeline("sd_controlnet", folder), folder / "prompts.safetensors"
    with pytest.raises(SystemExit) as stop:
        app([
            "cache-prompts", str(weights), str(target), "--prompt", PROMPT, "--for", "haze=clear the air",
            "--for", "rain|haze=dry the air",
        ])  # fmt: skip
    assert stop.value.code == 0
    return weights, target


def test_each_photo_gets_the_prompt_of_its_type(several: tuple[Path, Path], tmp_path: Path) -> None:
    weights, target = several
    config = {"weights": str(weights), "precision": "float32", "lora_rank": 2}
    schema, family = RESTORERS["sd_controlnet"]
    told = family(schema(**config, prompt_embeds=str(target)))
    assert told.prompt_types == ("", "haze", "haze|rain")
    assert [told.prompt_of(types) for types in ((), ("haze",), ("rain", "haze"), ("blur", "haze"), ("rain",))] == [
        0, 1, 2, 1, 0,
    ]  # fmt: skip
    asked = family(schema(**config, prompt=PROMPT, prompts={"haze": "clear the air", "haze|rain": "dry the air"}))
    assert all(torch.equal(value, asked.prompt[name]) for name, value in told.prompt.items())
    lq = torch.rand(1, 3, 32, 32).repeat(2, 1, 1, 1)
    both = told.condition(lq, [(), ("haze",)])
    z, t_B = torch.randn(1, *told.latent_shape(both)).repeat(2, 1, 1, 1), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        v = told.velocity(z, t_B, both)
        assert not torch.equal(v[0], v[1])  # one photo, one noise, two prompts
        haze = told.velocity(z[1:], t_B[1:], told.condition(lq[1:], [("haze",)]))
        general = told.velocity(z[:1], t_B[:1], told.condition(lq[:1]))
    assert torch.allclose(v[1], haze[0], atol=1e-5) and torch.allclose(v[0], general[0], atol=1e-5)
    told.save(tmp_path)
    again = family(schema(weights=str(tmp_path)))
    assert again.prompt_types == told.prompt_types
    assert all(torch.equal(value, again.prompt[name]) for name, value in told.prompt.items())


def test_a_prompt_without_its_type_is_refused(several: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(["cache-prompts", str(several[0]), str(several[1].with_name("new.safetensors")), "--for", "haze"])
    assert stop.value.code == 64 and "is not TYPE=PROMPT" in capsys.readouterr().err
    schema, family = RESTORERS["sd_controlnet"]
    with pytest.raises(ValueError, match=r"restorer.prompts: type 'fogg' is unknown"):
        family(schema(weights=str(several[0]), prompt=PROMPT, prompts={"fogg": "clear the air"}))
