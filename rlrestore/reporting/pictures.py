"""Pictures for people: grids with titles. Never the input of a metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP_PX = 4
TEXT_PX = 12
MAX_ROW_TITLE_PX = 160
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
PAPER, INK = (255, 255, 255), (20, 20, 20)


def to_pil(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] (clamped) to 8 bits, rounded to nearest."""
    assert picture.ndim == 3, f"a picture is [3, H, W], got {tuple(picture.shape)}"
    assert picture.shape[0] == 3, f"a picture is [3, H, W], got {tuple(picture.shape)}"
    bytes_HW3 = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(bytes_HW3.cpu().contiguous().numpy())


def from_pil(picture: Image.Image) -> Tensor:
    """[3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 255


def grid(rows: list[list[Tensor]], column_titles: Sequence[str] = (), row_titles: Sequence[str] = ()) -> Tensor:
    """One picture [3, H, W] of rows of pictures [3, h, w], top-left aligned, pixels unchanged.

    Sizes may differ and rows may be short. Titles may hold line breaks; what does not fit is cut with an ellipsis.
    """
    if not rows or not any(rows):
        raise ValueError("a grid needs at least one picture")
    columns = max(len(row) for row in rows)
    if len(column_titles) not in (0, columns) or len(row_titles) not in (0, len(rows)):
        raise ValueError(f"{len(column_titles)} and {len(row_titles)} titles for {columns} columns, {len(rows)} rows")
    font = ImageFont.load_default(size=TEXT_PX)
    width_C = [max(row[c].shape[2] for row in rows if c < len(row)) for c in range(columns)]
    height_R = [max((picture.shape[1] for picture in row), default=0) for row in rows]
    column_texts = [_fit(title, width, font) for title, width in zip(column_titles, width_C, strict=False)]
    row_texts = [_fit(title, MAX_ROW_TITLE_PX, font) for title in row_titles]
    left_px = max((_text_size(text, font)[0] + GAP_PX for text in row_texts), default=0)
    top_px = max((_text_size(text, font)[1] + GAP_PX for text in column_texts), default=0)

    x_C = [left_px + sum(width_C[:c]) + GAP_PX * c for c in range(columns)]
    y_R = [top_px + sum(height_R[:r]) + GAP_PX * r for r in range(len(rows))]
    canvas = Image.new("RGB", (x_C[-1] + width_C[-1], y_R[-1] + height_R[-1]), PAPER)
    draw = ImageDraw.Draw(canvas)
    for text, x in zip(column_texts, x_C, strict=False):
        draw.multiline_text((x, 0), text, fill=INK, font=font)
    for text, y in zip(row_texts, y_R, strict=False):
        draw.multiline_text((0, y), text, fill=INK, font=font)
    for row, y in zip(rows, y_R, strict=True):
        for picture, x in zip(row, x_C, strict=False):
            canvas.paste(to_pil(picture), (x, y))
    return from_pil(canvas)


def _text_size(text: str, font: Font) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(np.ceil(box[2])), int(np.ceil(box[3]))


def _fit(text: str, width_px: int, font: Font) -> str:
    return "\n".join(_fit_line(line, width_px, font) for line in text.split("\n"))


def _fit_line(line: str, width_px: int, font: Font) -> str:
    if font.getlength(line) <= width_px:
        return line
    while line and font.getlength(line + "\u2026") > width_px:
        line = line[:-1]
    return line + "\u2026"
