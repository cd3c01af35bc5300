"""What TensorBoard shows beside scalars: the layout of its charts, histograms, and pictures of groups and of rewards.

Pure functions from records to numbers and pictures, and two that hand them to a log. Pictures are made when an evaluation is due,
never in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs.types import Task
from rewards.rubric import RubricScores
from rlrestore.iteration.credit import Credit
from rlrestore.reporting.pictures import INK, PAPER, from_pil, grid
from rlrestore.types import UpdateReport

if TYPE_CHECKING:
    from rlrestore.crew import Scored
    from rlrestore.reporting.log import RunLog

CELL_PX = 58
LABEL_PX = 12
STRIPS = 4  # groups shown at a time
STRIP_PX = 96  # least width of a rollout in a strip
# Sections whose values are hyperparameters; the others say where and how long, not what.
HPARAM_SECTIONS = (
    "algorithm",
    "rewards",
    "gates",
    "constraints",
    "sampling",
    "rollout",
    "credit",
    "curriculum",
    "regularise",
    "engine",
    "optimiser",
)

Layout = dict[str, dict[str, list[Any]]]


def layout(names: Sequence[str]) -> Layout:
    """The custom-scalar charts of a run whose terms are `names` (gold ones included). Regular expressions match whole tags."""
    mix = {"mix, p10 to p90": ["Margin", ["reward/mix/mean", "reward/mix/p10", "reward/mix/p90"]]}
    each = {
        f"{name}, p10 to p90": ["Margin", [f"reward/{name}/{kind}" for kind in ("mean", "p10", "p90")]]
        for name in names
    }
    return {
        "rewards": {
            **mix, **each,
            "held-out, tuned minus base": ["Multiline", [r"eval/reward/.*/delta$"]],
            "spread inside groups": ["Multiline", [r"group/std/.*"]],
        },
        "fidelity": {
            "gold, tuned minus base": ["Multiline", [r"eval/gold/.*/delta$"]],
            "gold, tuned": ["Multiline", [r"eval/gold/.*/tuned$"]],
            "latents": ["Multiline", [r"x0/latent_(mean|rms)$"]],
            "penalties": ["Multiline", [r"policy/regularise_.*"]],
        },
        "guards": {
            "gates open": ["Multiline", [r"gate/open/.*"]],
            "constraints, measured and bound": ["Multiline", [r"constraint/(measured|bound)/.*"]],
            "multipliers": ["Multiline", [r"constraint/lambda/.*"]],
            "alarm": ["Multiline", [r"alarm/.*"]],
        },
        "optimisation": {
            "loss": ["Multiline", [r"train/loss$"]],
            "gradient norm": ["Multiline", [r"train/grad_norm$"]],
            "learning rate": ["Multiline", [r"train/lr$"]],
            "ratio": ["Multiline", [r"policy/ratio_(mean|deviation_max.*)$"]],
            "clipped": ["Multiline", [r"policy/(clip_frac_.*|trust_region_dropped)$"]],
            "distance": ["Multiline", [r"policy/(kl_.*|old_deviate|matching_error)$"]],
            "advantages": ["Multiline", [r"group/adv_(std|abs_mean)$"]],
        },
        "throughput": {
            "seconds": ["Multiline", [r"time/.*_s$"]],
            "images a second": ["Multiline", [r"throughput/images_per_s$"]],
            "loop efficiency": ["Multiline", [r"throughput/loop_efficiency$"]],
            "forwards a rollout": ["Multiline", [r"cost/.*"]],
        },
        "faults": {
            "failed scores": ["Multiline", [r"reward/failed_frac/.*"]],
            "masked rollouts": ["Multiline", [r"group/masked_samples$"]],
            "dropped groups": ["Multiline", [r"group/(dropped|zero_spread)_.*"]],
            "skipped steps": ["Multiline", [r"train/skipped_steps$"]],
        },
    }  # fmt: skip


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A plain config as the columns of the HParams table: "engine.lr" -> 1e-4. Lists and None as their text."""
    chosen = {section: config[section] for section in HPARAM_SECTIONS if section in config}
    chosen |= {f"{section}.kind": (config.get(section) or {}).get("kind") for section in ("env", "restorer")}
    chosen["run.seed"] = (config.get("run") or {}).get("seed", 0)
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in _leaves(chosen)
        if value not in (None, {}, [])
    }


def _leaves(data: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        return [leaf for key, value in data.items() for leaf in _leaves(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), data)]


def headline(names: Mapping[str, str]) -> list[str]:
    """The tags that the HParams table shows as results, from term name -> role."""
    return ["eval/reward/mix/delta", *(f"eval/{role}/{name}/delta" for name, role in names.items())]


# -- correlation -------------------------------------------------------------------------------------------------------


def correlation_RR(utility_RGK: Tensor) -> Tensor:
    """[R, R] how rewards agree inside groups: Pearson's r of utilities minus their group's mean, over rows that both have.

    NaN is a missing score. A pair with fewer than 3 common rows, or without spread, is NaN.
    """
    R = len(utility_RGK)
    value = utility_RGK.detach().cpu().double()
    result = torch.full((R, R), float("nan"), dtype=torch.float64)
    for a in range(R):
        for b in range(a, R):
            both = value[a].isfinite() & value[b].isfinite()
            x, y = _centred(value[a], both), _centred(value[b], both)
            scale = float((x.square().sum() * y.square().sum()).sqrt())
            if int(both.sum()) >= 3 and scale > 1e-12:
                result[a, b] = result[b, a] = float((x * y).sum()) / scale
    return result


def _centred(value_GK: Tensor, used_GK: Tensor) -> Tensor:
    known = torch.where(used_GK, value_GK, 0.0)
    mean_G1 = known.sum(1, keepdim=True) / used_GK.sum(1, keepdim=True).clamp_min(1)
    return torch.where(used_GK, value_GK - mean_G1, 0.0)


def matrix_picture(value_RR: Tensor, names: Sequence[str]) -> Tensor:
    """[3, H, W]: a cell for each pair, its number written in it; red is -1, white 0, blue +1, grey unknown."""
    font = ImageFont.load_default(size=LABEL_PX)
    left = int(max(font.getlength(name) for name in names)) + 10
    top = LABEL_PX + 10
    side = CELL_PX * len(names)
    canvas = Image.new("RGB", (left + side + 4, top + side + 4), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        draw.text((4, top + CELL_PX * i + CELL_PX // 2 - 7), name, fill=INK, font=font)
        draw.text((left + CELL_PX * i + 2, 4), _cut(name, font), fill=INK, font=font)
        for j in range(len(names)):
            r = float(value_RR[i, j])
            x, y = left + CELL_PX * j, top + CELL_PX * i
            draw.rectangle((x, y, x + CELL_PX - 2, y + CELL_PX - 2), fill=_diverging(r))
            text = "?" if np.isnan(r) else f"{r:+.2f}"
            draw.text((x + CELL_PX // 2, y + CELL_PX // 2), text, fill=INK if abs(r) < 0.7 or r != r else PAPER,
                      font=font, anchor="mm")  # fmt: skip
    return from_pil(canvas)


def _cut(name: str, font: Any) -> str:
    while name and font.getlength(name) > CELL_PX - 6:
        name = name[:-1]
    return name


def _diverging(r: float) -> tuple[int, int, int]:
    if np.isnan(r):
        return (210, 210, 210)
    end = (33, 84, 160) if r > 0 else (176, 42, 48)
    return tuple(round(255 + (channel - 255) * min(1.0, abs(r))) for channel in end)  # type: ignore[return-value]


# -- groups ------------------------------------------------------------------------------------------------------------


def group_strips(
    tasks: Sequence[Task], rollouts: Sequence[Scored], scores: RubricScores, credit: Credit, limit: int = STRIPS
) -> Tensor:
    """[3, H, W]: a row a group: its LQ, then its K rollouts from the highest mix to the lowest, each with its scores.

    A, the advantage, is what the update makes of the mix; "masked" rollouts had a score that failed.
    """
    pixels: dict[tuple[int, int], Tensor] = {}
    for part in rollouts:
        for index, row in enumerate(part.chunk.rows):
            if row.group < limit:
                pixels[row.group, row.member] = _readable(part.images.pixels[index].float() / 255)
    K = 1 + max(member for _, member in pixels)
    strips = []
    for group, task in enumerate(tasks[:limit]):
        mix_K = scores.mix_N[group * K : (group + 1) * K]
        order = torch.argsort(mix_K.nan_to_num(nan=-float("inf")), descending=True, stable=True).tolist()
        titles = [f"LQ\n{task.photo.rsplit('/', 1)[-1]}"] + [_caption(scores, credit, group * K + m) for m in order]
        strips.append([grid([[_readable(task.lq), *(pixels[group, member] for member in order)]], titles)])
    return grid(strips)


def _readable(picture: Tensor) -> Tensor:
    """Whole pixels repeated until a title fits above."""
    times = -(-STRIP_PX // picture.shape[2])
    return picture.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _caption(scores: RubricScores, credit: Credit, row: int) -> str:
    lines = [f"{name} {float(scores.raw_RN[r, row]):.4g}" for r, name in enumerate(scores.names)]
    first = f"A {float(credit.advantage_N[row]):+.2f}" if float(credit.weight_N[row]) > 0 else "masked"
    return "\n".join([first, f"mix {float(scores.mix_N[row]):+.3f}", *lines])


# -- into the log ------------------------------------------------------------------------------------------------------


def log_histograms(log: RunLog, done: int, credit: Credit, reports: Sequence[UpdateReport]) -> None:
    """Advantages of kept rollouts; and what the algorithm gives out by step of the chain, such as the ratio."""
    log.histogram(done, "histogram/advantage", credit.advantage_N[credit.weight_N > 0].numpy())
    for name in sorted({name for report in reports for name in report.spreads}):
        values = [value for report in reports for value in report.spreads.get(name, ())]
        log.histogram(done, f"histogram/{name}", np.asarray(values))


def log_groups(
    log: RunLog, done: int, tasks: Sequence[Task], rollouts: Sequence[Scored], scores: RubricScores, credit: Credit
) -> None:
    """Strips of the first groups, and how their rewards agree."""
    log.image(done, "group/strips", group_strips(tasks, rollouts, scores, credit))
    if len(scores.names) > 1:
        utility_RGK = scores.utility_RN.reshape(len(scores.names), len(tasks), -1)
        log.image(done, "reward/correlation", matrix_picture(correlation_RR(utility_RGK), scores.names))
