"""What TensorBoard shows beside scalars, and the optional sinks against stand-ins of their packages."""

import re
import sys
import types

import pytest
import torch

from envs.types import Task
from rewards.base import Scores
from rewards.rubric import Rubric, TermConfig
from rlrestore.config.files import ConfigError
from rlrestore.crew import Scored
from rlrestore.iteration.credit import Credit
from rlrestore.reporting.board import correlation_RR, group_strips, hyperparameters, layout, matrix_picture
from rlrestore.reporting.log import RunLog
from rlrestore.reporting.sinks import check_sinks, open_sinks
from rlrestore.types import Chunk, Images, Row

NAN = float("nan")


def test_correlation_is_of_deviations_from_the_group():
    # Two groups of two. Between groups b falls as a rises (0 -> 10, 10 -> 0); inside them both rise by 1.
    a = torch.tensor([[0.0, 1.0], [10.0, 11.0]])
    b = torch.tensor([[10.0, 11.0], [0.0, 1.0]])
    r = correlation_RR(torch.stack([a, b, -a]))
    assert r[0, 1] == pytest.approx(1.0)
    assert r[0, 2] == pytest.approx(-1.0)
    assert torch.equal(r, r.T)


def test_correlation_of_what_is_missing_or_constant_is_unknown():
    a = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    missing = torch.tensor([[NAN, NAN, 5.0, 6.0]])  # 2 rows in common, 3 are needed
    constant = torch.ones(1, 4)
    gap = torch.tensor([[0.0, 2.0, NAN, 4.0]])  # over rows 0, 1, 3: a = 0 1 3, centred -4/3 -1/3 5/3; b = 0 2 4, -2 0 2
    r = correlation_RR(torch.stack([a, missing, constant, gap]))
    assert r[0, 1].isnan() and r[0, 2].isnan()
    # sum xy = 8/3 + 10/3 = 6; sum x^2 = 42/9; sum y^2 = 8; r = 6 / sqrt(112 / 3)
    assert r[0, 3] == pytest.approx(6 / (112 / 3) ** 0.5)


def test_a_matrix_is_blue_where_rewards_agree_and_red_where_they_conflict():
    picture = matrix_picture(torch.tensor([[1.0, -1.0], [-1.0, NAN]]), ["nss", "low_frequency"])
    red, blue, grey = ([176, 42, 48], [33, 84, 160], [210, 210, 210])
    pixels = (picture * 255).round().long().flatten(1).T
    for colour in (red, blue, grey):
        assert (pixels == torch.tensor(colour)).all(1).any()


def test_strips_show_the_best_first_and_name_what_is_masked():
    tasks = [Task("photos/coffee@0+0", torch.zeros(3, 40, 40), ())]
    shades = torch.tensor([50, 100, 200], dtype=torch.uint8)
    pixels = shades.view(3, 1, 1, 1).expand(3, 3, 40, 40).clone()
    chunk = Chunk(0, tuple(Row(0, member, member) for member in range(3)), {0: tasks[0]})
    rollouts = [
        Scored(
            chunk,
            Images(chunk=0, pixels=pixels, z0_mean=0.0, z0_rms=1.0, colour_drift=0.0, forwards=3, seconds=0.1),
            {},
        )
    ]
    # so the order is: shade 200, shade 50, and the masked shade 100
    values = Scores(torch.tensor([10.0, NAN, 20.0]), torch.tensor([True, False, True]), ("", "failed", ""))
    scores = Rubric([TermConfig("psnr_rgb")]).combine({"psnr_rgb": values})
    credit = Credit(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), {})
    strip = (group_strips(tasks, rollouts, scores, credit) * 255).round()
    row = strip[0, -60]  # through the middle of the pictures: 40 px, three times as large, and gaps of 4
    seen = [int(row[124 * column + 60]) for column in range(4)]
    assert seen == [0, 200, 50, 100]


def test_every_regular_expression_of_the_layout_compiles_and_margins_are_whole():
    charts = layout(["nss"])
    assert {"rewards", "fidelity", "optimisation", "throughput", "faults"} <= set(charts)
    for group in charts.values():
        for kind, tags in group.values():
            assert kind in ("Multiline", "Margin")
            assert len(tags) == 3 or kind == "Multiline"
            for tag in tags:
                re.compile(tag)


def test_hyperparameters_are_flat_and_plain():
    params = hyperparameters({
        "run": {"seed": 3, "name": "x"}, "engine": {"lr": 1e-4, "betas": [0.9, 0.99], "warmup": 0},
        "rewards": {"nss": {"weight": 2.0, "scale": None}}, "env": {"kind": "photos", "size": 64}, "placement": {"ranks": 2},
    })  # fmt: skip
    assert params == {
        "run.seed": 3, "engine.lr": 1e-4, "engine.betas": "[0.9, 0.99]", "engine.warmup": 0, "rewards.nss.weight": 2.0,
        "env.kind": "photos",
    }  # fmt: skip


# ---- sinks


class FakeModule(types.ModuleType):
    """Remembers every call as (name, arguments)."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.__spec__ = types.SimpleNamespace(name=name)

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return self

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def Image(self, path):
        return f"picture of {path}"

    def Html(self, text):
        return text

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_sink_gets_scalars_and_pictures_with_their_steps(name, tmp_path, monkeypatch):
    fake = FakeModule(name)
    monkeypatch.setitem(sys.modules, name, fake)
    check_sinks([name])
    with RunLog(tmp_path, sinks=open_sinks([name], "photos", "ab12", tmp_path, {"engine.lr": 1e-4})) as log:
        log.scalars(1, {"train/loss": torch.tensor(0.5)})
        path = log.image(2, "eval/grid", torch.zeros(3, 4, 4))
        log.text(3, "alarm", "mix rises, <gold> falls")
    started, *logged, finished = fake.calls
    assert started[1]["project"] == "photos" and started[1]["config"] == {"engine.lr": 1e-4}
    assert started[1]["resume"] == "allow" and "ab12" in (started[1].get("id") or started[1]["name"])
    assert ("log", {"train/loss": 0.5}, 1) in logged
    assert ("log", {"eval/grid": f"picture of {path}"}, 2) in logged
    assert finished == ("finish",)
    if name == "wandb":
        assert ("log", {"alarm": "<pre>mix rises, &lt;gold&gt; falls</pre>"}, 3) in logged


def test_sinks_that_cannot_be_used_are_refused_with_a_remedy(monkeypatch):
    with pytest.raises(ConfigError, match=r"log.sinks names 'wandbb': choose of trackio, wandb"):
        check_sinks(["wandbb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_sinks(["wandb"])
