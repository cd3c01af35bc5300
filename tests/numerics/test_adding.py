"""The algorithm that docs/adding.md walks through, read from the page and run."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rlrestore.algorithms.forward import Noised
from rlrestore.algorithms.registry import ALGORITHMS
from rlrestore.build import build_crew, build_env
from rlrestore.crew import StageTimes
from tests.tiny import iterate, tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the page, registered as it says."""
    section = PAGE.read_text().split("## An algorithm")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    assert code.count("\n") < 60
    module = ModuleType("rwfm")
    monkeypatch.setitem(sys.modules, "rwfm", module)  # where dataclasses look for it
    exec(compile(code, str(PAGE), "exec"), vars(module))
    monkeypatch.setitem(ALGORITHMS, "rwfm", (module.RwfmConfig, module.Rwfm))
    return module


def test_the_example_trains(tmp_path: Path, example: Any) -> None:
    config = tiny_config(tmp_path, "rwfm", ["algorithm.temperature=0.5"])
    crew = build_crew(config, StageTimes())
    _, (report,) = iterate(crew, config, build_env(config.env), 0)
    assert report.grad_norms[0] > 0 and "rwfm_weight" in report.sums


def test_the_example_by_hand(example: Any) -> None:
    v = torch.full((1, 1, 1, 2), math.sqrt(0.05), requires_grad=True)
    noised = Noised(torch.zeros_like(v), torch.tensor([0.5]), torch.zeros_like(v), v, None, None)
    batch = SimpleNamespace(advantage_B=torch.tensor([math.log(2.0)]))
    loss_B, _ = example.Rwfm(example.RwfmConfig()).objective(noised, batch)
    assert float(loss_B.detach()) == pytest.approx(0.1)
    loss_B.sum().backward()
    assert v.grad is not None and float(v.grad.mean()) == pytest.approx(
        2 * math.sqrt(0.05)
    )  # 2 d mean(v^2) / dv_i = 2 v_i
