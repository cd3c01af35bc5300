"""Run logs: what a resume drops and keeps, in metrics.jsonl and in TensorBoard, and what may not be logged."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlrestore.reporting.log import RunLog, comparable, read_metrics
from rlrestore.reporting.pictures import from_pil, grid, to_pil


def run(run_dir, steps, purge_step=None, value=float):
    with RunLog(run_dir, purge_step) as log:
        for step in steps:
            log.scalars(step, {"reward/total/mean": value(step), "time/rollout_s": 0.1})


def test_one_line_a_step(tmp_path):
    run(tmp_path, range(3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert comparable(lines[2]) == {"step": 2, "reward/total/mean": 2.0}
    assert lines[2].keys() == {"step", "time", "reward/total/mean", "time/rollout_s"}


def test_resume_drops_the_steps_that_are_run_again(tmp_path):
    run(tmp_path, range(10))
    run(tmp_path, range(5, 8), purge_step=5, value=lambda step: 100.0 + step)
    expected = [0, 1, 2, 3, 4, 105, 106, 107]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8
    assert [r["reward/total/mean"] for r in read_metrics(tmp_path / "metrics.jsonl")] == expected
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward/total/mean")] == list(enumerate(expected))


def test_opening_without_purge_continues(tmp_path):
    run(tmp_path, range(2))
    run(tmp_path, range(2, 4))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize("purge_step", [None, 100])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, purge_step):
    run(tmp_path, range(2))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "rew')
    run(tmp_path, [2], purge_step)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_calls_at_one_step_are_merged_by_the_reader(tmp_path):
    with RunLog(tmp_path) as log:
        log.scalars(3, {"a": 1, "b": 1})
        log.scalars(3, {"b": torch.tensor(2.0), "c": 3})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert comparable(record) == {"step": 3, "a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path, value):
    with RunLog(tmp_path) as log:
        with pytest.raises(AssertionError, match=r"policy/kl is .* at step 4"):
            log.scalars(4, {"train/loss": 1.0, "policy/kl": value})
        assert log.metrics_path.read_text() == ""  # nothing of that step is written


def test_lines_are_on_disk_before_close(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(0, {"a": 1.0})
    assert len(read_metrics(log.metrics_path)) == 1
    log.close()
    log.close()


def test_images_text_hparams_and_layout(tmp_path):
    picture = torch.zeros(3, 4, 6)
    picture[0] = 128 / 255
    with RunLog(tmp_path) as log:
        path = log.image(120, "panel/coffee", picture)
        log.text(0, "config", "a: 1")
        log.hparams({"lr": 1e-4, "kind": "grpo"}, ["reward/mix/mean"])
        log.histogram(120, "histogram/advantage", np.array([-1.0, 0.0, 1.0]))
        log.histogram(120, "histogram/none", np.array([]))
        log.custom_layout({"rewards": {"mean": ["Multiline", ["reward/.*/mean"]]}})
    assert path == tmp_path / "samples" / "step_000120" / "panel_coffee.png"
    assert torch.equal(from_pil(Image.open(path)), picture)
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert board.Images("panel/coffee")[0].step == 120
    assert {"config/text_summary", "custom_scalars__config__"} <= set(board.Tags()["tensors"])
    assert board.Tags()["histograms"] == ["histogram/advantage"]
    assert board.Histograms("histogram/advantage")[0].histogram_value.num == 3
    assert set(board.PluginTagToContent("hparams")) == {"_hparams_/experiment", "_hparams_/session_start_info"}
    # a second event file would end TensorBoard's reading of the first
    assert len(list((tmp_path / "tb").iterdir())) == 1


# ---- pictures


def test_to_pil_rounds_and_clamps():
    assert to_pil(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(AssertionError, match="3, H, W"):
        to_pil(torch.zeros(1, 4, 4))


def test_grid_without_titles_places_pictures_with_a_gap():
    red, blue = torch.zeros(3, 5, 7), torch.zeros(3, 3, 4)
    red[0], blue[2] = 1, 1
    canvas = grid([[red, blue], [blue]])
    # columns 7 and 4 wide, rows 5 and 3 high, gaps of 4
    assert canvas.shape == (3, 5 + 4 + 3, 7 + 4 + 4)
    assert torch.equal(canvas[:, :5, :7], red)
    assert torch.equal(canvas[:, :3, 11:], blue)
    assert torch.equal(canvas[:, 9:, :4], blue)
    assert (canvas[:, 5:9] == 1).all()


def test_grid_draws_titles_outside_of_the_pictures():
    picture = torch.full((3, 64, 64), 0.2)
    canvas = grid([[picture, picture]], ["LQ", "a title far too long for 64 pixels"], ["coffee\nblur"])
    _, height, width = canvas.shape
    pixels = picture[:, :1, :1].mul(255).round() / 255
    assert torch.allclose(canvas[:, height - 64 :, width - 64 :], pixels.expand(3, 64, 64))
    assert canvas[:, : height - 64, width - 132 :].min() < 0.5  # ink above
    assert canvas[:, :, : width - 132].min() < 0.5  # and at the left
    with pytest.raises(ValueError, match="titles"):
        grid([[picture]], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        grid([])
