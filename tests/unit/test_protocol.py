"""`rlrestore evaluate` on test sets: what is measured, on which photos, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from envs.index import open_index
from rewards.registry import build_reward
from rlrestore.commands.evaluate import run_evaluate
from rlrestore.commands.train import run_train
from rlrestore.config.files import ConfigError
from rlrestore.errors import InputError
from rlrestore.evaluation.protocol import (
    ProtocolSection,
    colour_of,
    difference,
    measure_set,
    read_task,
    rows_of,
    summary_of,
)
from tests.tiny import write_tiny
from tests.unit.test_manifest import picture, save


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two haze and three rain pairs of 40x48 px in a test split, and one of a training split."""
    for n, name in enumerate(["haze/0", "haze/1", "rain/2", "rain/3", "rain/4"]):
        category, stem = name.split("/")
        save(tmp_path / "set" / "test" / category / "gt" / f"{stem}.png", picture(n, 40, 48))
        save(tmp_path / "set" / "test" / category / "lq" / f"{stem}.png", picture(n, 40, 48) // 2 + 20)
    save(tmp_path / "set" / "train" / "haze" / "gt" / "9.png", picture(9, 40, 48))
    save(tmp_path / "set" / "train" / "haze" / "lq" / "9.png", picture(9, 40, 48) // 2 + 20)
    return tmp_path / "set"


def test_known_restorers_get_known_numbers(pairs: Path, tmp_path: Path) -> None:
    index = open_index(pairs, cache=tmp_path / "c")
    assert [row.id for row in rows_of(index, 0)] == [
        f"test/{n}" for n in ("haze/0", "haze/1", "rain/2", "rain/3", "rain/4")
    ]
    assert [row.id for row in rows_of(index, 3)] == ["test/haze/0", "test/haze/1", "test/rain/2"]  # types take turns
    section = ProtocolSection("p", samples=2)
    metrics = {name: build_reward(name) for name in ("psnr_rgb", "low_frequency")}
    restorers = {
        "half": lambda lq, seed: lq,
        "right": lambda lq, seed: np.clip((lq.astype(int) - 20) * 2 + 10 * seed, 0, 255).astype(np.uint8),
    }
    result = measure_set(index, section, restorers, metrics)
    assert result.array("psnr_rgb", "half").shape == (5, 2)
    np.testing.assert_array_equal(result.array("psnr_rgb", "half")[:, 0], result.array("psnr_rgb", "lq")[:, 0])
    # seed 0 inverts gt // 2 + 20 but for the lost bit: errors of 0 or 1 in 255, so above 20 log10(255) = 48.1 dB
    assert (result.array("psnr_rgb", "right")[:, 0] > 48.1).all()
    # seed 1 is 10 too bright: 20 log10(255 / 10) = 28.1 dB, a little more where it is clipped, less by the lost bit
    assert (abs(result.array("psnr_rgb", "right")[:, 1] - 28.1) < 1.0).all()
    summary = summary_of(result, section, metrics)["metrics"]["psnr_rgb"]
    assert (
        summary["columns"]["right"]["best"]
        > 48.1
        > summary["columns"]["right"]["mean"]
        > summary["columns"]["right"]["worst"]
    )
    gain = difference(result, "psnr_rgb", "right", "half")
    assert gain is not None and gain.low > 0 and gain.units == 5
    assert list(summary["differences"]) == ["half - lq", "right - lq", "right - half"]
    assert set(summary["differences"]["right - half"]) == {"all", "haze", "rain"}
    assert result.shown[0][0].shape == (3, 40, 40)
    assert len(result.shown[0]) == 4


def test_crop_scale_and_sizes(tmp_path: Path) -> None:
    gt = picture(0, 64, 96)
    save(tmp_path / "a" / "gt" / "0.png", gt)
    save(tmp_path / "a" / "lq" / "0.png", np.array(Image.fromarray(gt).resize((24, 16), Image.Resampling.BOX)))
    save(tmp_path / "a" / "gt" / "1.png", gt)
    save(tmp_path / "a" / "lq" / "1.png", gt[:60])  # a model's padding was cut
    save(tmp_path / "a" / "gt" / "2.png", gt)
    save(tmp_path / "a" / "lq" / "2.png", gt[:30])
    index = open_index(tmp_path / "a", cache=tmp_path / "c")
    rows = rows_of(index, 0)
    enlarged = read_task(index, rows[0], 0)
    assert enlarged.lq.shape == enlarged.gt.shape == (3, 64, 96)
    cropped = read_task(index, rows[1], 32)
    np.testing.assert_array_equal((cropped.gt * 255).round().numpy(), gt[14:46, 32:64].transpose(2, 0, 1))  # of 60 rows
    with pytest.raises(ValueError, match="96x30 and 96x64"):
        read_task(index, rows[2], 0)
    result = measure_set(index, ProtocolSection("p"), {"same": lambda lq, seed: lq}, {"psnr_y": build_reward("psnr_y")})
    assert len(result.ids) == 2 and "2: LQ and GT are" in result.failures[0]


def test_colours() -> None:
    assert colour_of("psnr_y") == colour_of("pyiqa_ssim_ycbcr") == "Y of YCbCr (BT.601)"
    assert [colour_of(name) for name in ("psnr_rgb", "pyiqa_gmsd_yiq", "musiq")] == [
        "mean of R, G, B",
        "Y of YIQ",
        "RGB",
    ]


def config_of(folder: Path, pairs: Path, more: str) -> Path:
    lone = folder / "alone"
    for n in range(3):
        save(lone / f"{n}.png", picture(20 + n, 32, 40))
    (folder / "sets.yaml").write_text(
        f"protocol: {{name: p, steps: 2, skip_missing: true, dir: {folder}/out}}\n"
        f"sets:\n  paired: {{source: {pairs}, licence: CC0-1.0}}\n  alone: {lone}\n{more}\n"
        "metrics: {psnr_y: {}, consistency: {}, musiq: {kind: pyiqa, params: {metric: musiq}}}\n"
    )
    return folder / "sets.yaml"


def test_a_run_beside_its_start(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_train(write_tiny(tmp_path), [])
    config = config_of(tmp_path, pairs, "")
    run_evaluate(config, [f"protocol.run={tmp_path}/runs/tiny"], None)
    out = tmp_path / "out" / "p"
    told = json.loads((out / "result.json").read_text())
    assert "musiq" in told["left_out"]
    paired, alone = told["sets"]["paired"], told["sets"]["alone"]
    assert list(paired["metrics"]) == ["consistency", "psnr_y"]
    assert list(alone["metrics"]) == ["consistency"], "there is no reference"
    assert list(paired["metrics"]["psnr_y"]["columns"]) == ["lq", "base", "tuned"]
    assert (
        paired["metrics"]["psnr_y"]["columns"]["base"]["mean"]
        != paired["metrics"]["psnr_y"]["columns"]["tuned"]["mean"]
    )
    report = (out / "report.md").read_text()
    assert "| psnr_y (up) | Y of YCbCr (BT.601) |" in report
    assert "5 photos, with references; whole photos (48x40), no border shaved" in report
    assert "paired: CC0-1.0" in report and "musiq" in report
    assert {path.name for path in out.iterdir()} == {
        "result.json",
        "report.md",
        "config.yaml",
        "paired.png",
        "alone.png",
    }
    with pytest.raises(InputError, match=r"protocol\.overwrite=true"):
        run_evaluate(config, [f"protocol.run={tmp_path}/runs/tiny"], None)
    run_evaluate(
        config, [f"restorers.a={tmp_path}/weights", f"restorers.b={tmp_path}/weights", "protocol.overwrite=true"], None
    )
    same = json.loads((out / "result.json").read_text())["sets"]["alone"]["metrics"]["consistency"]["differences"][
        "b - a"
    ]["all"]
    assert same["mean"] == 0.0, "equal weights, equal noise"


def test_what_is_refused(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = config_of(tmp_path, pairs, "")
    for overrides, words in (
        ([], "protocol.run=RUN"), (["restorers.lq=packaged"], "no NAME is 'lq'"), (["sets.alone.sorce=x"], "sorce"),
        (["protocol.stepz=3"], "stepz"), (["restorers.a=packaged", "protocol.tile=33"], "tile"),
        (["restorers.a=packaged", "protocol.skip_missing=false"], "musiq"),
        (["restorers.a=packaged", "metrics.psnr_z={}"], "psnr_z"),
    ):  # fmt: skip
        with pytest.raises((ConfigError, InputError), match=words):
            run_evaluate(config, overrides, None)
    with pytest.raises(InputError, match="does not exist"):
        run_evaluate(config, ["protocol.run=nowhere"], None)
    assert not (tmp_path / "out").exists()
