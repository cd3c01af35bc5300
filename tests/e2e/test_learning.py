"""Does every method learn, and from its rewards? Each against a control in which rewards are shuffled inside every group.

The packaged restorer on real photographs, at the settings of `scripts/bench_algorithms.py`. Both runs see the same tasks, draw the same
noise in their first iteration and spend the same number of generated images and updates; in the control, who gets which reward of
its group is chance (direct methods: whether they climb or descend). Whatever the control gains comes from elsewhere. A minute or
two a method.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from rlrestore.evaluation.evaluate import Measured
from rlrestore.evaluation.statistics import bootstrap_ci
from scripts.bench_algorithms import CONFIGS, Job, Outcome, execute, read

NAMES = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases() -> dict[str, Measured]:
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_it_beats_its_shuffled_rewards(tmp_path: Path, bases: dict[str, Measured], name: str) -> None:
    options = Namespace(out=tmp_path, iterations=10, points=1, set=[])
    (tmp_path / "runs").mkdir()
    true, control = (outcome(Job(name, 0, shuffled), options, bases) for shuffled in (False, True))
    # paired by crop and noise, on photos that training never saw
    advantage = bootstrap_ci(np.subtract(true.final["mix"], control.final["mix"]))
    assert advantage.low > 0, (advantage, true.mix[-1], control.mix[-1])


def outcome(job: Job, options: Namespace, bases: dict[str, Measured]) -> Outcome:
    execute(job, options, bases)
    found = read(job, options.out)
    assert found is not None
    return found
