"""The LL-Bench reader, Bradley-Terry scores and splits, on a synthetic set in the five-CSV layout."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rewards.ll_score.bradley_terry import bradley_terry, wins_from_ranks
from rewards.ll_score.llbench import FILES, expected_counts, read_llbench, split_by_source
from tests.llbench_folder import write_bench


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_bench(tmp_path / "bench", sources=6, outputs=3)


def rewrite(bench: Path, table: str, change: Callable[[list[list[str]]], None]) -> None:
    file = bench / FILES[table]
    rows = list(csv.reader(file.open()))
    change(rows)
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(rows)


def test_bradley_terry_golden_values() -> None:
    # A > B > C once each (datasets of the paper, alpha 0.5 and 0.1): (0.7563, 0, -0.7563), 1.8103
    wins = wins_from_ranks({0: 1, 1: 2, 2: 3}, 3)
    assert bradley_terry(wins) == pytest.approx([0.7563, 0, -0.7563], abs=1e-4)
    assert bradley_terry(wins, prior=0.1)[0] == pytest.approx(1.8103, abs=1e-4)
    uneven = np.array([[0, 3, 3], [0, 0, 2], [0, 1, 0]], float)
    assert bradley_terry(uneven) == pytest.approx([1.3081, -0.4461, -0.8619], abs=1e-4)
    assert wins_from_ranks({0: 1, 1: 1}, 2)[0, 1] == 0.5


def test_everything_is_read(bench: Path) -> None:
    sources = read_llbench(bench)
    assert len(sources) == 6 and {s.task for s in sources} == {"Denoise", "Raindrop Removal", "Dehaze"}
    source = sources[0]
    best = max(range(3), key=lambda i: source.outputs[i].score)
    assert all(p == 1.0 for (i, j), p in source.preference.items() if i == best)
    assert sum(o.score for o in source.outputs) == 0 and len(source.preference) == 3
    assert {o.hallucinated for s in sources for o in s.outputs} == {0.0, 1.0}
    assert "sources 6 (paper: 2469)" in expected_counts(sources)


def test_scores_come_from_rankings_where_the_file_has_none(bench: Path) -> None:
    given = {o.id: o.score for s in read_llbench(bench) for o in s.outputs}
    (bench / FILES["scores"]).unlink()
    derived = {o.id: o.score for s in read_llbench(bench) for o in s.outputs}
    assert sorted(given, key=lambda k: (k[:2], given[k])) == sorted(derived, key=lambda k: (k[:2], derived[k]))
    assert max(derived.values()) == pytest.approx(0.7563, abs=1e-4)


def test_columns_can_be_named(bench: Path) -> None:
    rewrite(bench, "scores", lambda rows: rows[0].__setitem__(1, "utility"))
    with pytest.raises(ValueError, match=r"image_id, utility; none of them fits scores\.score"):
        read_llbench(bench)
    assert (
        read_llbench(bench, {"scores.score": "utility"})[0].outputs[0].score
        == read_llbench(bench, {"scores.score": "utility"})[0].outputs[0].score
    )
    with pytest.raises(ValueError, match="is not among them"):
        read_llbench(bench, {"scores.score": "nothing"})


def test_two_fitting_columns_are_refused(bench: Path) -> None:
    rewrite(bench, "images", lambda rows: [row.append("x" if i else "method") for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match=r"2 of them fit \(model, method\)"):
        read_llbench(bench)


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("hallucination", 1, "maybe", "line 3: hallucination label 'maybe' is neither yes nor no"),
        ("scores", 1, "nan", "line 3: score is 'nan'"),
        ("scores", 0, "stranger", "line 3: image 'stranger' is not in images.csv"),
        ("pairs", 2, "2", "line 3: preference '2'"),
        ("images", 2, "Ignore all rules", "line 3: task 'Ignore all rules' is unknown"),
        ("images", 5, "pictures/none.png", "line 3: restored picture .*none.png does not exist"),
        ("images", 5, "../../etc/passwd", "lies outside"),
    ],
)
def test_a_bad_row_is_named(bench: Path, table: str, column: int, value: str, message: str) -> None:
    rewrite(bench, table, lambda rows: rows[2].__setitem__(column, value))
    with pytest.raises(ValueError, match=message):
        read_llbench(bench)


def test_splits_keep_sources_whole_and_hide_brands(bench: Path) -> None:
    sources = read_llbench(bench)
    train, test = split_by_source(sources, 0.5, ["model1"])
    assert len(test) == 3 and {s.task for s in test} == {s.task for s in sources}  # one of two a task
    assert not {s.id for s in train} & {s.id for s in test}
    assert {o.model for s in train for o in s.outputs} == {"model0", "model2"}
    assert all(len(s.preference) == 1 for s in train) and all(len(s.outputs) == 3 for s in test)
    assert [s.id for s in split_by_source(sources[::-1], 0.5)[1]] != [] and {
        s.id for s in split_by_source(sources[::-1], 0.5)[1]
    } == {s.id for s in test}
