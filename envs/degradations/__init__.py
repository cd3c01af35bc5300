"""Synthetic degradations: pure functions of (image, generator). `DEGRADATIONS` names the recipes a config can
choose.
"""

from __future__ import annotations

from dataclasses import replace

from envs.degradations.ggt import Category
from envs.degradations.realesrgan import SECOND_STAGE, Recipe, Stage

DEGRADATIONS: dict[str, Recipe | Category] = {
    # zsyOAOA/ResShift configs/realsr_swinunet_realesrgan256.yaml: Real-ESRGAN ranges, second round half of the time
    "first_order": Recipe(second=replace(SECOND_STAGE, kernel_size=(7, 15)), second_order_prob=0.5),
    "ggt": Category("ggt"),
    "haze": Category("haze"),
    "lowlight": Category("lowlight"),
    # cswry/SeeSR dataloaders/params_realesrgan.yml, the same in csslc/PiSA-SR
    "mild": Recipe(
        first=Stage(
            resize_range=(0.3, 1.5), noise_sigma_255=(1.0, 15.0), poisson_scale=(0.05, 2.0), jpeg_quality=(60.0, 95.0)
        ),
        second=Stage(
            blur_prob=0.5,
            sigma_px=(0.2, 1.5),
            resize_probs=(0.3, 0.4, 0.3),
            resize_range=(0.6, 1.2),
            noise_sigma_255=(1.0, 12.0),
            poisson_scale=(0.05, 1.0),
            jpeg_quality=(60.0, 100.0),
        ),
    ),
    "mix": Category("mix"),
    "oldphoto": Category("oldphoto"),
    "rain": Category("rain"),
    "realesrgan": Recipe(),
    "snow": Category("snow"),
}
