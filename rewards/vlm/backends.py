"""Who answers: an OpenAI-compatible server (vLLM, SGLang, ...), or a checkpoint in this process through transformers."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.remote.http import Asker, AskError
from rewards.remote.wire import png_bytes
from rewards.vlm.read import Unreadable

TOP = 20  # tokens whose probability a server tells (vLLM's default limit)
REPLY_TOKENS = 600  # of a text answer


@dataclass(frozen=True)
class Query:
    system: str
    text: str
    pictures: tuple[Tensor, Tensor]  # LQ and result, [3, H, W] in [0, 1]


class Backend(ABC):
    """Answers N queries; one that fails is its exception (`AskError` or `Unreadable`), in its place."""

    waits: bool  # for another machine
    deterministic: bool

    @abstractmethod
    def first_token(
        self, queries: Sequence[Query], labels: Sequence[str], until: float
    ) -> list[dict[str, float] | Exception]:
        """Log-probability in nats by the text of a token, of the answer's first token; at least of the labels."""

    @abstractmethod
    def reply(self, queries: Sequence[Query], until: float, temperature: float) -> list[str | Exception]:
        """The whole answer; an answer that was cut off is Unreadable."""


class ServerBackend(Backend):
    """`/chat/completions` with data URLs, so that the server fetches nothing."""

    waits, deterministic = True, True

    def __init__(self, asker: Asker, model: str, concurrency: int, extra: Mapping[str, Any]) -> None:
        self.asker, self.model, self.concurrency, self.extra = asker, model, concurrency, dict(extra)

    def first_token(
        self, queries: Sequence[Query], labels: Sequence[str], until: float
    ) -> list[dict[str, float] | Exception]:
        options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP}
        return self._map(lambda query: _top_logprobs(self._ask(query, options, until)), queries)

    def reply(self, queries: Sequence[Query], until: float, temperature: float) -> list[str | Exception]:
        options = {"max_tokens": REPLY_TOKENS, "temperature": temperature}
        return self._map(lambda query: _whole_text(self._ask(query, options, until)), queries)

    def _ask(self, query: Query, options: Mapping[str, Any], until: float) -> Mapping[str, Any]:
        content: list[dict[str, Any]] = [
            {
                "type": "image_url",
                "image_url": {"url": "data:image/png;base64," + base64.b64encode(png_bytes(p)).decode()},
            }
            for p in query.pictures
        ]
        messages = [
            {"role": "system", "content": query.system},
            {"role": "user", "content": [*content, {"type": "text", "text": query.text}]},
        ]
        answer = self.asker.ask(
            "chat/completions", {"model": self.model, "messages": messages, **options, **self.extra}, until
        )
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Unreadable("the answer has no choices")
        return choices[0]

    def _map(self, one: Any, queries: Sequence[Query]) -> list[Any]:
        def safely(query: Query) -> Any:
            try:
                return one(query)
            except (AskError, Unreadable) as error:
                return error

        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            return list(pool.map(safely, queries))


def _top_logprobs(choice: Mapping[str, Any]) -> dict[str, float]:
    """{token: log-probability} of the first token. Unreadable if the server tells none."""
    try:
        rows = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(str(row["token"]), float(row["logprob"])) for row in rows]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable("the answer has no top_logprobs of a first token; does the server allow logprobs?") from error
    return dict(pairs)


def _whole_text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise Unreadable("the answer has no text")
    if choice.get("finish_reason") != "stop":
        raise Unreadable(f"the answer was cut off ({choice.get('finish_reason')}): {text[:80]!r}")
    return text


class LocalBackend(Backend):
    """A checkpoint with a chat template, here. ValueError if it cannot be opened or a label is no single token."""

    waits, deterministic = False, True

    def __init__(self, model: str, revision: str | None, device: str, dtype: str, batch_size: int, max_px: int) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor  # seconds to import

        try:
            self.processor = AutoProcessor.from_pretrained(model, revision=revision)
            network = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"model {model!r} cannot be opened: {str(error).splitlines()[0]}") from error
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"model {model!r} has no chat template: it cannot be asked")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.network, self.batch_size, self.max_px = network.to(self.device).eval(), batch_size, max_px
        self.processor.tokenizer.padding_side = "left"  # so that the next token is the last place of every row

    @torch.inference_mode()
    def first_token(
        self, queries: Sequence[Query], labels: Sequence[str], until: float
    ) -> list[dict[str, float] | Exception]:
        out: list[dict[str, float] | Exception] = []
        for start in range(0, len(queries), self.batch_size):
            batch, texts = self._encode(queries[start : start + self.batch_size])
            ids = label_tokens(self.processor.tokenizer, texts[0], labels)
            logits_NV = self.network(**batch, logits_to_keep=1).logits[:, -1].float()
            logp_NV = logits_NV.log_softmax(-1)
            top_N = logp_NV.argmax(-1)
            for logp_V, top in zip(logp_NV, top_N.tolist(), strict=True):
                likeliest = {self.processor.tokenizer.decode([top]): float(logp_V[top])}
                out.append(likeliest | {text: float(logp_V[token]) for text, token in ids.items()})
        return out

    @torch.inference_mode()
    def reply(self, queries: Sequence[Query], until: float, temperature: float) -> list[str | Exception]:
        out: list[str | Exception] = []
        for query in queries:
            batch, _ = self._encode([query])
            sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
            new = self.network.generate(**batch, max_new_tokens=REPLY_TOKENS, **sampling)[
                0, batch["input_ids"].shape[1] :
            ]
            text = self.processor.tokenizer.decode(new, skip_special_tokens=True)
            out.append(Unreadable(f"the answer was cut off: {text[:80]!r}") if len(new) >= REPLY_TOKENS else text)
        return out

    def _encode(self, queries: Sequence[Query]) -> tuple[dict[str, Tensor], list[str]]:
        texts, pictures = [], []
        for query in queries:
            messages = [
                {"role": "system", "content": [{"type": "text", "text": query.system}]},
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": query.text}],
                },
            ]
            texts.append(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            pictures.append([_pil(picture, self.max_px) for picture in query.pictures])
        batch = self.processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        return {key: value.to(self.device) for key, value in batch.items()}, texts


def label_tokens(tokenizer: Any, prompt: str, labels: Sequence[str]) -> dict[str, int]:
    """Token ids of the labels as they would follow `prompt`, by their text: with and without a space, in both cases.

    ValueError if a label has no spelling of one token: its first piece could belong to another word.
    """
    tail = prompt[-40:]
    before = tokenizer(tail, add_special_tokens=False)["input_ids"]
    found: dict[str, int] = {}
    for label in labels:
        spelled = {space + word for space in ("", " ") for word in (label, label.capitalize(), label.upper())}
        for text in sorted(spelled):
            after = tokenizer(tail + text, add_special_tokens=False)["input_ids"]
            if len(after) == len(before) + 1 and after[: len(before)] == before:
                found[text] = after[-1]
        if not any(text.strip().casefold() == label for text in found):
            raise ValueError(f"label {label!r} is more than one token in this model: choose another params.read")
    return found


def _pil(picture_3HW: Tensor, max_px: int) -> Any:
    from PIL import Image

    pixels = (picture_3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    share = (max_px / (image.width * image.height)) ** 0.5
    if share >= 1:
        return image
    return image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))), Image.Resampling.LANCZOS)
