"""Photos whose groups differ come more often, solved ones rarely; and it continues from its saved state."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from envs.types import Task
from rlrestore.config.sections import CurriculumConfig
from rlrestore.iteration.curriculum import Curriculum

LQ = torch.zeros(3, 8, 8)


class TwoPhotos:
    """Half of its tasks are crops of `hard`, half of `solved`."""

    def draw(self, step: int, n: int) -> list[Task]:
        return [Task(f"{('hard', 'solved')[i % 2]}@{step}x{i}", LQ, ()) for i in range(n)]


ENV: Any = TwoPhotos()


def scores(mix: list[list[float]]) -> Any:
    table = torch.tensor(mix).flatten()
    return SimpleNamespace(mix_N=table, valid_N=table.isfinite())


def taught(**options: Any) -> Curriculum:
    curriculum = Curriculum(CurriculumConfig(candidates=2, **options), seed=3)
    curriculum.learn(ENV.draw(0, 2), scores([[0.0, 1.0], [0.5, 0.5]]))  # spreads 0.5 and 0
    return curriculum


def test_hard_photos_come_more_often() -> None:
    # weights 0.5 / 0.25 = 2 and the floor, 0.2; 1 of 2 candidates is kept: hard with 2 / 2.2
    curriculum = taught(floor=0.2)
    kept = [curriculum.draw(ENV, step, 1)[0].photo for step in range(1000)]
    assert kept.count("hard") == pytest.approx(1000 * 2 / 2.2, abs=5 * math.sqrt(1000 * 2 / 2.2 * 0.2 / 2.2))
    assert kept == [curriculum.draw(ENV, step, 1)[0].photo for step in range(1000)]  # a function of the step


def test_the_past_fades() -> None:
    curriculum = taught(memory=0.5)
    curriculum.learn(ENV.draw(1, 2), scores([[0.0, 0.0], [0.0, 2.0]]))
    assert curriculum.spread == {"hard": 0.25, "solved": 0.5}
    curriculum.learn(ENV.draw(2, 2), scores([[math.nan, 0.0], [math.nan, math.nan]]))  # nothing to learn from one score
    assert curriculum.spread == {"hard": 0.25, "solved": 0.5}


def test_one_candidate_is_the_env_itself() -> None:
    curriculum = Curriculum(CurriculumConfig(), seed=0)
    curriculum.learn(ENV.draw(0, 2), scores([[0.0, 1.0], [0.5, 0.5]]))
    assert [task.id for task in curriculum.draw(ENV, 1, 4)] == [task.id for task in ENV.draw(1, 4)]
    assert curriculum.state_dict() == {"spread": {}} and curriculum.metrics(ENV.draw(1, 4)) == {}


def test_it_continues_from_its_saved_state() -> None:
    straight, resumed = taught(), Curriculum(CurriculumConfig(candidates=2), seed=3)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for step in range(20):
        assert [task.id for task in straight.draw(ENV, step, 3)] == [task.id for task in resumed.draw(ENV, step, 3)]
