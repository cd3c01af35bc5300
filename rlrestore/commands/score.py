"""`rlrestore score`: any rewards, or the mix of a config, on pictures that are there. No training.

In : a JSONL or CSV file whose rows have `image` (or `restored_image`) and, as the rewards need them, `lq` (`degraded_image`), `gt`,
`types` (a list, or text with spaces) or `task` (LL-Bench's name), `id`; paths are relative to the file. Or a folder of pictures, with
folders of LQs and references in which they have the same names. Out: a JSONL row a picture with its scores (null and a reason where a
reward failed), and a table. Refuses before any work, naming the row or file: missing columns and files, sizes that differ.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from envs.images import checked_size, image_files, load_rgb
from envs.types import Restoration, Task
from rewards.base import Scores
from rewards.ll_score.prompt import TYPE_TASKS, known_task
from rewards.rubric import Rubric, RubricScores, TermConfig
from rlrestore.build import build_scorer
from rlrestore.config.files import ConfigError, read_yaml, reward_terms, user_errors
from rlrestore.errors import InputError
from rlrestore.quiet import quiet

COLUMNS = {
    "image": ("image", "restored_image", "restored"),
    "lq": ("lq", "degraded_image", "degraded"),
    "gt": ("gt", "reference"),
}


@dataclass(frozen=True)
class Picture:
    """One row to score."""

    where: str  # for messages: file and line, or the file
    id: str
    image: Path
    lq: Path | None
    gt: Path | None
    types: tuple[str, ...]


def run_score(
    source: Path, output: Path, rewards: Sequence[str], config: Path | None, lq: Path | None, gt: Path | None,
    types: Sequence[str], batch: int,
) -> None:  # fmt: skip
    """Write the scores and print a table. InputError or ConfigError for what the user has to mend."""
    quiet()
    if output.exists():
        raise InputError(f"{output} exists already: choose another --output")
    if batch < 1:
        raise InputError(f"--batch {batch} must be at least 1")
    terms = chosen_terms(rewards, config)
    rubric = user_errors(lambda: Rubric(list(terms.values())), "rewards")
    if not source.exists():
        raise InputError(f"{source} does not exist; give a JSONL or CSV file, or a folder of pictures")
    pictures = list(folder_rows(source, lq, gt, types) if source.is_dir() else file_rows(source))
    if not pictures:
        raise InputError(f"{source} has nothing to score")
    check_pictures(pictures, rubric.needs)
    scorer = build_scorer(terms)
    parts: dict[str, list[Scores]] = {name: [] for name in terms}
    for start in tqdm(range(0, len(pictures), batch), desc="score", unit="batch", disable=None):
        scored = scorer.score([restoration(p) for p in pictures[start : start + batch]])
        for name, scores in scored.items():
            parts[name].append(scores)
    mixed = rubric.combine({name: Scores.cat(scores) for name, scores in parts.items()})
    write_rows(output, pictures, mixed)
    print(summary(rubric, mixed))
    print(f"\nscores       {output}")


def chosen_terms(rewards: Sequence[str], config: Path | None) -> dict[str, TermConfig]:
    """The rewards by kind, or those of a config; ConfigError if that is neither or both."""
    if bool(rewards) == bool(config):
        raise ConfigError("say what to score with: --reward KIND (may be repeated), or --config FILE with rewards:")
    if config is None:
        return reward_terms({kind: {} for kind in rewards}, "--reward")
    data = read_yaml(config)
    if not data.get("rewards"):
        raise ConfigError(f"{config} has no rewards")
    return reward_terms(data["rewards"], f"{config}: rewards")


# -- what to score -------------------------------------------------------------------------------------------------


def file_rows(source: Path) -> Iterator[Picture]:
    """Rows of a JSONL or CSV file. InputError naming the line."""
    reader = csv_rows if source.suffix.lower() == ".csv" else jsonl_rows
    for line, row in reader(source):
        where = f"{source} line {line}"
        paths = {name: _path(source.parent, row, names) for name, names in COLUMNS.items()}
        image = paths["image"]
        if image is None:
            raise InputError(f"{where}: no image; it has {', '.join(map(str, row)) or 'nothing'}")
        yield Picture(where, str(row.get("id") or image.stem), image, paths["lq"], paths["gt"], row_types(row, where))


def jsonl_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(source.read_text("utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise InputError(f"{source} line {line}: no JSON ({error})") from error
        if not isinstance(row, Mapping):
            raise InputError(f"{source} line {line}: wants an object such as {{'image': ..., 'lq': ...}}")
        yield line, row


def csv_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        if not set(header) & set(COLUMNS["image"]):
            raise InputError(
                f"{source} has the columns {', '.join(header)}; wanted one of {', '.join(COLUMNS['image'])}"
            )
        for line, row in enumerate(reader, start=2):
            yield line, {key: value for key, value in row.items() if key and value}


def row_types(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Degradation types of a row, by themselves or by LL-Bench's task. InputError for a task that is unknown."""
    given = row.get("types")
    if given:
        return tuple(given.split()) if isinstance(given, str) else tuple(map(str, given))
    if not row.get("task"):
        return ()
    try:
        task = known_task(str(row["task"]))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    return tuple(kind for kind, name in TYPE_TASKS.items() if name == task)[:1]


def _path(folder: Path, row: Mapping[str, Any], names: Sequence[str]) -> Path | None:
    value = next((row[name] for name in names if row.get(name)), None)
    return None if value is None else folder / str(value)


def folder_rows(source: Path, lq: Path | None, gt: Path | None, types: Sequence[str]) -> Iterator[Picture]:
    """Pictures of a folder with those of the same name in the other folders. InputError naming what has no partner."""
    partners = {name: _by_stem(folder) for name, folder in (("--lq", lq), ("--gt", gt)) if folder is not None}
    for path in image_files(source):
        stem = str(path.relative_to(source).with_suffix(""))
        for name, found in partners.items():
            if stem not in found:
                raise InputError(f"{path} has no partner {stem}.* in the folder of {name}")
        of = {name: found[stem] for name, found in partners.items()}
        yield Picture(str(path), stem, path, of.get("--lq"), of.get("--gt"), tuple(types))


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for path in image_files(folder):
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in found:
            raise InputError(f"{found[stem]} and {path} have the same name: which belongs to {stem}?")
        found[stem] = path
    return found


def check_pictures(pictures: Sequence[Picture], needs: frozenset[str]) -> None:
    """InputError, before any work, for a file that is missing or broken, or of another size than its picture."""
    if "text" in needs:
        raise InputError("one of the rewards needs a prompt, and rows have none")
    for row in pictures:
        sizes = {}
        for name, path in (("image", row.image), ("lq", row.lq), ("gt", row.gt)):
            if path is None:
                if name in needs:
                    raise InputError(f"{row.where}: no {name}, and one of the rewards needs it")
                continue
            if not path.is_file():
                raise InputError(f"{row.where}: {name} {path} does not exist")
            try:
                sizes[name] = checked_size(path)
            except ValueError as error:
                raise InputError(f"{row.where}: {error}") from error
        for name, (height, width) in sizes.items():
            if (height, width) != sizes["image"]:
                wanted = f"{sizes['image'][1]}x{sizes['image'][0]}"
                raise InputError(
                    f"{row.where}: {name} has {width}x{height} px and the image {wanted}: resample it to the image's size"
                )


def restoration(row: Picture) -> Restoration:
    image = _pixels(row.image)
    lq = _pixels(row.lq) if row.lq else image  # no reward reads it then
    return Restoration(Task(row.id, lq, row.types, gt=_pixels(row.gt) if row.gt else None), image)


def _pixels(path: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(load_rgb(path)).permute(2, 0, 1).float() / 255
    except ValueError as error:
        raise InputError(str(error)) from error


# -- what comes out --------------------------------------------------------------------------------------------------


def write_rows(output: Path, pictures: Sequence[Picture], mixed: RubricScores) -> None:
    """One JSON object a picture, at once."""
    lines = []
    for i, row in enumerate(pictures):
        values = {name: _number(float(mixed.raw_RN[r, i])) for r, name in enumerate(mixed.names)}
        reasons = {name: mixed.reason_RN[r][i] for r, name in enumerate(mixed.names) if mixed.reason_RN[r][i]}
        line = {"id": row.id, "image": str(row.image), "scores": values, "mix": _number(float(mixed.mix_N[i]))}
        lines.append(json.dumps(line | ({"reasons": reasons} if reasons else {})))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".tmp-{os.getpid()}-{output.name}")
    temporary.write_text("\n".join(lines) + "\n", "utf-8")
    temporary.replace(output)


def summary(rubric: Rubric, mixed: RubricScores) -> str:
    """A line a reward: version, direction, mean, spread, how many failed."""
    lines = [f"{'reward':<24} {'better':<7} {'mean':>10} {'std':>10} {'scored':>7} {'failed':>7}  version"]
    for r, (name, spec) in enumerate(zip(mixed.names, rubric.specs, strict=True)):
        known = mixed.raw_RN[r][mixed.valid_RN[r]]
        mean, std = (float(known.mean()), float(known.std(correction=0))) if len(known) else (math.nan, math.nan)
        better = "higher" if spec.higher_is_better else "lower"
        failed = int((~mixed.valid_RN[r]).sum())
        lines.append(f"{name:<24} {better:<7} {mean:>10.4f} {std:>10.4f} {len(known):>7} {failed:>7}  {spec.version}")
    whole = mixed.mix_N[mixed.valid_N]
    if len(mixed.names) > 1 and len(whole):
        lines.append(
            f"{'mix':<24} {'higher':<7} {float(whole.mean()):>10.4f} {float(whole.std(correction=0)):>10.4f} {len(whole):>7}"
        )
    return "\n".join(lines)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
