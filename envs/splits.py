"""Train / held-out by name: a photo keeps its side when others are added, and all crops of a photo are on one side."""

from __future__ import annotations

import hashlib


def name_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, evenly spread: the first 8 bytes of its sha256 over 2^64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a photo of this name is for evaluation, when about `fraction` of all are to be."""
    return name_fraction(name) < fraction
