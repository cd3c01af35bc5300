"""LL-Bench on disk: five CSV files into sources with restorations, preferences, scores and hallucination labels.

Files: `metadata/images.csv` and `human_preference/{pairwise_quality_preferences, bradley_terry_quality_scores,
hallucination_labels, trial_quality_rankings}.csv`. Their column names are not published where they can be read, so each
logical column has aliases (case and separators do not count) and can be set: `columns={"images.source": "trial_id"}`.
Refuses, with the header or the row: a column that no alias or several fit, an id that images.csv does not know, a
picture that does not exist, a label that is no label.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rewards.ll_score.bradley_terry import bradley_terry, wins_from_ranks
from rewards.ll_score.prompt import known_task

FILES = {
    "images": "metadata/images.csv",
    "pairs": "human_preference/pairwise_quality_preferences.csv",
    "scores": "human_preference/bradley_terry_quality_scores.csv",
    "hallucination": "human_preference/hallucination_labels.csv",
    "rankings": "human_preference/trial_quality_rankings.csv",
}
_ID = ("image_id", "id", "image", "output_id", "restored_id", "restored_image_id")
ALIASES: dict[str, tuple[str, ...]] = {
    "images.id": _ID,
    "images.source": ("source_id", "trial_id", "group_id", "lq_id", "source", "trial", "group", "scene_id"),
    "images.task": ("task", "task_name"),
    "images.model": ("model", "model_name", "method", "algorithm", "restorer"),
    "images.degraded": ("degraded_image", "degraded_path", "degraded", "lq_path", "lq", "input_path", "source_path"),
    "images.restored": ("restored_image", "restored_path", "restored", "output_path", "path", "image_path", "file"),
    "pairs.a": ("a", "image_a", "image_id_a", "image_a_id", "left", "id_a"),
    "pairs.b": ("b", "image_b", "image_id_b", "image_b_id", "right", "id_b"),
    "pairs.preference": ("preference", "preferred", "winner", "label", "p_a", "prob_a"),
    "scores.id": _ID,
    "scores.score": ("score", "bt_score", "bradley_terry_score", "quality_score", "beta"),
    "hallucination.id": _ID,
    "hallucination.label": ("label", "hallucination", "hallucinated", "is_hallucination", "hallucination_label"),
    "rankings.source": ("source_id", "trial_id", "group_id", "lq_id", "source", "trial", "group", "scene_id"),
    "rankings.annotator": ("annotator", "annotator_id", "participant", "participant_id", "user", "user_id"),
    "rankings.id": _ID,
    "rankings.rank": ("rank", "ranking", "position"),
}
TRUE, FALSE = {"1", "true", "yes", "h", "hallucination"}, {"0", "false", "no", "", "none"}


@dataclass(frozen=True)
class Output:
    """One restored picture."""

    id: str
    model: str
    path: Path
    score: float  # Bradley-Terry, zero mean within its source; NaN if not ranked
    hallucinated: float  # 1, 0, NaN if not labelled


@dataclass(frozen=True)
class BenchSource:
    """One degraded photo with its restorations."""

    id: str
    task: str  # a key of prompt.TASKS
    degraded: Path
    outputs: tuple[Output, ...]
    preference: Mapping[tuple[int, int], float] = field(default_factory=dict)  # (i, j) -> P(i over j), by output index


def read_llbench(folder: Path, columns: Mapping[str, str] | None = None, check_files: bool = True) -> list[BenchSource]:
    """All sources, sorted by id. ValueError for what the module docstring refuses."""
    tables = {name: list(_rows(folder / file, name, columns or {})) for name, file in FILES.items()}
    scores = {row["id"]: _number(row, "score") for row in tables["scores"]}
    labels = {row["id"]: _label(row) for row in tables["hallucination"]}
    by_source: dict[str, list[dict[str, str]]] = defaultdict(list)
    known: set[str] = set()
    for row in tables["images"]:
        if row["id"] in known:
            raise ValueError(f"{row['@']}: image id {row['id']!r} appears twice")
        known.add(row["id"])
        by_source[row["source"]].append(row)
    for name in ("scores", "hallucination"):
        for row in tables[name]:
            _known(row, row["id"], known)
    ranked = _scores_from_rankings(tables["rankings"], by_source, known)
    pairs = _pairs(tables["pairs"], known)
    sources = []
    for source, rows in sorted(by_source.items()):
        degraded = {row["degraded"] for row in rows}
        tasks = {_task(row) for row in rows}
        if len(degraded) > 1 or len(tasks) > 1:
            raise ValueError(
                f"{rows[0]['@']}: source {source!r} has {len(degraded)} degraded pictures and tasks {sorted(tasks)}"
            )
        place = {row["id"]: i for i, row in enumerate(rows)}
        outputs = tuple(
            Output(
                row["id"], row["model"], _file(folder, row, "restored", check_files),
                scores.get(row["id"], ranked.get(row["id"], np.nan)), labels.get(row["id"], np.nan),
            )
            for row in rows
        )  # fmt: skip
        preference = {(place[a], place[b]): p for (a, b), p in pairs.items() if a in place and b in place}
        sources.append(
            BenchSource(source, tasks.pop(), _file(folder, rows[0], "degraded", check_files), outputs, preference)
        )
    return sources


def split_by_source(
    sources: Sequence[BenchSource], held_out: float, held_out_models: Sequence[str] = ()
) -> tuple[list[BenchSource], list[BenchSource]]:
    """(train, test): per task, the share `held_out` of the sources whose hashed ids come first is tested on.

    Outputs of `held_out_models` are taken out of the training sources: a judge must not learn brands.
    """
    by_task: dict[str, list[BenchSource]] = defaultdict(list)
    for source in sources:
        by_task[source.task].append(source)
    train, test = [], []
    for group in by_task.values():
        order = sorted(group, key=lambda s: hashlib.sha256(s.id.encode()).hexdigest())
        cut = round(held_out * len(order))
        test += order[:cut]
        train += [_without(s, held_out_models) for s in order[cut:]]
    return train, test


def expected_counts(sources: Sequence[BenchSource]) -> str:
    """ "" if the counts are those of the paper, else a message that says how they differ (a check, not an error)."""
    found = {
        "sources": len(sources),
        "outputs": sum(len(s.outputs) for s in sources),
        "scores": sum(o.score == o.score for s in sources for o in s.outputs),
        "pairs": sum(len(s.preference) for s in sources),
    }
    paper = {"sources": 2469, "outputs": 28919, "scores": 28334, "pairs": 152020}
    different = [f"{name} {found[name]} (paper: {n})" for name, n in paper.items() if found[name] != n]
    return "LL-Bench is not whole: " + ", ".join(different) if different else ""


def _without(source: BenchSource, models: Sequence[str]) -> BenchSource:
    kept = [i for i, output in enumerate(source.outputs) if output.model not in models]
    new = {old: i for i, old in enumerate(kept)}
    preference = {(new[i], new[j]): p for (i, j), p in source.preference.items() if i in new and j in new}
    return BenchSource(source.id, source.task, source.degraded, tuple(source.outputs[i] for i in kept), preference)


def _rows(file: Path, table: str, columns: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Rows with logical column names; "@" says where a row stands. Without its file a table of labels is empty."""
    if not file.is_file():
        if table == "images":
            raise ValueError(f"{file} does not exist: give the folder that holds metadata/ and human_preference/")
        return
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        header = reader.fieldnames or []
        wanted = [key for key in ALIASES if key.startswith(table + ".")]
        names = {key.partition(".")[2]: _column(file, header, key, columns) for key in wanted}
        for number, row in enumerate(reader, start=2):
            found = {logical: (row[name] or "").strip() for logical, name in names.items() if name is not None}
            yield {**found, "@": f"{file.name} line {number}"}


def _column(file: Path, header: Sequence[str], key: str, columns: Mapping[str, str]) -> str | None:
    shown = f"{file} has the columns {', '.join(header)}"
    if key in columns:
        if columns[key] not in header:
            raise ValueError(f"{shown}; columns.{key}={columns[key]} is not among them")
        return columns[key]
    aliases = {_plain(alias) for alias in ALIASES[key]}
    found = [name for name in header if _plain(name) in aliases]
    if key == "rankings.annotator" and not found:
        return None  # one ranking a source
    if len(found) != 1:
        problem = f"{len(found)} of them fit ({', '.join(found)})" if found else "none of them fits"
        raise ValueError(f"{shown}; {problem} {key}: set columns.{key} to one of them")
    return found[0]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _known(row: Mapping[str, str], image: str, known: set[str]) -> None:
    if image not in known:
        raise ValueError(f"{row['@']}: image {image!r} is not in images.csv")


def _number(row: Mapping[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError as error:
        raise ValueError(f"{row['@']}: {name} is {row[name]!r}, not a number") from error
    if not np.isfinite(value):
        raise ValueError(f"{row['@']}: {name} is {row[name]!r}, not a finite number")
    return value


def _label(row: Mapping[str, str]) -> float:
    text = row["label"].lower()
    if text not in TRUE | FALSE:
        raise ValueError(f"{row['@']}: hallucination label {row['label']!r} is neither yes nor no")
    return float(text in TRUE)


def _task(row: Mapping[str, str]) -> str:
    try:
        return known_task(row["task"])
    except ValueError as error:
        raise ValueError(f"{row['@']}: {error}") from error


def _file(folder: Path, row: Mapping[str, str], name: str, check: bool) -> Path:
    path = folder / row[name]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{row['@']}: {name} picture {row[name]!r} lies outside {folder}")
    if check and not path.is_file():
        raise ValueError(f"{row['@']}: {name} picture {path} does not exist")
    return path


def _pairs(rows: Sequence[Mapping[str, str]], known: set[str]) -> dict[tuple[str, str], float]:
    """(a, b) -> P(a over b) from "a", "b", "tie", an id, 1/0/-1 or a probability."""
    out = {}
    signed = any(row["preference"] in ("-1", "-1.0") for row in rows)
    for row in rows:
        a, b, text = row["a"], row["b"], row["preference"]
        _known(row, a, known)
        _known(row, b, known)
        words = {
            "a": 1.0,
            "left": 1.0,
            a.lower(): 1.0,
            "b": 0.0,
            "right": 0.0,
            b.lower(): 0.0,
            "tie": 0.5,
            "equal": 0.5,
        }
        p = words.get(text.lower())
        if p is None:
            value = _number(row, "preference")
            p = (value + 1) / 2 if signed else value
        if not 0 <= p <= 1:
            raise ValueError(f"{row['@']}: preference {text!r} is neither a side, a tie, 1/0/-1 nor a probability")
        out[a, b] = p
    return out


def _scores_from_rankings(
    rows: Sequence[Mapping[str, str]], by_source: Mapping[str, Sequence[Mapping[str, str]]], known: set[str]
) -> dict[str, float]:
    """Bradley-Terry scores of our own, for outputs that the scores file leaves out."""
    rankings: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        _known(row, row["id"], known)
        rankings[row["source"]][row.get("annotator", "")][row["id"]] = _number(row, "rank")
    scores: dict[str, float] = {}
    for source, by_annotator in rankings.items():
        ids = [row["id"] for row in by_source[source]]
        place = {image: i for i, image in enumerate(ids)}
        ranked = sorted(
            {image for ranks in by_annotator.values() for image in ranks if image in place}, key=place.__getitem__
        )
        if len(ranked) < 2:
            continue
        order = {image: i for i, image in enumerate(ranked)}
        wins = sum(
            wins_from_ranks({order[image]: rank for image, rank in ranks.items() if image in order}, len(ranked))
            for ranks in by_annotator.values()
        )
        scores |= dict(zip(ranked, bradley_terry(np.asarray(wins)).tolist(), strict=True))
    return scores
