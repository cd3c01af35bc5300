"""Restorations with scores for off-line training: a restorer samples each photo, the mix of a train config judges.

    python scripts/make_preferences.py CONFIG OUT [--tasks 64] [key=value ...]

Takes env, restorer, rewards, `rollout.samples` and `sampling` of CONFIG, in one process. Writes OUT/manifest.jsonl (env
`preferences`) and PNG files. A photo of which a restoration could not be scored, or whose scores are all alike, is left out. OUT must
not exist.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from envs.types import Task
from rewards.rubric import Rubric
from rlrestore.build import build_crew, check_parts, load_train_config
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import Crew, StageTimes
from rlrestore.iteration.rollout import to_pixels
from rlrestore.iteration.stages import combine, evaluation_chain, make_chunks

LOCAL = ("placement.kind=local", "placement.ranks=1", "engine.kind=torch")


def make(config: TrainConfig, tasks: Sequence[Task], out: Path) -> int:
    """Lines written."""
    out.mkdir(parents=True)
    crew, rubric = build_crew(config, StageTimes()), Rubric(list(config.rewards.values()))
    try:
        lines = [
            line for index, task in enumerate(tqdm(tasks)) if (line := _line(config, crew, rubric, task, index, out))
        ]
    finally:
        crew.close()
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _line(
    config: TrainConfig, crew: Crew, rubric: Rubric, task: Task, index: int, out: Path
) -> dict[str, object] | None:
    rollout = config.rollout
    chunks = make_chunks([task], rollout.samples, rollout.batch, config.run.seed, index)
    scored = list(crew.roll_out(chunks, evaluation_chain(config.sampling)))
    table = combine(scored, rubric)
    scores: list[float] = table.mix_N.tolist()
    if not bool(table.valid_N.all()) or len(set(scores)) == 1:
        return None
    name = f"{index:05d}"
    pictures = [picture for part in scored for picture in part.images.pixels]
    files = [f"{name}_{member}.png" for member in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        _save(picture, out / file)
    line: dict[str, object] = {"lq": f"{name}_lq.png"}
    _save(to_pixels(task.lq), out / f"{name}_lq.png")
    if task.gt is not None:
        _save(to_pixels(task.gt), out / f"{name}_gt.png")
        line["gt"] = f"{name}_gt.png"
    return line | {"restorations": [{"image": file, "score": score} for file, score in zip(files, scores, strict=True)]}


def _save(pixels: Tensor, path: Path) -> None:
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--tasks", type=int, default=64, help="photos")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already: remove it, or write elsewhere")
    config = load_train_config(options.config, [*LOCAL, *options.overrides])
    tasks = check_parts(config).draw(0, options.tasks)
    print(f"{make(config, tasks, options.out)} photos in {options.out}/manifest.jsonl")


if __name__ == "__main__":
    main()
