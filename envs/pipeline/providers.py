"""Who answers: OpenAI's and Gemini's APIs over HTTP (`envs.pipeline.gemini`), and any restorer in this process."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Protocol

from envs.pipeline.config import ApiSection, GenerateSection
from envs.pipeline.framing import nearest_shape, png_size
from envs.pipeline.http import OPENAI_KEY, Api, Refused, Rejected
from envs.pipeline.ledger import Answer
from envs.pipeline.prompts import VERSION
from envs.pipeline.store import digest_of

Restore = Callable[[bytes, int], bytes]  # (PNG, seed) -> PNG of the same size


class Editor(Protocol):
    """Edits a picture as it is told."""

    shapes: tuple[tuple[int, int], ...]  # (width, height) that it can return, or their ratios; () for any

    def edit(self, png: bytes, prompt: str, seed: int, key: str) -> Answer:
        """A picture's bytes, not yet looked at. Refused, Rejected or Unanswered if there is none."""
        ...


class OpenAIEditor:
    """`POST {url}/images/edits`: multipart with image, prompt, model, size; the answer has `data[0].b64_json`."""

    shapes: tuple[tuple[int, int], ...] = ((1024, 1024), (1536, 1024), (1024, 1536))

    def __init__(self, section: GenerateSection) -> None:
        self._section, self._api = section, make_api(section)

    def edit(self, png: bytes, prompt: str, seed: int, key: str) -> Answer:
        size = "x".join(map(str, nearest_shape(png_size(png), self.shapes)))
        answer = self._api.post(
            "images/edits", key, data={"model": self._section.model, "prompt": prompt, "n": "1", "size": size},
            files={"image": ("photo.png", png, "image/png")},
        )  # fmt: skip
        try:
            payload = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
        except (KeyError, IndexError, TypeError, binascii.Error) as error:
            raise Refused("the answer holds no picture") from error
        return Answer(payload, *_usage(answer), str(answer.get("id", "")))


class LocalEditor:
    """A restorer in this process: it does not read the prompt."""

    shapes: tuple[tuple[int, int], ...] = ()

    def __init__(self, restore: Restore) -> None:
        self._restore = restore

    def edit(self, png: bytes, prompt: str, seed: int, key: str) -> Answer:
        return Answer(self._restore(png, seed), model="local")


class Vlm(Protocol):
    """Looks at pictures and answers a question."""

    def ask(self, pngs: Sequence[bytes], text: str, seed: int, key: str) -> Answer:
        """The reply's text as UTF-8. Rejected if it was cut off."""
        ...


class OpenAIVlm:
    """`POST {url}/chat/completions` with pictures as data URLs, at temperature 0."""

    def __init__(self, section: ApiSection) -> None:
        self._section, self._api = section, make_api(section)

    def ask(self, pngs: Sequence[bytes], text: str, seed: int, key: str) -> Answer:
        """The reply's text as UTF-8. Rejected if it was cut off."""
        pictures = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}
            for png in pngs
        ]
        body = {
            "model": self._section.model, "temperature": 0, "seed": seed, "max_tokens": 1024,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
        }  # fmt: skip
        answer = self._api.post("chat/completions", key, json=body)
        try:
            choice = answer["choices"][0]
            reply = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise Rejected("the answer holds no message") from error
        if choice.get("finish_reason") == "content_filter" or reply is None:
            raise Refused("the model gave no reply (content filter)")
        return Answer(str(reply).encode(), *_usage(answer), str(answer.get("id", "")), str(answer.get("model", "")))


def make_api(section: ApiSection, key_header: str = OPENAI_KEY) -> Api:
    return Api(
        section.url, section.api_key_env, section.requests_per_minute, section.timeout_s, section.retries, key_header=key_header
    )  # fmt: skip


def _usage(answer: dict) -> tuple[int, int]:
    """(tokens in, tokens out) under either of OpenAI's names; 0 where nothing is said."""
    usage = answer.get("usage") or {}
    pairs = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    first, second = (next((n for name in names if (n := count_of(usage.get(name)))), 0) for names in pairs)
    return first, second


def count_of(value: object) -> int:
    """Tokens as a server tells them; 0 for what is no number, because an answer that was paid for is kept."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0


def edit_key(section: GenerateSection, prompt: str, seed: int, png: bytes) -> str:
    """Key of the request for one candidate."""
    told = (section.kind, section.url, section.model, section.image_size, section.checkpoint, section.downscale)
    return digest_of(VERSION, "generate", *told, prompt, seed, png)
