"""The report of a run: charts and maps on numbers that can be derived, the page in a real browser."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from rlrestore.commands.report import run_report
from rlrestore.errors import InputError
from rlrestore.reporting.charts import Dot, Series, bars, line_chart, parallel, scatter, ticks
from rlrestore.reporting.maps import FULL, error_map, invention_map, moved_map, unexplained
from rlrestore.reporting.panel import deltas, read_panel
from rlrestore.reporting.report import metric_rows, run_context, write_report
from tests.fake_run import write_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no headless browser here: apt-get install chromium")


# ---- charts


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.003, 0.011) == pytest.approx([0, 0.005, 0.01])  # a step of 0.0028 rounds up to 0.005


def test_a_line_goes_from_corner_to_corner_of_its_numbers():
    svg = line_chart([Series("mix", [0, 10], [0.0, 1.0])])
    (points,) = re.findall(r'class="line c0" points="([^"]+)"', svg)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert (x0, x1) == (52.0, 350.0)  # the margins of a chart of 360
    assert y0 > y1  # up is more
    assert line_chart([]) == ""
    assert "<polyline" in line_chart([Series("flat", [1, 2], [3.0, 3.0])])  # no division by a range of 0


def test_charts_escape_what_they_are_given():
    evil = "<script>alert(1)</script>"
    dot = Dot(evil, 0.0, 1.0, (0.0, 0.1), (0.9, 1.1))
    charts = (
        line_chart([Series(evil, [1], [1.0]), Series("b", [1], [1.0])]), scatter([dot], evil, evil),
        parallel([evil], [[1.0], [2.0]], [evil, "b"], [0.0, 1.0]), bars([(evil, 0.5, 0.1, 0.9)]),
    )  # fmt: skip
    for chart in charts:
        assert "<script" not in chart and "&lt;script" in chart


def test_bars_stand_on_the_side_of_their_sign():
    svg = bars([("up", 1.0, 0.5, 1.0), ("down", -1.0, float("nan"), float("nan"))])
    middle = float(re.search(r'class="zero" x1="([\d.]+)"', svg)[1])
    (up, _), (down, width) = ((float(x), float(w)) for x, w in re.findall(r'x="([\d.]+)" width="([\d.]+)"', svg))
    assert up == pytest.approx(middle, abs=0.1) and down + width == pytest.approx(middle, abs=0.1)
    assert svg.count("whisker") == 1  # no interval, no whisker


# ---- maps


def test_maps_have_the_colour_of_what_happened():
    base = torch.full((3, 16, 16), 0.5)
    gt, farther = base + 0.0, base.clone()
    farther[:, :, 8:] += FULL  # the right half moved away from the reference by the full scale
    moved = moved_map(base, farther)
    assert torch.allclose(moved[:, :, :8], torch.ones(1)) and torch.allclose(moved[:, :, 8:], torch.zeros(1), atol=1e-6)
    red = error_map(base, farther, gt)[:, 8, 12]
    blue = error_map(farther, base, gt)[:, 8, 12]
    assert red[0] > red[2] + 0.4 and blue[2] > blue[0] + 0.4
    assert torch.allclose(error_map(base, farther, gt)[:, 8, 2], torch.ones(3))


def test_what_follows_the_lq_is_explained_and_new_texture_is_not():
    generator = torch.Generator().manual_seed(0)
    lq = torch.rand(3, 32, 32, generator=generator)[:1].expand(3, -1, -1)
    assert float(unexplained(0.3 + 0.5 * lq, lq).max()) < 0.01  # any multiple of its detail
    texture = torch.rand(1, 32, 32, generator=generator).expand(3, -1, -1)
    # independent texture of std sqrt(1/12) = 0.289 is nearly all unexplained
    assert float(unexplained(texture, lq).mean()) == pytest.approx(0.289, abs=0.04)
    red = invention_map(0.3 + 0.5 * lq, texture, lq)[:, 16, 16]
    assert red[0] > red[2] + 0.4


# ---- the page


def test_verdicts_follow_intervals_and_directions():
    row = {"role": "gold", "base": 1.0, "tuned": 1.0, "delta": -1.0, "n": 4}
    words = {r["name"]: r["word"] for r in metric_rows({
        "up": {**row, "higher_is_better": True, "ci95": [-2.0, -0.5]}, "down": {**row, "higher_is_better": False, "ci95": [-2.0, -0.5]},
        "noise": {**row, "higher_is_better": True, "ci95": [-2.0, 0.5]}, "none": {**row, "higher_is_better": True, "ci95": [None] * 2},
    })}  # fmt: skip
    assert words == {"up": "worse", "down": "better", "noise": "within noise", "none": "unknown"}


def test_a_seed_that_failed_is_left_out_of_a_delta(tmp_path):
    panel = read_panel(write_run(tmp_path / "run"))
    values, ids = deltas(panel, "psnr_rgb")
    assert ids == ["photos/cat0@0+0", "photos/cat1@0+0"]
    assert values == pytest.approx([1.0, -2.0])  # the second seed has no base score


def test_the_page_holds_all_it_shows_and_escapes_what_the_run_says(tmp_path):
    run = write_run(tmp_path / "run", name="</pre><script>alert(1)</script>")
    page = write_report(run).read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page.replace('href="#', ""))
    assert "http" not in re.sub(r"http-equiv", "", page)
    context = run_context(run)
    assert [task["name"] for task in context["worst"]] == ["cat1"]  # cat0 got better
    assert [task["name"] for task in context["sliders"]] == ["cat0", "cat1"]
    assert "mix is better (+0.3)" in context["verdict"] and "1 within noise" in context["verdict"]
    assert context["cost"]["hours"] == pytest.approx(75 / 3600)


def test_a_run_that_has_not_ended_has_a_report_too(tmp_path):
    run = tmp_path / "young"
    run.mkdir()
    (run / "run.json").write_text('{"kind": "train", "exit": "running"}')
    assert "no result yet" in write_report(run).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither a run .* nor a sweep"):
        run_report(tmp_path, [])
    with pytest.raises(InputError, match="only the report of a sweep has options"):
        run_report(write_run(tmp_path / "run"), ["fidelity=gmsd"])


@needs_chromium
def test_in_a_browser_sliders_move_and_nothing_is_fetched_or_wider_than_a_phone(tmp_path):
    page = write_report(write_run(tmp_path / "run"))
    probe = """<script>
      addEventListener("securitypolicyviolation", e => document.title = "blocked " + e.blockedURI);
      addEventListener("load", () => {
        var range = document.querySelector("input[type=range]"); range.value = 20; range.dispatchEvent(new Event("input"));
        var side = document.querySelector("select"); side.value = "gt"; side.dispatchEvent(new Event("change"));
        var over = document.querySelector(".over"), under = document.querySelector(".under");
        document.body.setAttribute("data-probe", JSON.stringify({x: getComputedStyle(over).clipPath, under: under.alt,
          width: under.naturalWidth, changed: under.src != over.src, overflow: document.documentElement.scrollWidth - innerWidth,
          paper: getComputedStyle(document.body).backgroundColor}));
      });</script></body>"""
    test_page = tmp_path / "probe.html"
    test_page.write_text(page.read_text().replace("</body>", probe))
    seen = {mode: _dom(test_page, *flags) for mode, flags in {"light": (), "dark": ("--force-dark-mode",)}.items()}
    probe_text = re.search(r'data-probe="([^"]+)"', seen["light"])[1].replace("&quot;", '"')
    assert '"x":"inset(0px 0px 0px 20%)"' in probe_text
    assert '"under":"gt","width":24,"changed":true' in probe_text
    overflow = int(re.search(r'"overflow":(-?\d+)', probe_text)[1])
    assert overflow <= 0, "the page scrolls sideways at phone width"
    assert "<title>blocked" not in seen["light"]
    papers = {mode: re.search(r"paper&quot;:&quot;(.*?)&quot;", dom)[1] for mode, dom in seen.items()}
    assert papers["light"] == "rgb(255, 255, 255)" and papers["dark"] == "rgb(20, 22, 26)"


def _dom(page, *flags) -> str:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,800", *flags,
               "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def test_pictures_survive_embedding():
    import base64
    import io

    from PIL import Image

    from rlrestore.reporting.report import data_uri

    small = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    uri = data_uri(small)
    assert uri.startswith("data:image/png;base64,")
    opened = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert np.array_equal(np.array(opened), small)
    assert data_uri(np.zeros((400, 400, 3), np.uint8)).startswith("data:image/jpeg")
