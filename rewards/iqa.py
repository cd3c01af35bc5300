"""Every pyiqa metric by name, through one adapter: `kind: pyiqa, params: {metric: musiq}`.

pyiqa is an optional extra under a non-commercial licence (PolyForm-Noncommercial-1.0.0 and S-Lab); it is imported only
when such a reward is built. Direction and mode come from pyiqa's own table. Nothing is downloaded unless
`allow_download` is set: a missing weight file is a ValueError that names the file, the folder and the address. One
metric object per reward instance, because several pyiqa metrics collect features through hooks into a shared list.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_gt, stack_images

LICENCE = "PolyForm-Noncommercial-1.0.0 (pyiqa; the weights of a metric may add their own terms)"
INSTALL = "pip install pyiqa (optional extra, non-commercial licence)"
PACKAGES = {
    "pkg_resources": "setuptools<81"
}  # module -> what to install; pyiqa's CLIP loader still wants pkg_resources
# Metrics of whole sets of images, of text, or of pairs without a score a picture: no reward can be made of them.
REFUSED = frozenset({"clipscore", "fgresq_pair", "fid", "fid_dinov2", "inception_score", "sfid"})
# Full-reference metrics on Y: pyiqa defaults to full-swing YIQ, the field's tables use studio-swing YCbCr (PSNR differs
# by 1.3219 dB).
YCBCR_METRICS = frozenset({"cw_ssim", "ms_ssim", "psnry", "ssim"})
YIQ_METRICS = frozenset({"gmsd", "nlpd"})  # published on Y of YIQ
# About the std over the outputs of a base restorer; a metric that is not listed takes a tenth of its nominal range.
SCALES: Mapping[str, float] = {
    "brisque": 8.0, "clipiqa": 0.08, "clipiqa+": 0.06, "dists": 0.03, "fsim": 0.02, "gmsd": 0.03, "liqe": 0.5,
    "lpips": 0.05, "maniqa": 0.05, "maniqa-pipal": 0.05, "ms_ssim": 0.03, "musiq": 5.0, "nima": 0.3, "niqe": 0.8,
    "piqe": 10.0, "psnr": 2.0, "psnry": 2.0, "qalign": 0.4, "ssim": 0.08, "ssimc": 0.08, "topiq_fr": 0.06,
    "topiq_nr": 0.06, "vif": 0.08, "vsi": 0.02,
}  # fmt: skip
STOCHASTIC = frozenset({"compare2score"})


@dataclass(frozen=True)
class PyiqaParams:
    metric: str  # pyiqa's own name, e.g. "musiq", "maniqa-pipal", "ssim"
    allow_download: bool = False  # fetch missing weights when the reward is built; False in training runs
    options: Mapping[str, Any] = field(default_factory=dict)  # passed to pyiqa.create_metric as they are


@functools.lru_cache(maxsize=1)
def metric_table() -> Mapping[str, Mapping[str, Any]]:
    """pyiqa's `DEFAULT_CONFIGS`, read from its file alone.

    Importing pyiqa takes seconds, and a driver only wants the table.
    """
    package = importlib.util.find_spec("pyiqa")
    if package is None or package.origin is None:
        raise ValueError(f"reward kind 'pyiqa' needs the package pyiqa, which is not installed: {INSTALL}")
    path = Path(package.origin).with_name("default_model_configs.py")
    spec = importlib.util.spec_from_file_location("_pyiqa_default_model_configs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DEFAULT_CONFIGS


def metric_config(metric: str) -> Mapping[str, Any]:
    """pyiqa's entry for a metric; ValueError for a name that it lacks or that cannot score one picture."""
    table = metric_table()
    if metric in REFUSED:
        raise ValueError(
            f"pyiqa metric {metric!r} does not score a single picture; choose another, e.g. 'musiq' or 'dists'"
        )
    if metric not in table:
        near = get_close_matches(metric, list(table), n=1)
        hint = f" Did you mean: {near[0]!r}?" if near else f" Known: {', '.join(sorted(set(table) - REFUSED))}"
        raise ValueError(f"pyiqa has no metric {metric!r}.{hint}")
    return table[metric]


def nominal_scale(metric: str, score_range: str) -> float:
    """The listed scale, else a tenth of pyiqa's nominal range ("~0, ~100"), else 1."""
    if metric in SCALES:
        return SCALES[metric]
    bounds = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", score_range)]
    return (bounds[1] - bounds[0]) / 10 if len(bounds) == 2 and bounds[1] > bounds[0] else 1.0


def colour_tag(metric: str, options: Mapping[str, Any]) -> str:
    """Suffix of the name that states the colour space of a Y metric, "" for RGB metrics and networks."""
    if "color_space" in options:
        return f"_{options['color_space']}"
    return "_ycbcr" if metric in YCBCR_METRICS else "_yiq" if metric in YIQ_METRICS else ""


class PyiqaReward(ImageReward):
    """One pyiqa metric; scored without gradients, one batch per image size."""

    params: PyiqaParams
    chunk_pixels = 16 * 512 * 512  # networks, on a GPU where there is one

    @classmethod
    def spec_for(cls, params: PyiqaParams) -> RewardSpec:
        config = metric_config(params.metric)
        full_reference = config["metric_mode"] == "FR"
        return RewardSpec(
            name=f"pyiqa_{params.metric}{colour_tag(params.metric, params.options)}",
            version=f"pyiqa-{_version('pyiqa')}",
            higher_is_better=not config.get("lower_better", False),
            range=(None, None),  # pyiqa's ranges are estimates, not bounds
            needs=frozenset({"gt"}) if full_reference else frozenset(),
            block="fidelity" if full_reference else "quality",
            scale=nominal_scale(params.metric, config.get("score_range", "")),
            differentiable=False,
            deterministic=params.metric not in STOCHASTIC,
            licence=LICENCE,
        )

    def __init__(self, params: PyiqaParams) -> None:
        super().__init__(params)
        options = dict(params.options)
        if params.metric in YCBCR_METRICS:
            options.setdefault("color_space", "ycbcr")
        self.metric = create_metric(params.metric, options, params.allow_download)

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        x = stack_images(items).clamp(0, 1)  # a copy: some metrics preprocess in place
        value = self.metric(x, stack_gt(items).clamp(0, 1)) if "gt" in self.spec.needs else self.metric(x)
        return torch.as_tensor(value).reshape(-1)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def create_metric(metric: str, options: Mapping[str, Any], allow_download: bool) -> Any:
    """A pyiqa `InferenceModel` on the CPU or the visible GPU.

    ValueError with the remedy if a weight file is missing.
    """
    guard = contextlib.nullcontext() if allow_download else no_download(metric)
    with offline_environment(allow_download), contextlib.redirect_stdout(io.StringIO()), guard:
        try:
            import pyiqa

            return pyiqa.create_metric(metric, as_loss=False, **options)
        except ImportError as error:  # some metrics import packages that pyiqa does not install
            lacks = PACKAGES.get(str(error.name), str(error.name))
            raise ValueError(
                f"pyiqa metric {metric!r} needs the package {lacks}, which is not installed: pip install '{lacks}'"
            ) from error


@contextlib.contextmanager
def offline_environment(allow_download: bool) -> Iterator[None]:
    """Hugging Face's offline switch, set before the import that reads it and restored afterwards."""
    if allow_download:
        yield
        return
    switches = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with mock.patch.dict(os.environ, switches):
        try:
            import huggingface_hub.constants as constants
        except ImportError:
            yield
            return
        with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
            yield


class MissingWeights(Exception):
    """Raised instead of a download; `url` is what would have been fetched, `path` where it would have been put."""

    def __init__(self, url: str, path: str | None) -> None:
        super().__init__(url)
        self.url, self.path = url, path


@contextlib.contextmanager
def no_download(metric: str) -> Iterator[None]:
    """While a metric is built, its loaders fail with `MissingWeights` at the point where they would fetch a file.

    That covers every way in which pyiqa 0.1.16 fetches: its own loader, torch.hub, CLIP's urlopen and Hugging Face
    (timm, transformers). It finds the file that is missing without a list of our own, which would go stale.
    """
    import urllib.request

    import pyiqa.utils.download_util as pyiqa_download

    def refuse(url: Any, dst: str | None = None, *_: Any, **__: Any) -> None:
        raise MissingWeights(str(getattr(url, "full_url", url)), dst)

    patches = [
        mock.patch.object(pyiqa_download, "download_url_to_file", refuse),
        mock.patch.object(torch.hub, "download_url_to_file", refuse),
        mock.patch.object(urllib.request, "urlopen", refuse),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    except MissingWeights as missing:
        raise ValueError(missing_message(metric, missing.url, missing.path)) from None
    except OSError as error:  # Hugging Face in offline mode: LocalEntryNotFoundError, OfflineModeIsEnabled, ...
        raise ValueError(missing_repository_message(metric, hugging_face_repository(error))) from None


def hugging_face_repository(error: BaseException) -> str:
    """The repository that Hugging Face could not find: its offline errors do not name it, the frames they passed do."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        names = trace.tb_frame.f_locals
        for key in ("repo_id", "path_or_repo_id", "pretrained_model_name_or_path"):
            found = names[key] if isinstance(names.get(key), str) else found
        trace = trace.tb_next
    return found


def missing_repository_message(metric: str, repository: str) -> str:
    """What to do about a missing Hugging Face repository."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    name = repository or "(not named by the library)"
    return (
        f"pyiqa metric {metric!r} needs the Hugging Face repository {name}, which is not in {hub}. On a machine "
        f"with network run: hf download {name} (https://huggingface.co/{name}), and copy "
        f"{hub / ('models--' + name.replace('/', '--'))} here, or set HF_HOME to a folder that has it, or allow it "
        f"once with params: {{metric: {metric}, allow_download: true}}."
    )


def missing_message(metric: str, url: str, path: str | None) -> str:
    """What to do about a missing weight file: the file, the folder, the address."""
    name = Path(path).name if path else url.rsplit("/", 1)[-1]
    folder = Path(path).parent if path else Path(torch.hub.get_dir()) / "clip"
    return (
        f"pyiqa metric {metric!r} needs the file {name}, which is not in {folder}. Download {url} and put it "
        "there, or set TORCH_HOME to a folder that has it (as $TORCH_HOME/hub/...), or allow it once with params: "
        f"{{metric: {metric}, allow_download: true}}."
    )
