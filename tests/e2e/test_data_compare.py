"""`rlrestore data compare` over HTTP: a known order of providers is found, a judge that only looks at places finds none."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from envs.images import decode_rgb
from envs.pipeline.align import Aligned
from envs.pipeline.compare import Entry
from envs.pipeline.duels import DuelServer, duels_of, people_wins
from envs.pipeline.process import Photo, png_of
from envs.pipeline.ranking import bradley_terry, ranking
from envs.pipeline.store import BuildFolder
from rlrestore.commands.data_compare import Result, rankings_of, run_compare
from rlrestore.config.files import ConfigError
from tests.e2e.test_data_build import Browser, contents, wait_until
from tests.fake_api import SECRET, Fault, serving
from tests.unit.test_manifest import picture


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.7563), (0.1, 1.8103), (1.0, 0.4682)])
def test_bradley_terry_of_a_perfect_order(alpha: float, beta: float) -> None:
    # A > B > C once each. B wins and loses as often, so beta_B = 0 and beta_A = -beta_C; the values solve the likelihood
    # equation of A: 2 + 2 alpha = (1 + 2 alpha) (s(b) + s(2 b)), s the sigmoid.
    wins = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=float)
    np.testing.assert_allclose(bradley_terry(wins, alpha), [beta, 0, -beta], atol=1e-4)
    sigmoid = 1 / (1 + np.exp(-np.array([beta, 2 * beta])))
    assert (1 + 2 * alpha) * sigmoid.sum() == pytest.approx(2 + 2 * alpha, abs=1e-3)


def test_intervals_hold_the_strength_and_shrink_with_photos() -> None:
    rng = np.random.default_rng(0)
    photos = [np.array([[0, w], [1 - w, 0]], dtype=float) for w in rng.random(200) < 0.7]
    beta, low, high = ranking(photos)
    few = ranking(photos[:20])
    assert low[0] < beta[0] < high[0]
    assert high[0] - low[0] < few[2][0] - few[1][0]
    assert beta[0] - beta[1] == pytest.approx(np.log(0.7 / 0.3), abs=0.4)
    assert np.isnan(ranking(photos[:1])[1]).all()


def config_for(url: str, source: Path, out: Path) -> Path:
    path = out / "c.yaml"
    api = f"url: {url}, api_key_env: FAKE_KEY, requests_per_minute: 60000, retries: 1, price_request: 0.01"
    providers = "".join(f"  {name}: {{kind: openai, model: {name}, {api}}}\n" for name in ("blurry", "good", "refuses"))
    path.write_text(
        f"compare: {{name: c, source: {source}, dir: {out}, photos: 5}}\nproviders:\n{providers}"
        f"judge: {{model: j, {api}}}\nrewards: {{low_frequency: {{}}, psnr_rgb: {{}}}}\n"
    )
    return path


@pytest.mark.parametrize("fair", [True, False])
def test_a_known_order_is_found(
    fair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_KEY", SECRET)
    source = tmp_path / "lq"
    source.mkdir()
    for n in range(6):
        rough = picture(n, 128, 128) + np.random.default_rng(n).normal(0, 10, (128, 128, 3))
        Image.fromarray(rough.clip(0, 255).astype(np.uint8)).save(source / f"{n}.png")

    def script(kind: str, pictures: list[np.ndarray], text: str, times: int) -> bytes | str | Fault:
        if kind == "chat":
            sharp = [float(np.abs(np.diff(view.astype(float), axis=0)).mean()) for view in pictures[1:]]
            scene = "street" if pictures[0].mean() > 128 else "moon"  # the latter is no scene that was asked for
            return json.dumps({"better": "2" if not fair or sharp[0] > sharp[1] else "3", "scene": scene})
        if "model=refuses" in text:
            return Fault(400, f'{{"error": {{"code": "moderation_blocked", "key": "{SECRET}"}}}}')
        return png_of(gaussian_filter(pictures[0], (9, 9, 0) if "model=blurry" in text else (1, 1, 0)))

    with serving(script) as api:
        api.tell_model = True
        summary = run_compare(config_for(api.url, source, tmp_path), [])
        assert api.requests["edit"] == 15
        assert api.requests["chat"] == 10  # five photos, one pair that both answered, two orders
        assert run_compare(config_for(api.url, source, tmp_path), [])["providers"] == summary["providers"]
        assert api.requests["chat"] == 10
    rows, ranked = summary["providers"], summary["rankings"]["all"]
    assert [rows[name]["answered"] for name in ("blurry", "good", "refuses")] == [5, 5, 0]
    assert rows["good"]["rewards"]["psnr_rgb"] is None  # needs a reference
    assert (
        rows["good"]["rewards"]["low_frequency"] < rows["blurry"]["rewards"]["low_frequency"]
    )  # a drift: smaller is better
    gap = ranked["good"]["beta"] - ranked["blurry"]["beta"]
    assert gap > 1.0 if fair else gap == pytest.approx(0.0, abs=1e-6)  # always "2": no verdict survives the swap
    assert "| good |" in (tmp_path / "c" / "report.md").read_text()
    streets = sum(picture(n, 128, 128).mean() > 128 for n in range(5))
    assert 0 < streets < 5
    assert {name for name in summary["rankings"] if name.startswith("scene")} == {"scene: street"}
    assert summary["rankings"]["scene: street"]["good"]["photos"] == streets
    assert summary["people"] == {"all": {}}
    for name, data in contents(tmp_path / "c").items():
        assert SECRET.encode() not in data, f"the key is in {name}"
    assert SECRET not in "".join(capsys.readouterr())


@pytest.fixture
def photos(tmp_path: Path) -> list[tuple[Photo, dict[str, Entry]]]:
    """Four photos with answers of `bright`, `dark` and `none`, which never answers."""
    found = []
    for n in range(4):
        view = picture(n, 64, 64)
        answers = {"bright": view // 2 + 128, "dark": view // 2, "none": None}
        entries = {
            name: Entry(None if gt is None else Aligned(view, gt, 0.0, (64, 64)), "", {})
            for name, gt in answers.items()
        }
        found.append((Photo(f"p{n}", png_of(view), "haze" if n % 2 else "rain", "", ""), entries))
    return found


def test_people_decide_without_knowing_whose_it_is(photos, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = BuildFolder(tmp_path / "b")
    duels = duels_of(photos, folder)
    assert len(duels) == 4 and {duel.swapped for duel in duels} == {True, False}
    server = DuelServer(duels, folder, "me")
    assert "bright" not in json.dumps(server.waiting())
    for item in server.waiting()[:3]:  # who sees the pictures prefers the brighter one
        light = [decode_rgb(folder.blobs.get(item[side]), side).mean() for side in ("a", "b")]
        server.decide({"id": item["id"], "verdict": "a" if light[0] > light[1] else "b"})
    server.decide({"id": server.waiting()[0]["id"], "verdict": "tie"})
    assert server.waiting() == []
    wins = people_wins(duels, folder, 3)
    assert [float(wins[f"p{n}"][0, 1]) for n in range(4)] == [1.0, 1.0, 1.0, 0.5]
    assert [float(wins[f"p{n}"][1, 0]) for n in range(4)] == [0.0, 0.0, 0.0, 0.5]
    server.decide({"id": duels[0].id, "verdict": "undo"})
    assert len(server.waiting()) == 1 and "p0" not in people_wins(duels, folder, 3)
    for wrong in ({"id": "x", "verdict": "a"}, {"id": duels[0].id, "verdict": "bright"}):
        with pytest.raises(ValueError, match="is no verdict"):
            server.decide(wrong)
    server.server_close()
    told = rankings_of(
        ["bright", "dark", "none"], [Result(photo, entries, wins[photo.id]) for photo, entries in photos]
    )
    assert next(iter(told["all"])) == "bright" and set(told) == {"all", "haze", "rain"}
    folder.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium: apt-get install chromium")
def test_the_duel_page_in_a_browser(photos, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = BuildFolder(tmp_path / "b")
    duels = duels_of(photos, folder)
    server = DuelServer(duels, folder, "me")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = Browser(tmp_path / "profile")

    def value(expression: str) -> object:
        (result,) = browser.drive([("Runtime.evaluate", {"expression": expression})])
        return result["result"].get("value")

    try:
        browser.drive([("Page.navigate", {"url": server.address})])
        wait_until(lambda: value("document.getElementById('b').naturalWidth") == 64)
        for key, verdicts in (
            ("1", ["a"]),
            ("2", ["a", "b"]),
            ("u", ["a", "b", "undo"]),
            ("t", ["a", "b", "undo", "tie"]),
        ):
            browser.drive(
                [("Input.dispatchKeyEvent", {"type": kind, "key": key, "text": key}) for kind in ("keyDown", "keyUp")]
            )
            wait_until(lambda verdicts=verdicts: [item["verdict"] for item in folder.decisions.records] == verdicts)
        wait_until(lambda: value("document.getElementById('left').textContent") == "2")  # once the answer has come back
    finally:
        browser.close()
        server.shutdown()
        server.server_close()
        folder.close()


def test_one_provider_is_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("compare: {name: c, source: x}\nproviders: {a: {kind: local}}\n")
    with pytest.raises(ConfigError, match="providers has 1"):
        run_compare(tmp_path / "c.yaml", [])
    with pytest.raises(ConfigError, match=r"providers\.b: generate\.modle: unknown key"):
        run_compare(tmp_path / "c.yaml", ["providers.b={kind: openai, modle: x}"])
