"""A tiny run and everything that shows it: TensorBoard's tabs, the report, and the page that restores live."""

import json
import threading
import urllib.error
import urllib.request

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlrestore.commands.view import open_view
from rlrestore.errors import InputError
from rlrestore.reporting.report import run_context, write_report
from tests.tiny import tiny_config, train_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    return train_tiny(tiny_config(folder, "grpo", ["evaluate.every=1"]))[0]


def test_tensorboard_has_every_tab(run):
    board = EventAccumulator(str(run / "tb"), size_guidance={"images": 0, "histograms": 0}).Reload()
    tags = board.Tags()
    assert {"group/strips", "reward/correlation", "eval/correlation", "eval/lq_base_tuned_gt"} <= set(tags["images"])
    assert "histogram/advantage" in tags["histograms"]
    ratios = [tag for tag in tags["histograms"] if tag.startswith("histogram/ratio/step_")]
    assert ratios, "the ratio of each trained step"
    # tiny: 4 groups of 4, one optimiser step, so every ratio is exactly 1
    histogram = board.Histograms(ratios[0])[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (16, 1.0, 1.0)
    assert set(board.PluginTagToContent("hparams")) == {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert "custom_scalars__config__" in tags["tensors"]
    assert [event.step for event in board.Images("group/strips")] == [1, 2]


def test_a_run_leaves_what_its_report_needs(run):
    context = run_context(run)
    assert context["rows"][0]["name"] == "mix" and len(context["sliders"]) == 2
    assert {name for name, _, _ in context["sliders"][0]["pictures"]} == {"lq", "base", "tuned", "gt"}
    assert {group["title"] for group in context["charts"]} >= {"Rewards of the rollouts", "Held-out, tuned minus base"}
    assert "grpo" in write_report(run).read_text()


@pytest.fixture
def server(run):
    server = open_view(run.parent, None, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def get(server, path, token=None, host=None):
    """(status, content type, body)."""
    joint = "&" if "?" in path else "?"
    port = server.server_address[1]
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}{joint}token={token or server.token}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


def test_view_restores_with_any_checkpoint_at_equal_noise(server):
    listing = json.loads(get(server, "/listing")[2])
    assert listing["weights"] == ["tiny base", "tiny step 2"] and len(listing["photos"]) == 2
    photo = urllib.request.quote(listing["photos"][0])
    url = f"/restored?photo={photo}&steps=2&seed=1&weights="
    pictures = {name: get(server, url + urllib.request.quote(name)) for name in listing["weights"]}
    assert all(answer[:2] == (200, "image/png") for answer in pictures.values())
    assert pictures["tiny base"][2] != pictures["tiny step 2"][2]
    assert get(server, url + "tiny%20base")[2] == pictures["tiny base"][2]
    assert get(server, url.replace("seed=1", "seed=2") + "tiny%20base")[2] != pictures["tiny base"][2]
    assert get(server, f"/photo?photo={photo}")[:2] == (200, "image/png")
    page = get(server, "/")
    assert page[0] == 200 and b"http-equiv" not in page[2]


def test_view_answers_nobody_else(server):
    assert get(server, "/listing", token="wrong")[0] == 403
    assert get(server, "/listing", host="evil.example")[0] == 403
    assert server.server_address[0] == "127.0.0.1"


def test_view_takes_names_only_from_its_list(server):
    status, _, body = get(server, "/restored?photo=../../etc/passwd&weights=tiny%20base")
    assert status == 404 and b"no such name" in body
    assert get(server, "/photo?photo=/etc/passwd")[0] == 404
    assert get(server, "/panel/panel.json")[0] == 404
    photo = urllib.request.quote(json.loads(get(server, "/listing")[2])["photos"][0])
    status, _, body = get(server, f"/restored?photo={photo}&weights=tiny%20base&steps=9999")
    assert status == 400 and b"steps 1 to 64" in body


def test_view_refuses_what_is_no_run(tmp_path, run):
    with pytest.raises(InputError, match="has no complete checkpoint"):
        open_view(tmp_path, None, 0)
    with pytest.raises(InputError, match="is not a folder"):
        open_view(tmp_path / "none", None, 0)
    with pytest.raises(InputError, match="--photos"):
        open_view(run, tmp_path / "none", 0)
