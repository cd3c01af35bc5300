"""What travels between a reward server and its clients: JSON with PNG pictures in base64. Never pickle, never JPEG.

    -> {"reward": "ll_score", "items": [{"id": "0", "types": ["rain"], "image": PNG, "lq": PNG, "gt": PNG or absent}]}
    <- {"reward": "ll_score", "version": "...", "rows": [{"id": "0", "value": 1.5 or null, "valid": true, "reason": ""}]}

No prompt and no file name travels: a task is its degradation types, which must look like names. Reading is strict, and
what it refuses costs one row (`ValueError` with the reason), not the request.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from envs.types import Restoration, Task
from rewards.base import Scores, checked_scores

TYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
MAX_TYPES = 16
REASON_LENGTH = 200


def png_bytes(image_3HW: Tensor) -> bytes:
    """8-bit RGB PNG of an image in [0, 1], rounded as a saved file would be."""
    pixels = (image_3HW.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def encode_png(image_3HW: Tensor) -> str:
    return base64.b64encode(png_bytes(image_3HW)).decode("ascii")


def decode_png(text: Any, name: str, max_pixels: int) -> Tensor:
    """`[3, H, W]` float32 in [0, 1]. ValueError for what is no PNG, is broken, or is larger than `max_pixels`.

    The size is read from the header, so a small file that claims 100 megapixels is refused before it is unpacked.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is missing, or no base64 text")
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            if opened.width * opened.height > max_pixels:
                raise ValueError(f"{name} has {opened.width}x{opened.height} px, more than {max_pixels} in all")
            if opened.mode != "RGB":
                raise ValueError(f"{name} is a PNG of mode {opened.mode}, wanted 8-bit RGB")
            pixels = np.array(opened)
    except binascii.Error as error:
        raise ValueError(f"{name} is no base64: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than {max_pixels} px: {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read as a PNG: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def encode_item(item: Restoration, key: str, needs: frozenset[str]) -> dict[str, Any]:
    """One item with the pictures that the reward needs; the LQ always goes along."""
    row: dict[str, Any] = {
        "id": key, "types": list(item.task.types), "image": encode_png(item.image), "lq": encode_png(item.task.lq),
    }  # fmt: skip
    return row | ({"gt": encode_png(item.task.gt)} if "gt" in needs and item.task.gt is not None else {})


def decode_item(row: Mapping[str, Any], max_pixels: int) -> Restoration:
    """ValueError for pictures and types that cannot be used."""
    types = row.get("types", [])
    if not isinstance(types, list) or len(types) > MAX_TYPES:
        raise ValueError(f"types must be a list of at most {MAX_TYPES} names")
    for name in types:
        if not isinstance(name, str) or not TYPE_NAME.fullmatch(name):
            raise ValueError(f"type {str(name)[:40]!r} is no name of a degradation")
    lq, image = (decode_png(row.get(name), name, max_pixels) for name in ("lq", "image"))
    gt = decode_png(row["gt"], "gt", max_pixels) if row.get("gt") is not None else None
    return Restoration(Task(str(row.get("id", "")), lq, tuple(types), gt=gt), image)


def request_items(body: Any, max_items: int) -> tuple[str, list[Mapping[str, Any]]]:
    """(reward, items) of a parsed request. ValueError if it is not of the form above or has too many items."""
    if not isinstance(body, Mapping) or not isinstance(body.get("reward"), str):
        raise ValueError('wants {"reward": name, "items": [...]}')
    items = body.get("items")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise ValueError("items must be a list of objects")
    if len(items) > max_items:
        raise ValueError(f"{len(items)} items, at most {max_items} a request")
    keys = [item.get("id") for item in items]
    if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("every item needs an id of its own (text)")
    return body["reward"], items


def encode_rows(keys: Sequence[str], scores: Scores) -> list[dict[str, Any]]:
    """JSON has no NaN: an invalid row has the value null."""
    return [
        {"id": key, "value": value if valid else None, "valid": valid, "reason": reason}
        for key, value, valid, reason in zip(
            keys, scores.value_N.tolist(), scores.valid_N.tolist(), scores.reason_N, strict=True
        )
    ]


def decode_rows(answer: Mapping[str, Any], keys: Sequence[str], bounds: tuple[float | None, float | None]) -> Scores:
    """Scores in the order of `keys`. ValueError if the answer is not exactly about these keys.

    What a row claims is checked again: a NaN, a text or a value out of range is an invalid row, whatever `valid` says.
    """
    rows = answer.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("the answer has no list of rows")
    by_key = {row.get("id"): row for row in rows}
    if len(rows) != len(keys) or set(by_key) != set(keys):
        raise ValueError(f"asked for {len(keys)} rows, answered {len(rows)}, or about other ids")
    parts = []
    for key in keys:
        row, value = by_key[key], by_key[key].get("value")
        if row.get("valid") is not True:
            reason = " ".join(str(row.get("reason") or "unknown").split())[:REASON_LENGTH]
            parts.append(Scores.failed(1, reason))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            parts.append(Scores.failed(1, f"parse: value {str(value)[:40]!r} is no number"))
        else:
            parts.append(checked_scores(torch.tensor([_float(value)]), bounds))
    return Scores.cat(parts)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf
