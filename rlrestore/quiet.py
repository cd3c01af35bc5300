"""Keep other libraries' chatter out of the terminal; our own errors and progress stay."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path


def quiet() -> None:
    """Before heavy imports, in the driver and in every worker."""
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("DeepSpeed", "bitsandbytes", "torch.distributed", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
