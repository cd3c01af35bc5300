"""Gemini's API over HTTP: `POST {url}/models/{model}:generateContent`, for pictures and for replies.

Its API knows no Idempotency-Key: of a request that was lost with the process, the second one is charged as well.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from envs.pipeline.config import ApiSection, GenerateSection
from envs.pipeline.framing import nearest_shape, png_size
from envs.pipeline.http import GEMINI_KEY, Refused, Rejected
from envs.pipeline.ledger import Answer
from envs.pipeline.providers import count_of, make_api

# `finishReason`s that are a refusal; the others but STOP are answers that were cut off.
REFUSALS = frozenset({
    "BLOCKLIST", "IMAGE_OTHER", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "IMAGE_SAFETY", "LANGUAGE", "NO_IMAGE", "OTHER",
    "PROHIBITED_CONTENT", "RECITATION", "SAFETY", "SPII",
})  # fmt: skip


class GeminiEditor:
    """A picture and the prompt in, `candidates[0].content.parts[].inlineData` out; prose instead of a picture is a refusal."""

    shapes: tuple[tuple[int, int], ...] = (
        (1, 1), (2, 3), (3, 2), (3, 4), (4, 3), (4, 5), (5, 4), (9, 16), (16, 9), (21, 9),
    )  # fmt: skip

    def __init__(self, section: GenerateSection) -> None:
        self._section, self._api = section, make_api(section, GEMINI_KEY)

    def edit(self, png: bytes, prompt: str, seed: int, key: str) -> Answer:
        width, height = nearest_shape(png_size(png), self.shapes)
        image = {"aspectRatio": f"{width}:{height}"}
        if self._section.image_size:
            image["imageSize"] = self._section.image_size
        config = {"responseModalities": ["IMAGE"], "imageConfig": image, "seed": seed}
        answer = self._api.post(_path(self._section), key, json=_body([png], prompt, config))
        parts = _parts(answer)
        for part in parts:
            data = part.get("inlineData") or {}
            if str(data.get("mimeType", "")).startswith("image/"):
                try:
                    return _answer(base64.b64decode(data["data"], validate=True), answer)
                except (KeyError, TypeError, binascii.Error) as error:
                    raise Rejected("the answer's picture is not base64") from error
        words = " ".join(str(part.get("text", "")) for part in parts).strip()
        raise Refused(f"words instead of a picture: {words[:200]}" if words else "the answer holds no picture")


class GeminiVlm:
    """Pictures and a question in, one JSON text out, at temperature 0."""

    def __init__(self, section: ApiSection) -> None:
        self._section, self._api = section, make_api(section, GEMINI_KEY)

    def ask(self, pngs: Sequence[bytes], text: str, seed: int, key: str) -> Answer:
        config = {"responseMimeType": "application/json", "temperature": 0, "seed": seed, "maxOutputTokens": 4096}
        answer = self._api.post(_path(self._section), key, json=_body(pngs, text, config))
        reply = "".join(str(part.get("text", "")) for part in _parts(answer) if not part.get("thought"))
        if not reply:
            raise Rejected("the answer holds no text")
        return _answer(reply.encode(), answer)


def _path(section: ApiSection) -> str:
    return f"models/{section.model}:generateContent"


def _body(pngs: Sequence[bytes], text: str, config: dict[str, Any]) -> dict[str, Any]:
    pictures = [{"inlineData": {"mimeType": "image/png", "data": base64.b64encode(png).decode()}} for png in pngs]
    return {"contents": [{"role": "user", "parts": [*pictures, {"text": text}]}], "generationConfig": config}


def _parts(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of the first candidate. Refused if the prompt or the candidate was blocked, Rejected if it was cut off."""
    blocked = (answer.get("promptFeedback") or {}).get("blockReason")
    if blocked:
        raise Refused(f"the prompt was blocked ({blocked})")
    try:
        candidate = answer["candidates"][0]
        reason = candidate.get("finishReason") or "STOP"
        parts = (candidate.get("content") or {}).get("parts") or []
        valid = [part for part in parts if isinstance(part, dict)]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Rejected("the answer holds no candidate") from error
    if reason in REFUSALS:
        raise Refused(f"the model gave nothing ({reason}) {str(candidate.get('finishMessage') or '')[:200]}".rstrip())
    if reason != "STOP":
        raise Rejected(f"the answer was cut off ({reason})")
    return valid


def _answer(payload: bytes, answer: dict[str, Any]) -> Answer:
    usage = answer.get("usageMetadata") or {}
    spent_out = count_of(usage.get("candidatesTokenCount")) + count_of(usage.get("thoughtsTokenCount"))
    return Answer(
        payload, count_of(usage.get("promptTokenCount")), spent_out, str(answer.get("responseId", "")),
        str(answer.get("modelVersion", "")),
    )  # fmt: skip
