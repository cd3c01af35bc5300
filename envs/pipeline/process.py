"""One photo through the pipeline: ingest, assess, generate, align, filter, judge, and again with the judge's objections.

A photo's way is a pure function of its bytes, the config and the answers that were paid for, so a run that was cut off goes
the same way again: answers come from the ledger, the rest is computed anew.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from envs.images import decode_rgb
from envs.pipeline.align import Aligned, align
from envs.pipeline.config import BuildConfig
from envs.pipeline.filters import measure, reasons
from envs.pipeline.framing import framed, unframed
from envs.pipeline.http import Refused, Rejected, Unanswered
from envs.pipeline.ledger import Ledger
from envs.pipeline.prompts import (
    ASSESS,
    JUDGE,
    VERSION,
    VETOES,
    adaptive_prompt,
    fixed_prompt,
    read_diagnosis,
    read_verdict,
)
from envs.pipeline.providers import Editor, Vlm, edit_key
from envs.pipeline.store import Blobs, digest_of

PARSE_TRIES = 2
ACCEPTED, REVIEW, REJECTED, DEFERRED = "accepted", "review", "rejected", "deferred"


@dataclass(frozen=True)
class Photo:
    """A photo to restore, and what its row says."""

    id: str
    png: bytes  # upright RGB, at most long_edge px
    types: str
    licence: str
    source: str


@dataclass
class Outcome:
    """What became of a photo; one JSON record."""

    id: str
    status: str  # accepted | review | rejected | deferred (no answer yet: a later run tries again)
    reason: str  # "" if accepted
    stage: str = ""  # where that was decided
    types: str = ""
    licence: str = ""
    source: str = ""
    lq: str = ""  # blobs, cut to what both show
    gt: str = ""
    prompt: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list)  # of each candidate: values, verdicts, reasons


@dataclass(frozen=True)
class Tools:
    """Who answers, and where answers are kept."""

    ledger: Ledger
    blobs: Blobs
    editor: Editor
    assessor: Vlm | None
    judge: Vlm | None


def process(photo: Photo, config: BuildConfig, tools: Tools) -> Outcome:
    """The whole way of one photo. BudgetError and WrongKeyError go through: they end the run."""
    outcome = Outcome(photo.id, REJECTED, "", types=photo.types, licence=photo.licence, source=photo.source)
    try:
        diagnosis = assess(photo, config, tools)
        lq = decode_rgb(photo.png, photo.id)
        objections: list[str] = []
        for number in range(config.generate.rounds + 1):
            objections = _round(number, photo, lq, diagnosis, objections, outcome, config, tools)
            if outcome.status != REJECTED or not objections:
                break
    except Unanswered as error:
        outcome.status, outcome.reason = DEFERRED, str(error)
    except Refused as error:
        outcome.stage, outcome.reason = outcome.stage or "generate", f"refused: {error}"
    except (Rejected, ValueError) as error:
        outcome.stage, outcome.reason = outcome.stage or "generate", str(error)
    if outcome.status == ACCEPTED and config.build.reviewed == "all":
        outcome.status, outcome.reason = REVIEW, "all are reviewed"
    return outcome


def assess(photo: Photo, config: BuildConfig, tools: Tools) -> dict[str, Any] | None:
    """What the VLM sees in the photo; None with fixed prompts. ValueError if it cannot be read twice."""
    if tools.assessor is None:
        return None
    text = ASSESS.format(types=photo.types)
    return _asked(tools.assessor, config.assess, [photo.png], text, photo.id, "assess", read_diagnosis, 0, tools)


def _round(
    number: int, photo: Photo, lq: np.ndarray, diagnosis: dict[str, Any] | None, objections: list[str], outcome: Outcome,
    config: BuildConfig, tools: Tools,
) -> list[str]:  # fmt: skip
    """One candidate, always from the original photo. Fills the outcome; returns objections worth another round."""
    prompt = fixed_prompt(photo.types) if diagnosis is None else adaptive_prompt(photo.types, diagnosis, objections)
    outcome.prompt, outcome.stage = prompt, "generate"
    section, seed = config.generate, config.build.seed + number
    frame = framed(photo.png, tools.editor.shapes)
    data = tools.ledger.call(
        edit_key(section, prompt, seed, frame.png), f"generate {photo.id}", section,
        lambda key: tools.editor.edit(frame.png, prompt, seed, key),
    )  # fmt: skip
    entry: dict[str, Any] = {"candidate": tools.blobs.put(data), "prompt": prompt}
    outcome.rounds.append(entry)
    outcome.stage = "align"
    pair = align(lq, unframed(decode_rgb(data, "the answer"), frame), section.max_aspect_change)
    outcome.stage = "filter"
    entry["values"] = measure(pair)
    entry["reasons"] = reasons(entry["values"], config.filter, photo.types)
    if entry["reasons"]:
        outcome.reason = "; ".join(entry["reasons"])
        return []  # an editor told "you blurred it" has no better idea: only the judge's words start another round
    outcome.lq, outcome.gt = (tools.blobs.put(png_of(view)) for view in (pair.lq, pair.gt))
    outcome.stage = "judge"
    if tools.judge is None:
        outcome.status, outcome.reason = ACCEPTED, ""
        return []
    return _judged(photo, pair, entry, outcome, config, tools)


def _judged(
    photo: Photo, pair: Aligned, entry: dict[str, Any], outcome: Outcome, config: BuildConfig, tools: Tools
) -> list[str]:
    """The judge's votes, their median, and what follows."""
    section, assert_judge = config.judge, tools.judge
    assert assert_judge is not None
    views = [png_of(pair.lq), png_of(pair.gt)]
    votes = [
        _asked(
            assert_judge, section, views, JUDGE.format(types=photo.types), photo.id, "judge", read_verdict, vote, tools
        )
        for vote in range(section.votes)
    ]
    entry["votes"] = votes
    d, f = (median(vote[key] for vote in votes) for key in ("D", "F"))
    spread = max(max(vote[key] for vote in votes) - min(vote[key] for vote in votes) for key in ("D", "F"))
    named = [violation for vote in votes for violation in vote["violations"]]
    vetoes = sorted({kind for kind, _ in named if kind in VETOES})
    faults = [f"D {d:g} below {section.min_d:g}"] * (d < section.min_d) + [f"F {f:g} below {section.min_f:g}"] * (
        f < section.min_f
    )
    faults += [f"veto: {kind}" for kind in vetoes]
    if spread > section.disagreement and config.build.reviewed != "none":
        outcome.status, outcome.reason = REVIEW, f"votes differ by {spread:g}"
        return []
    outcome.status, outcome.reason = (REJECTED, "; ".join(faults)) if faults else (ACCEPTED, "")
    return [f"{kind}: {what}" for kind, what in named] if faults else []


def _asked(
    vlm: Vlm, section: Any, pngs: Sequence[bytes], text: str, name: str, stage: str, read: Any, vote: int, tools: Tools
) -> dict[str, Any]:
    """A reply that can be read, within PARSE_TRIES (each is a request of its own); ValueError with the last reason."""
    reason = ""
    for attempt in range(PARSE_TRIES):
        seed = vote * PARSE_TRIES + attempt
        key = digest_of(VERSION, stage, section.url, section.model, text, seed, *pngs)
        reply = tools.ledger.call(
            key,
            f"{stage} {name}",
            section,
            lambda key, seed=seed: vlm.ask(pngs, text, seed, key),  # type: ignore[misc]
        )
        try:
            return read(reply.decode("utf-8", "replace"))
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"{stage}: no reply could be read ({reason})")


def ingest(name: str, data: bytes, config: BuildConfig) -> bytes:
    """The photo as it is sent: upright RGB, metadata left behind, at most `long_edge` px; ValueError if it is too small."""
    image = Image.fromarray(decode_rgb(data, name))
    if min(image.size) < config.build.min_side:
        raise ValueError(f"{image.width}x{image.height} is smaller than build.min_side={config.build.min_side}")
    image.thumbnail((config.build.long_edge,) * 2, Image.Resampling.LANCZOS)
    return png_of(np.asarray(image))


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def with_decision(outcome: Outcome, decision: dict[str, Any] | None) -> Outcome:
    """The outcome after a person has looked at it, if one has."""
    if decision is None or outcome.status not in (REVIEW, ACCEPTED):
        return outcome
    if decision["verdict"] == "accept":
        return replace(outcome, status=ACCEPTED, reason="")
    return replace(outcome, status=REJECTED, stage="review", reason=f"review: {decision['reason']}")
