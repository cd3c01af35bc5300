"""The embedded judge on disk and in the trainer: `model.safetensors` (float16) and `config.json` in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewards.embedded_judge.estimator import Estimator, EstimatorConfig, restorer_tensors
from rewards.embedded_judge.network import EmbeddedJudge, Heads, JudgeConfig
from rewards.judges.base import Judge, Judged

PACKAGED = Path(__file__).parent / "weights"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class TrainableJudge(Judge):
    """The trained part, as the trainer sees it. Batch: measurements [N, POOLED] of `EmbeddedJudge.describe`."""

    def __init__(self, judge: EmbeddedJudge):
        super().__init__()
        self.heads: Heads = judge.heads

    def forward(self, features: Tensor) -> Judged:
        return Judged(*self.heads(features))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"heads": list(self.heads.parameters())}


def new_judge(config: JudgeConfig, restorer: Path) -> EmbeddedJudge:
    """An untrained judge whose estimator is a copy of the mean network in an embedded restorer's folder."""
    values = _json(restorer / CONFIG)
    if values.get("kind") != "embedded":
        raise ValueError(f"{restorer} is no embedded restorer: its mean network is the judge's estimator")
    estimator = Estimator(EstimatorConfig.of(values))
    _load(estimator, restorer_tensors(load_file(restorer / "weights.safetensors")), restorer)
    return EmbeddedJudge(config, estimator)


def save_judge(judge: EmbeddedJudge, folder: Path) -> None:
    """Both files into an existing folder."""
    save_file({k: v.half().cpu().contiguous() for k, v in judge.state_dict().items()}, folder / WEIGHTS)
    text = {"kind": "embedded_judge", "judge": asdict(judge.config), "estimator": asdict(judge.estimator.config)}
    (folder / CONFIG).write_text(json.dumps(text, indent=1) + "\n", "utf-8")


def load_judge(folder: Path) -> EmbeddedJudge:
    """Ready to score, float32. ValueError if the folder holds no such judge, or a damaged one."""
    values = _json(folder / CONFIG)
    if values.get("kind") != "embedded_judge":
        raise ValueError(f"{folder / CONFIG} is not of an embedded judge")
    judge = EmbeddedJudge(JudgeConfig(**values["judge"]), Estimator(EstimatorConfig.of(values["estimator"])))
    try:
        tensors = {k: v.float() for k, v in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}): copy it again") from error
    _load(judge, tensors, folder)
    return judge.eval().requires_grad_(False)


def _json(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give a folder with {CONFIG} and weights")
    return json.loads(file.read_text("utf-8"))


def _load(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} do not fit its {CONFIG} ({str(error)[:160]}): copy both again"
        ) from error
