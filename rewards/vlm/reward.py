"""`vlm_quality`, `vlm_hallucination`, `vlm_removal_fidelity`: any vision-language model as a judge. Not LL-Score.

Training-free stand-ins, members of an ensemble, or held-out gold. The first two read the probabilities of the answer's first
token; the third parses a reply. What cannot be read is invalid (`parse: ...`); a text answer is asked for once more before.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from envs.types import Restoration
from rewards.base import Block, Reward, RewardSpec, Scores, checked_scores, missing_data
from rewards.ll_score.prompt import task_of_types
from rewards.remote.http import Asker, AskError, Patience
from rewards.vlm.backends import Backend, LocalBackend, Query, ServerBackend
from rewards.vlm.prompt import LABELS, SYSTEM, prompt_hash, question
from rewards.vlm.read import Unreadable, expected_value, rating, removal_fidelity

READS = ("digits", "levels", "text")
AXES = ("both", "removal", "fidelity")
KEPT = 4096  # values that are remembered, so that a second term on the same answer costs nothing
FRESH = 0.5  # temperature of the second try of a text answer


@dataclass(frozen=True)
class VlmParams:
    model: str  # its name on the server, or a folder or hub id
    url: str | None = None  # of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; null: transformers, here
    key_env: str = "RLRESTORE_VLM_KEY"  # environment variable with the server's key; unset: none is sent
    min_mass: float = 0.5  # of the probability that the labels must hold
    concurrency: int = 8  # requests at a time
    batch_size: int = 4  # of the local model
    deadline_s: float = 45.0  # of one `score`; keep it below the term's timeout_s
    attempts: int = 4
    backoff_s: float = 0.5
    extra: Mapping[str, Any] = field(default_factory=dict)  # into every request, e.g. {chat_template_kwargs: ...}
    revision: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    max_px: int = 1024 * 1024  # pictures are scaled down to this area for the local model


@dataclass(frozen=True)
class VlmQualityParams(VlmParams):
    read: str = "digits"  # digits | levels (probabilities of the first token) | text (a number)


@dataclass(frozen=True)
class VlmRemovalFidelityParams(VlmParams):
    axis: str = "both"  # both: sqrt(removal * fidelity) | removal | fidelity; of one answer


class Shared:
    """One backend with a memory of its answers by content: terms on the same question share them."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        p = VlmParams(**params)
        self.backend: Backend
        if p.url is None:
            self.backend = LocalBackend(p.model, p.revision, p.device, p.dtype, p.batch_size, p.max_px)
        else:
            asker = Asker(p.url, p.key_env, Patience(5.0, p.deadline_s, p.attempts, p.backoff_s))
            self.backend = ServerBackend(asker, p.model, p.concurrency, p.extra)
        self.known: OrderedDict[str, Any] = OrderedDict()

    def remember(self, key: str, value: Any) -> None:
        self.known[key] = value
        while len(self.known) > KEPT:
            self.known.popitem(last=False)


@functools.lru_cache(maxsize=4)
def _shared(text: str) -> Shared:
    return Shared(json.loads(text))


class VlmReward(Reward):
    params: VlmParams
    asks: str  # a question of `prompt.question`

    def __init__(self, params: Any) -> None:
        self.params, self.spec = params, self.spec_for(params)
        common = {key: value for key, value in asdict(params).items() if key not in ("axis", "read")}
        self.shared = _shared(json.dumps(common, sort_keys=True))
        self.waits = self.shared.backend.waits

    @classmethod
    def read_of(cls, params: Any) -> str:
        return "text"

    @classmethod
    def make_spec(cls, params: VlmParams, name: str, higher: bool, block: Block, scale: float) -> RewardSpec:
        if min(params.concurrency, params.batch_size) < 1 or not params.deadline_s > 0:
            raise ValueError(f"{name}: concurrency and batch_size are at least 1 and deadline_s is > 0, got {params}")
        read = cls.read_of(params)
        return RewardSpec(
            name=name, version=f"not LL-Score; {params.model}; {read}; {prompt_hash(cls.asks, read)}",
            higher_is_better=higher, range=(0.0, 1.0), needs=frozenset({"lq"}), block=block, scale=scale,
            differentiable=False, deterministic=read != "text", licence="of the model that is asked",
        )  # fmt: skip

    def value_of(self, answer: Any) -> float:
        """The number of one answer. Unreadable."""
        raise NotImplementedError

    def score(self, items: Sequence[Restoration]) -> Scores:
        until = time.monotonic() + self.params.deadline_s
        reasons = [missing_data(item, self.spec.needs) for item in items]
        good = [i for i, reason in enumerate(reasons) if not reason]
        answers = dict(zip(good, self._answers([items[i] for i in good], until), strict=True))
        return Scores.cat([
            Scores.failed(1, reason) if reason else self._row(answers[i]) for i, reason in enumerate(reasons)
        ])  # fmt: skip

    def _row(self, answer: Any) -> Scores:
        try:
            if isinstance(answer, Exception):
                raise answer
            return checked_scores(torch.tensor([self.value_of(answer)]), self.spec.range)
        except AskError as error:
            return Scores.failed(1, str(error)[:400])
        except Unreadable as error:
            return Scores.failed(1, f"parse: {error}"[:400])

    def _answers(self, items: Sequence[Restoration], until: float) -> list[Any]:
        """One answer or exception an item; equal items are asked about once."""
        read = self.read_of(self.params)
        keys = [_key(item, self.asks, read) for item in items]
        known = self.shared.known
        new = list({key: i for i, key in enumerate(keys) if key not in known}.values())
        fresh = dict(zip([keys[i] for i in new], self._ask([items[i] for i in new], until), strict=True)) if new else {}
        for key, answer in fresh.items():
            if not isinstance(answer, Exception):  # a failure may pass
                self.shared.remember(key, answer)
        return [fresh[key] if key in fresh else known[key] for key in keys]

    def _ask(self, items: Sequence[Restoration], until: float) -> list[Any]:
        read = self.read_of(self.params)
        queries = [
            Query(SYSTEM, question(self.asks, task_of_types(item.task.types), read), (item.task.lq, item.image))
            for item in items
        ]
        if read != "text":
            return list(self.shared.backend.first_token(queries, list(LABELS[read]), until))
        answers: list[Any] = list(self.shared.backend.reply(queries, until, 0.0))
        again = [i for i, answer in enumerate(answers) if self._unreadable(answer)]
        second = self.shared.backend.reply([queries[i] for i in again], until, FRESH) if again else []
        for i, answer in zip(again, second, strict=True):
            answers[i] = answer
        return answers

    def _unreadable(self, answer: Any) -> bool:
        if isinstance(answer, Exception):
            return isinstance(answer, Unreadable)
        try:
            self.value_of(answer)
        except Unreadable:
            return True
        return False


class VlmQuality(VlmReward):
    params: VlmQualityParams
    asks = "quality"

    @classmethod
    def read_of(cls, params: Any) -> str:
        return params.read

    @classmethod
    def spec_for(cls, params: VlmQualityParams) -> RewardSpec:
        if params.read not in READS:
            raise ValueError(f"vlm_quality.read is {params.read!r}; choose one of {', '.join(READS)}")
        return cls.make_spec(params, "vlm_quality", True, "quality", 0.1)

    def value_of(self, answer: Any) -> float:
        if self.params.read == "text":
            return rating(answer)
        return expected_value(answer, LABELS[self.params.read], self.params.min_mass)


class VlmHallucination(VlmReward):
    """P(yes) that something was invented or lost."""

    asks = "hallucination"

    @classmethod
    def read_of(cls, params: Any) -> str:
        return "yes_no"

    @classmethod
    def spec_for(cls, params: VlmParams) -> RewardSpec:
        return cls.make_spec(params, "vlm_hallucination", False, "fidelity", 0.1)

    def value_of(self, answer: Any) -> float:
        return expected_value(answer, LABELS["yes_no"], self.params.min_mass)


class VlmRemovalFidelity(VlmReward):
    """sqrt(removal * fidelity), or one of them, in [0, 1]; after the D x F protocol of HarnessIR, in words of ours."""

    params: VlmRemovalFidelityParams
    asks = "removal_fidelity"

    @classmethod
    def spec_for(cls, params: VlmRemovalFidelityParams) -> RewardSpec:
        if params.axis not in AXES:
            raise ValueError(f"vlm_removal_fidelity.axis is {params.axis!r}; choose one of {', '.join(AXES)}")
        name = "vlm_removal_fidelity" if params.axis == "both" else f"vlm_{params.axis}"
        return cls.make_spec(params, name, True, "fidelity" if params.axis == "fidelity" else "quality", 0.1)

    def value_of(self, answer: Any) -> float:
        found = removal_fidelity(answer)
        if self.params.axis == "both":
            return math.sqrt(found.removal * found.fidelity) / 100
        return (found.removal if self.params.axis == "removal" else found.fidelity) / 100


def _key(item: Restoration, asks: str, read: str) -> str:
    digest = hashlib.sha256(f"{asks}|{read}|{task_of_types(item.task.types)}".encode())
    for image in (item.task.lq, item.image):
        digest.update(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes())
    return digest.hexdigest()
