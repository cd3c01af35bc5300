"""The ground that every test stands on: one thread, no network, empty caches, the same seeds.

The environment is set when this file is imported, before torch is, and child processes (Ray actors, DeepSpeed ranks)
inherit it. A sum's rounding depends on how many threads share it, so bitwise tests need their number fixed; and two
many-threaded processes on two cores spin against each other.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Caches that only this session sees: a test must pass in an empty HOME, and must not leave anything in the user's.
_CACHES = Path(tempfile.mkdtemp(prefix="rlrestore-test-"))
_OWNER = os.getpid()


@atexit.register
def _remove_caches() -> None:
    if os.getpid() == _OWNER:  # a forked child that exits must not take the folder away
        shutil.rmtree(_CACHES, ignore_errors=True)


os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(_CACHES / "hf"),
        "TORCH_HOME": str(_CACHES / "torch"),
        "TORCH_EXTENSIONS_DIR": str(_CACHES / "torch_extensions"),
        "TRITON_CACHE_DIR": str(_CACHES / "triton"),
        "MPLCONFIGDIR": str(_CACHES / "matplotlib"),
        "MPLBACKEND": "Agg",
        "XDG_CACHE_HOME": str(_CACHES / "xdg"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_open_telemetry": "0",  # as rlrestore.actors sets it, which comes too late where a test imports ray first
        "RAY_enable_metrics_collection": "0",
        "TERM": "dumb",  # rich and typer wrap by the terminal's width otherwise
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }
)

import numpy as np  # noqa: E402  (after the environment)
import torch  # noqa: E402

torch.set_num_threads(1)
if torch.get_num_interop_threads() != 1:
    torch.set_num_interop_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Each test begins from the same seeds and leaves the global numeric settings as it found them."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries still draw from it)
    torch.manual_seed(0)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports the compiler: 2 s
        torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent
