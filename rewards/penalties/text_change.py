"""`text_change`: text of the LQ that the result changed, and text that it invented. Lower is better. Needs rapidocr.

    (sum over confident words b of the LQ of min(levenshtein(a, b), len(b)) + characters of invented words)
        / max(characters of the confident words of the LQ, 8)

a is what the result says where b stood, lower case, without spaces. Blur makes words mutate, so only words that were read with
confidence 0.9 and are 12 px tall count in the LQ; invented is a confident word of the result that overlaps nothing that was taken
for text in the LQ. A picture without text has 0 on both sides: there is nothing to change. No type licenses a change of text.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec

INSTALL = "pip install 'rlrestore[ocr]'"
SHORTEST = 8  # characters: what a photo without text counts as, so that one invented letter is not infinitely much
OVERLAP = 0.1  # of the smaller box
KEPT = 64  # LQs that are remembered


@dataclass(frozen=True)
class Word:
    text: str  # lower case, no spaces
    confidence: float
    box: tuple[float, float, float, float]  # left, top, right, bottom in px

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def overlaps(a: Word, b: Word) -> bool:
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    areas = [(w.box[2] - w.box[0]) * (w.box[3] - w.box[1]) for w in (a, b)]
    return width > 0 and height > 0 and width * height >= OVERLAP * min(areas)


def text_distance(lq: Sequence[Word], x: Sequence[Word], confidence: float, height_px: float) -> float:
    """See the module docstring; `lq` and `x` are all words that were found."""

    def sure(word: Word) -> bool:
        return word.confidence >= confidence and word.height >= height_px and bool(word.text)

    known = [word for word in lq if sure(word)]
    changed = 0
    for word in known:
        there = sorted((other for other in x if overlaps(word, other)), key=lambda other: other.box[0])
        changed += min(levenshtein("".join(other.text for other in there), word.text), len(word.text))
    invented = [word for word in x if sure(word) and not any(overlaps(word, other) for other in lq)]
    total = max(SHORTEST, sum(len(word.text) for word in known))
    return (changed + sum(len(word.text) for word in invented)) / total


@dataclass(frozen=True)
class TextChangeParams:
    confidence: float = 0.9
    height_px: float = 12.0


class TextChange(ImageReward):
    params: TextChangeParams
    chunk_pixels = 1  # one picture a call

    def __init__(self, params: TextChangeParams) -> None:
        super().__init__(params)
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ValueError(
                f"reward 'text_change' needs rapidocr-onnxruntime, which is not installed: {INSTALL}"
            ) from error
        self.engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
        self.known: OrderedDict[bytes, list[Word]] = OrderedDict()

    @classmethod
    def spec_for(cls, params: TextChangeParams) -> RewardSpec:
        if not 0 < params.confidence <= 1 or params.height_px < 0:
            raise ValueError(f"text_change needs confidence in (0, 1] and height_px >= 0, got {params}")
        return RewardSpec(
            name="text_change", version="rapidocr-1.4.4/1", higher_is_better=False, range=(0.0, None),
            needs=frozenset({"lq"}), block="fidelity", scale=0.25, differentiable=False, deterministic=True,
            licence="own code; PP-OCR weights of rapidocr (Apache-2.0)",
        )  # fmt: skip

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        p = self.params
        values = [text_distance(self._of_lq(i.task.lq), self.read(i.image), p.confidence, p.height_px) for i in items]
        return torch.tensor(values)

    def _of_lq(self, lq: Tensor) -> list[Word]:
        key = hashlib.sha256(lq.contiguous().numpy().tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.read(lq)
            while len(self.known) > KEPT:
                self.known.popitem(last=False)
        return self.known[key]

    def read(self, image_3HW: Tensor) -> list[Word]:
        """All words of a picture, whatever their confidence."""
        bgr = (image_3HW.clamp(0, 1) * 255).round().to(torch.uint8).flip(0).permute(1, 2, 0).contiguous().numpy()
        found: list[Any] | None = self.engine(bgr)[0]
        words = []
        for corners, text, confidence in found or []:
            xs, ys = [float(c[0]) for c in corners], [float(c[1]) for c in corners]
            plain = "".join(text.lower().split())
            words.append(Word(plain, float(confidence), (min(xs), min(ys), max(xs), max(ys))))
        return words
