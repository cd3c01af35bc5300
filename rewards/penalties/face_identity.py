"""`face_identity`: faces of the LQ that became somebody else's. Lower is better. Needs dlib and its weights.

    mean over faces of the LQ (>= 48 px) of relu(|e(lq) - e(x)| - margin)

e is dlib's 128-d identity embedding at the landmarks of each picture within the LQ's box, of both pictures blurred alike. Ranges
overlap (the same face blurred: up to 0.5, two people: from 0.42), so it is a soft penalty with a margin. An LQ without a face has 0
for every result: there is nobody to change. No type licenses another face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.filters import gaussian_blur

INSTALL = "pip install 'rlrestore[face]' (dlib and 100 MB of weights)"


@dataclass(frozen=True)
class FaceIdentityParams:
    margin: float = 0.35  # distance that costs nothing
    smallest_px: int = 48
    blur_px: float = 1.5  # sigma, of both pictures


class FaceIdentity(ImageReward):
    params: FaceIdentityParams
    chunk_pixels = 1  # one picture a call

    def __init__(self, params: FaceIdentityParams) -> None:
        super().__init__(params)
        try:
            import dlib
            import face_recognition_models as weights
        except ImportError as error:
            raise ValueError(f"reward 'face_identity' needs {error.name}, which is not installed: {INSTALL}") from error
        self.dlib, self.detector = dlib, dlib.get_frontal_face_detector()
        # five points: the 68-point predictor was trained on data that excludes commercial use
        self.landmarks = dlib.shape_predictor(weights.pose_predictor_five_point_model_location())
        self.network = dlib.face_recognition_model_v1(weights.face_recognition_model_location())

    @classmethod
    def spec_for(cls, params: FaceIdentityParams) -> RewardSpec:
        if params.margin < 0 or params.smallest_px < 1 or params.blur_px < 0:
            raise ValueError(f"face_identity needs margin >= 0, smallest_px >= 1 and blur_px >= 0, got {params}")
        return RewardSpec(
            name="face_identity", version="dlib-20/1", higher_is_better=False, range=(0.0, None), needs=frozenset({"lq"}),
            block="fidelity", scale=0.05, differentiable=False, deterministic=True,
            licence="own code; dlib (Boost) and its weights (CC0)",
        )  # fmt: skip

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        pictures = [
            (_pixels(lq), _pixels(x))
            for lq, x in zip(
                gaussian_blur(stack_lq(items), self.params.blur_px),
                gaussian_blur(stack_images(items), self.params.blur_px),
                strict=True,
            )
        ]
        return torch.tensor([self.distance(lq, x) for lq, x in pictures])

    def distance(self, lq_HW3: np.ndarray, x_HW3: np.ndarray) -> float:
        faces = [box for box in self.detector(lq_HW3, 1) if box.height() >= self.params.smallest_px]
        excess = [
            max(
                0.0,
                float(np.linalg.norm(self.embedding(lq_HW3, box) - self.embedding(x_HW3, box))) - self.params.margin,
            )
            for box in faces
        ]
        return float(np.mean(excess)) if excess else 0.0

    def embedding(self, picture_HW3: np.ndarray, box: object) -> np.ndarray:
        """[128] of the face whose box is known."""
        chip = self.dlib.get_face_chip(picture_HW3, self.landmarks(picture_HW3, box))
        return np.array(self.network.compute_face_descriptor(chip))


def _pixels(image_3HW: Tensor) -> np.ndarray:
    return (image_3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
