"""From a model's answer to a number, strictly: what cannot be read is `Unreadable`, never a guess. Pure functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

SHOWN = 200  # characters of a reply that its reason keeps
NUMBER = re.compile(r"\s*([0-5](?:\.\d{1,3})?)\s*")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FENCED = re.compile(r"\s*```(?:json)?\s*(\{.*\})\s*```\s*", re.DOTALL)
DEGRADED = 1  # the picture that is degraded: a model that says otherwise has not looked


class Unreadable(ValueError):
    """The answer does not say what was asked; the row is invalid (`parse: ...`)."""


@dataclass(frozen=True)
class RemovalFidelity:
    removal: float  # 0..100
    fidelity: float  # 0..100


def expected_value(logprob: Mapping[str, float], labels: Mapping[str, float], min_mass: float) -> float:
    """`sum_k p_k value_k` over the labels, p renormalised; `logprob` of the first token by its text, in nats.

    Case and spaces around a token do not count: variants of a label add up. Unreadable if the labels hold less than `min_mass`
    of the probability (the model wanted to say something else) or fewer than two of them are among the tokens.
    """
    mass: dict[str, float] = {}
    for token, value in logprob.items():
        label = token.strip().casefold()
        if label in labels and not math.isnan(value):
            mass[label] = mass.get(label, 0.0) + math.exp(min(value, 0.0))
    total = sum(mass.values())
    if len(mass) < 2 or total < min_mass or total <= 0:
        top = max(logprob, key=lambda token: logprob[token], default="")
        raise Unreadable(
            f"{len(mass)} of {len(labels)} labels hold {total:.2f} of the probability, wanted two and {min_mass:g}; the "
            f"likeliest token is {top[:20]!r}"
        )
    return sum(labels[label] * p for label, p in mass.items()) / total


def rating(text: str) -> float:
    """0..5 as [0, 1]: the whole reply is the number, or it has exactly one <answer> that is."""
    answers = ANSWER.findall(text)
    if len(answers) > 1:
        raise Unreadable(f"{len(answers)} answers in {text[:SHOWN]!r}")
    found = NUMBER.fullmatch(answers[0] if answers else text)
    if found is None or float(found[1]) > 5:
        raise Unreadable(f"no number from 0 to 5 alone in {text[:SHOWN]!r}")
    return float(found[1]) / 5


def removal_fidelity(text: str) -> RemovalFidelity:
    """The two scores of a reply that is one JSON object (fences allowed) and knows which picture is the degraded one."""
    fenced = FENCED.fullmatch(text)
    try:
        values = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no JSON object alone in {text[:SHOWN]!r}") from error
    if not isinstance(values, dict) or values.get("degraded_picture") != DEGRADED:
        raise Unreadable(f"the degraded picture is not picture {DEGRADED} in {text[:SHOWN]!r}")
    return RemovalFidelity(*(_percent(values, name, text) for name in ("removal", "fidelity")))


def _percent(values: Mapping[str, object], name: str, text: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise Unreadable(f"{name} is no number from 0 to 100 in {text[:SHOWN]!r}")
    return float(value)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Two different scores under one name are no score."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)
