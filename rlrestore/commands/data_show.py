"""`rlrestore data show`: a contact sheet of LQ and GT by type, as PNG and HTML, and to TensorBoard if asked for."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from envs.degradations.jpeg import from_uint8_hwc
from envs.images import decode_rgb
from envs.index import Index
from envs.rng import generator_for
from envs.sources.blobs import shown
from envs.sources.rows import Row, primary_type
from rlrestore.commands.data_check import open_user_index
from rlrestore.errors import InputError
from rlrestore.reporting.pictures import grid, to_pil

THUMBNAIL = 192  # px

PAGE = """<!doctype html><meta charset="utf-8"><title>{{ source }}</title>
<style>body{font:14px sans-serif;margin:2em}td{padding:4px;vertical-align:top}img{max-width:384px}</style>
<h1>{{ source }}</h1><p>{{ rows }} rows: {% for name, n in types %}{{ name }} {{ n }}{{ ", " if not loop.last }}{% endfor %}.
{% if bad %}{{ bad }} rows cannot be used.{% endif %}</p>
<table><tr><th>row<th>LQ<th>GT</tr>
{% for row, lq, gt in shown %}<tr><td><b>{{ row.id }}</b><br>{{ row.types }}<br>{{ row.split }}<br>{{ row.licence }}
<br><i>{{ row.prompt }}</i><td>{% if lq %}<img src="{{ lq }}">{% else %}unreadable{% endif %}<td>
{% if gt %}<img src="{{ gt }}">{% endif %}</tr>
{% endfor %}</table>
"""


def run_show(
    source: Path, root: Path | None, out: Path, per_type: int, seed: int, tensorboard: Path | None, overwrite: bool
) -> None:
    """Writes OUT.png and OUT.html; InputError if they exist, or if the source cannot be read."""
    targets = [out.with_suffix(suffix) for suffix in (".png", ".html")]
    for target in targets:
        if target.exists() and not overwrite:
            raise InputError(f"{target} exists: add --overwrite to replace it, or choose another --out")
    if per_type < 1:
        raise InputError(f"--per-type {per_type} must be at least 1")
    index = open_user_index(source, root)
    views = [(row, _thumbnail(index, row.lq), _thumbnail(index, row.gt)) for row in sample(index, per_type, seed)]
    blank = np.full((THUMBNAIL, THUMBNAIL, 3), 128, np.uint8)
    squares = [[from_uint8_hwc(blank if view is None else _square(view)) for view in (lq, gt)] for _, lq, gt in views]
    sheet = grid(squares, ["LQ", "GT"], [f"{row.types}: {row.id}"[:40] for row, *_ in views])
    _write(targets[0], lambda path: to_pil(sheet).save(path, format="PNG"))
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(
        source=source, rows=len(index), types=sorted(index.types().items()), bad=index.bad_count,
        shown=[(row, _data_url(lq), _data_url(gt)) for row, lq, gt in views],
    )  # fmt: skip
    _write(targets[1], lambda path: path.write_text(page, encoding="utf-8"))
    if tensorboard is not None:
        _to_tensorboard(tensorboard, sheet, counts_of(index))
    print("contact sheet  {}\npage           {}".format(*targets))


def sample(index: Index, per_type: int, seed: int) -> list[Row]:
    """Up to `per_type` rows of each type, the same for the same seed."""
    types = [primary_type(types) for types in index.column("types")]
    rows = []
    for number, name in enumerate(sorted(set(types))):
        mine = [n for n, label in enumerate(types) if label == name]
        chosen = generator_for(seed, number).permutation(len(mine))[:per_type]
        rows += [index[mine[int(n)]] for n in sorted(chosen)]
    return rows


def _thumbnail(index: Index, locator: str) -> np.ndarray | None:
    """[h, w, 3] uint8 with a long edge of THUMBNAIL; None if there is no such view, or it cannot be read."""
    try:
        image = Image.fromarray(decode_rgb(index.blobs.read(locator), shown(locator))) if locator else None
    except ValueError:
        return None
    return None if image is None else np.array(ImageOps.contain(image, (THUMBNAIL, THUMBNAIL)))


def _square(pixels: np.ndarray) -> np.ndarray:
    return np.array(ImageOps.pad(Image.fromarray(pixels), (THUMBNAIL, THUMBNAIL), color=(128, 128, 128)))


def _data_url(pixels: np.ndarray | None) -> str:
    if pixels is None:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write(path: Path, save: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    save(temporary)
    os.replace(temporary, path)


def counts_of(index: Index) -> str:
    """Markdown: rows by type and split, and what cannot be used."""
    counts = Counter(zip(map(primary_type, index.column("types")), index.column("split"), strict=True))
    lines = ["| type | split | rows |", "|---|---|---|"]
    lines += [f"| {name} | {split or '-'} | {n} |" for (name, split), n in sorted(counts.items())]
    lines += [f"| | unusable | {index.bad_count} |", "", *(f"- {item}" for item in index.bad[:20])]
    return "\n".join(lines)


def _to_tensorboard(folder: Path, sheet: Tensor, counts: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_image("data/contact_sheet", sheet, 0)
        writer.add_text("data/rows", counts, 0)
