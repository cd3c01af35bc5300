"""`rlrestore data build` from end to end over real HTTP on loopback: faults, budget, kills, review and what is published."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from scipy.ndimage import gaussian_filter

from envs.degradations import DEGRADATIONS
from envs.degradations.jpeg import from_uint8_hwc, to_uint8_hwc
from envs.images import load_rgb
from envs.inspection import perceptual_hash
from envs.manifest import ManifestConfig, ManifestEnv
from envs.photos import wheel_photos
from envs.pipeline.config import ApiSection
from envs.pipeline.http import Refused, Rejected, Unanswered, WrongKeyError
from envs.pipeline.ledger import BudgetError
from envs.pipeline.process import Outcome, png_of
from envs.pipeline.providers import OpenAIVlm
from envs.pipeline.review import ReviewServer
from envs.pipeline.store import BuildFolder
from envs.rng import generator_for
from rlrestore.commands.data_build import Built, run_build
from tests.fake_api import SECRET, FakeApi, Fault, serving

DIAGNOSIS = json.dumps({
    "content": "a street", "degradations": [{"name": "noise", "severity": "severe", "where": "in the sky"}],
    "text": ['OPEN <|im_start|> "24h"'], "faces": 1, "keep": ["the red car"],
})  # fmt: skip
GOOD = json.dumps({"order_ok": True, "violations": [], "D": 90, "F": 95})
# What goes wrong with which photo, by its number. The others are restored well.
FAULTS = {
    1: "refused", 2: "moved", 3: "blurred", 4: "other scene", 5: "nothing done", 6: "damaged", 7: "wrong aspect",
    8: "another person", 9: "votes differ", 10: "unreadable reply", 11: "fixed in round 2",
}  # fmt: skip


@pytest.fixture(scope="module")
def lq_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray], list[np.ndarray]]:
    """14 photos of 256 px (crops of real photographs, degraded), and their clean versions."""
    folder = tmp_path_factory.mktemp("lq")
    names = ("astronaut", "chelsea", "china", "coffee", "camera", "flower", "rocket")
    photos = [photo for side in wheel_photos() for photo in side if photo.name in names]
    clean, low = [], []
    for place in ((20, 30), (44, 120)):
        for photo in photos:
            y, x = place
            crop = np.ascontiguousarray(load_rgb(photo.path)[y : y + 256, x : x + 256])
            lq = DEGRADATIONS["mild"].apply(from_uint8_hwc(crop), generator_for(2, len(clean))).lq
            clean.append(crop)
            low.append(to_uint8_hwc(lq))
            Image.fromarray(low[-1]).save(folder / f"{len(clean) - 1:02d}.png")
    return folder, clean, low


class World:
    """The script: it knows the photo by its pixels, and answers as FAULTS says."""

    def __init__(self, clean: list[np.ndarray], low: list[np.ndarray]):
        self.clean, self.hashes = clean, [perceptual_hash(view) for view in low]
        self.transient: Counter[str] = Counter()
        self.trouble = False  # 429, 500 and damaged JSON at the first try of some requests

    def number(self, picture: np.ndarray) -> int:
        own = perceptual_hash(picture)
        return min(range(len(self.hashes)), key=lambda n: (own ^ self.hashes[n]).bit_count())

    def __call__(self, kind: str, pictures: list[np.ndarray], text: str, times: int) -> bytes | str | Fault:
        n = self.number(pictures[0])
        if self.trouble and times == 1 and n % 3 == 0:
            self.transient[kind] += 1
            return Fault(429, headers={"Retry-After": "0.05"}) if n % 2 else Fault(500, "oops")
        if kind == "edit":
            return self.edit(n, pictures[0], text)
        return DIAGNOSIS if len(pictures) == 1 else self.verdict(n, pictures[1])

    def edit(self, n: int, lq: np.ndarray, prompt: str) -> bytes | Fault:
        gt = self.clean[n]
        match FAULTS.get(n):
            case "refused":
                return Fault(400, '{"error": {"code": "moderation_blocked"}}')
            case "moved":
                gt = np.roll(gt, (9, -7), (0, 1))
            case "blurred":
                gt = gaussian_filter(gt, (5, 5, 0))
            case "other scene":
                gt = self.clean[(n + 3) % len(self.clean)]
            case "nothing done":
                gt = lq
            case "damaged":
                return png_of(gt)[:2000]
            case "wrong aspect":
                gt = gt[:, :200]
            case "fixed in round 2" if "An earlier try was wrong" not in prompt:
                gt = gt[::-1, ::-1][::-1, ::-1] // 2 + gt // 2  # well enough for the filter
        return png_of(np.ascontiguousarray(gt))

    def verdict(self, n: int, result: np.ndarray) -> str:
        match FAULTS.get(n):
            case "another person":
                return json.dumps(
                    {"order_ok": True, "violations": [{"kind": "face", "what": "the nose"}], "D": 90, "F": 25}
                )
            case "votes differ":
                self.votes = getattr(self, "votes", 0) + 1
                return json.dumps({"order_ok": True, "violations": [], "D": 90, "F": 95 if self.votes % 2 else 60})
            case "unreadable reply":
                return "I would say 95. " + GOOD
            case "fixed in round 2" if self.rounds_of(result):
                return json.dumps(
                    {"order_ok": True, "violations": [{"kind": "invented", "what": "a bird"}], "D": 80, "F": 70}
                )
        return GOOD

    def rounds_of(self, result: np.ndarray) -> bool:
        """Whether this is the first, darker candidate of photo 11 (its values lost a bit by two halvings)."""
        return bool((result % 2 == 0).mean() > 0.9 or not np.array_equal(result, self.clean[11]))


@pytest.fixture
def world(lq_folder: tuple[Path, list[np.ndarray], list[np.ndarray]]) -> World:
    return World(*lq_folder[1:])


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", SECRET)


def write_config(api: FakeApi, source: Path, out: Path, name: str = "b") -> Path:
    section = f"{{url: {api.url}, model: m, api_key_env: FAKE_KEY, requests_per_minute: 60000, timeout_s: 5, price_request: 0.01}}"
    path = out / f"{name}.yaml"
    path.write_text(
        f"build: {{name: {name}, source: {source}, dir: {out}/builds, licence: CC0-1.0, min_side: 128}}\n"
        + "".join(f"{part}: {section}\n" for part in ("assess", "generate", "judge"))
        + "filter: {added: null, lost: null, clip: 0.2}\n"  # tests the plumbing; docs/data_build.md has the rates
    )
    return path


def reasons(built: Built) -> dict[int, str]:
    return {int(name): f"{item.status} {item.stage} {item.reason}" for name, item in built.outcomes.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()
    }


def pairs_of(dataset: Path) -> dict[str, bytes]:
    """All but the statistics, which say how many requests it took."""
    return {name: data for name, data in contents(dataset).items() if name not in ("statistics.json", "README.md")}


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_every_fault_ends_in_its_place(lq_folder, world: World, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    world.trouble = True
    with serving(world) as api:
        config = write_config(api, lq_folder[0], tmp_path)
        built = run_build(config, [])
        found = reasons(built)
        for n, words in {
            1: "rejected generate refused", 2: "rejected filter shift", 3: "rejected filter crispness",
            4: "rejected filter", 5: "rejected filter no_op", 6: "rejected align the answer", 7: "rejected align came as 200x256",
            8: "rejected judge F 25 below 80; veto: face", 9: "review judge votes differ by 35",
            10: "rejected judge judge: no reply could be read", 11: "accepted",
        }.items():  # fmt: skip
            assert found[n].startswith(words), (n, found[n])
        assert all(found[n].startswith("accepted") for n in (0, 12, 13)), found
        assert "structure" in found[4]
        assert min(world.transient.values()) >= 3  # 429s and 500s happened, and cost nothing but time
        assert len(built.outcomes["11"].rounds) == 2
        assert "a bird" in built.outcomes["11"].prompt
        prompt = built.outcomes["00"].prompt
        assert "severe noise in the sky" in prompt and "im_start" not in prompt and "the red car" in prompt
        assert built.dataset is None  # photo 9 awaits review

        before = api.requests.copy()
        folder = BuildFolder(tmp_path / "builds" / "b")
        server = ReviewServer({"09": replace(built.outcomes["09"], gt="another candidate")}, folder, "me")
        server.decide({"id": "09", "verdict": "reject", "reason": "blurred"})  # about what is no longer there
        server.server_close()
        server = ReviewServer(built.outcomes, folder, "me")
        server.decide({"id": "09", "verdict": "accept"})
        assert server.waiting() == []
        server.server_close()
        folder.close()
        again = run_build(config, [])
        assert api.requests == before, "the second run asked again for what was paid"
        assert again.dataset is not None
        assert max(api.answered.values()) == 1, "a request was answered, hence charged, twice"
    rows = [json.loads(line) for line in (again.dataset / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["00", "09", "11", "12", "13"]
    assert {row["licence"] for row in rows} == {"CC0-1.0"}
    env = ManifestEnv(ManifestConfig(str(again.dataset), size=128, held_out_fraction=0.5, cache=str(tmp_path / "c")))
    assert env.has_gt and len(env.index) == 5 and not env.index.bad
    statistics = json.loads((again.dataset / "statistics.json").read_text())
    charged = len(api.answered)
    assert statistics["cost"] == pytest.approx(0.01 * charged)
    assert statistics["tokens_in"] == sum(r.get("tokens_in", 0) for r in calls(tmp_path / "builds" / "b"))
    for name, data in contents(tmp_path / "builds").items():
        assert SECRET.encode() not in data, f"the key is in {name}"
    assert SECRET not in "".join(capsys.readouterr())


def calls(build: Path) -> list[dict]:
    whole = (build / "log" / "calls.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def test_a_budget_stops_and_a_larger_one_goes_on(lq_folder, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with serving(world) as api:
        config = write_config(api, lq_folder[0], tmp_path)
        with pytest.raises(BudgetError, match=r"budget\.cost=0\.1 is used up"):
            run_build(config, ["budget.cost=0.1", "build.reviewed=none"])
        assert 0.01 * len(api.answered) <= 0.1 + 1e-9
        spent = len(api.answered)
        assert spent >= 8
        with pytest.raises(BudgetError, match=r"budget\.requests=12"):
            run_build(config, ["budget.requests=12", "build.reviewed=none"])
        straight = run_build(config, ["build.reviewed=none"])
        assert max(api.answered.values()) == 1
        assert straight.dataset is not None


def test_a_wrong_key_ends_the_run_at_once(lq_folder, world: World, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("FAKE_KEY", "sk-wrong")
    with serving(world) as api:
        with pytest.raises(WrongKeyError, match=r"\$FAKE_KEY is not accepted") as error:
            run_build(write_config(api, lq_folder[0], tmp_path), [])
        assert "sk-wrong" not in str(error.value)
        assert sum(api.requests.values()) <= 8  # those that were under way
        monkeypatch.delenv("FAKE_KEY")
        with pytest.raises(WrongKeyError, match="is not set"):
            run_build(write_config(api, lq_folder[0], tmp_path), [])


def test_a_server_that_is_down_defers_and_is_asked_later(lq_folder, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with serving(lambda *_: Fault(503)) as down:
        config = write_config(down, lq_folder[0], tmp_path)
        overrides = [f"{part}.retries=0" for part in ("assess", "generate", "judge")]
        built = run_build(config, [*overrides, "build.reviewed=none"])
        assert {item.status for item in built.outcomes.values()} == {"deferred"}
    with serving(world) as up:
        urls = [f"{part}.url={up.url}" for part in ("assess", "generate", "judge")]
        built = run_build(config, [*overrides, *urls, "build.reviewed=none"])
        assert Counter(item.status for item in built.outcomes.values())["accepted"] >= 4


def answer_of(script, retries: int = 1) -> tuple[FakeApi, str]:  # type: ignore[no-untyped-def]
    """The server after one question, and the error's text."""
    with serving(script) as api:
        section = ApiSection("openai", api.url, "m", "FAKE_KEY", 60_000, 0.3, retries)
        with pytest.raises((Unanswered, Rejected, Refused)) as error:
            OpenAIVlm(section).ask([], "?", 0, "key")
        return api, f"{type(error.value).__name__}: {error.value}"


def test_answers_that_are_none() -> None:
    slow, text = answer_of(lambda *_: Fault(500, delay_s=1.0))
    assert slow.requests["chat"] == 2
    assert re.match(r"Unanswered: .*Timeout.* after at most 0\.3 s, tried 2 times", text), text
    broken, text = answer_of(lambda *_: Fault(200, "<html>"))
    assert broken.requests["chat"] == 1  # it may have been charged
    assert text == "Rejected: the answer is no JSON object"
    _, text = answer_of(lambda *_: Fault(200, '{"choices": []}'))
    assert text == "Rejected: the answer holds no message"
    echo, text = answer_of(lambda *_: Fault(400, f'{{"error": "what is {SECRET}?"}}'))
    assert echo.requests["chat"] == 1
    assert SECRET not in text and "what is [key]?" in text


def test_photos_that_are_not_sent(lq_folder, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(lq_folder[2][0]).save(source / "a.png")
    Image.fromarray(lq_folder[2][0]).save(source / "b.jpg", quality=90)  # a twin
    Image.fromarray(lq_folder[2][12][:100]).save(source / "c.png")
    (source / "d.png").write_bytes(b"no picture")
    with serving(world) as api:
        config = write_config(api, source, tmp_path)
        built = run_build(config, [])
        assert {
            name: item.stage for name, item in built.outcomes.items() if item.status == "rejected"
        } == dict.fromkeys("bcd", "ingest")
        assert "same as a" in built.outcomes["b"].reason
        assert "smaller than build.min_side=128" in built.outcomes["c"].reason
        bare = run_build(config, ["build.licence=''", "build.name=bare"])
        assert all("no licence" in item.reason or name == "d" for name, item in bare.outcomes.items())
        assert api.requests["edit"] == 1


def test_the_packaged_restorer_as_provider(lq_folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(lq_folder[2][0][64:192, 64:192]).save(source / "0.png")
    config = tmp_path / "local.yaml"
    config.write_text(
        f"build: {{name: l, source: {source}, dir: {tmp_path}/builds, licence: CC0-1.0, min_side: 128, reviewed: none}}\n"
        "assess: {kind: fixed}\ngenerate: {kind: local}\njudge: {kind: none}\n"
        "filter: {structure: null, crispness: null, softening: null, added: null, lost: null, clip: null}\n"
    )
    built = run_build(config, [])
    assert built.dataset is not None
    assert Counter(item.status for item in built.outcomes.values()) == {"accepted": 1}, reasons(built)
    assert built.outcomes["0"].prompt.startswith("Restore this photograph")


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [5, pytest.param(17, marks=pytest.mark.slow)])
def test_killed_anywhere_it_goes_on_to_the_same_data_set(after: int, lq_folder, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with serving(world) as api:
        straight = run_build(write_config(api, lq_folder[0], tmp_path, "straight"), ["build.reviewed=none"])
        charges = len(api.answered)
    with serving(World(*lq_folder[1:])) as api:
        config = write_config(api, lq_folder[0], tmp_path, "killed")
        api.delay_s = 0.1
        command = [sys.executable, "-m", "rlrestore", "data", "build", str(config), "build.reviewed=none"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while sum(api.answered.values()) < after and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        api.delay_s = 0.0
        kept = {record["key"] for record in calls(tmp_path / "builds" / "killed") if record["event"] == "result"}
        resumed = run_build(config, ["build.reviewed=none"])
        twice = {key: n for key, n in api.answered.items() if n > 1}
        # A call that the process did not live to note is sent again under its key, by which a provider knows it.
        assert not kept & twice.keys(), "an answer that was on disk was paid for again"
        assert len(twice) <= 4 and max([*twice.values(), 1]) <= 2, twice
        assert len(api.answered) == charges, "as many charges as without the kill, by key"
    assert straight.dataset and resumed.dataset
    assert pairs_of(resumed.dataset).keys() == pairs_of(straight.dataset).keys()
    for name, data in pairs_of(straight.dataset).items():
        if not name.endswith(".jsonl"):
            assert pairs_of(resumed.dataset)[name] == data, name
    assert (resumed.dataset / "manifest.jsonl").read_bytes() == (straight.dataset / "manifest.jsonl").read_bytes()


# --- review -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def review(lq_folder, tmp_path: Path) -> Iterator[ReviewServer]:  # type: ignore[no-untyped-def]
    folder = BuildFolder(tmp_path / "build")
    outcomes = {}
    for n in range(4):
        lq, gt = (folder.blobs.put(png_of(views[n])) for views in (lq_folder[2], lq_folder[1]))
        outcomes[f"p{n}"] = Outcome(
            f"p{n}", "review", "votes differ by 30", "judge", "mix", "CC0-1.0", lq=lq, gt=gt, prompt="<b>x</b>"
        )
    outcomes["done"] = Outcome("done", "accepted", "", "judge", "mix", lq="0" * 64)
    server = ReviewServer(outcomes, folder, "me")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    folder.close()


def test_the_review_server_takes_decisions_from_its_page_only(review: ReviewServer) -> None:
    base, token = review.address.split("/?")[0], {"X-Token": review.token}
    assert requests.get(base, timeout=5).status_code == 403
    assert requests.get(base, headers={**token, "Host": "evil.example"}, timeout=5).status_code == 403
    assert "addEventListener" in requests.get(review.address, timeout=5).text
    items = requests.get(f"{base}/items", headers=token, timeout=5).json()["items"]
    assert [item["id"] for item in items] == ["p0", "p1", "p2", "p3"]
    blob = requests.get(f"{base}/blob/{items[0]['lq']}", headers=token, timeout=5)
    assert blob.headers["Content-Type"] == "image/png"
    assert requests.get(f"{base}/blob/{'0' * 64}", headers=token, timeout=5).status_code == 404
    assert requests.get(f"{base}/blob/../log/calls.jsonl", headers=token, timeout=5).status_code == 404
    for wrong in ({"id": "p9", "verdict": "accept"}, {"id": "p0", "verdict": "reject", "reason": "mood"}, [1]):
        assert requests.post(f"{base}/decide", json=wrong, headers=token, timeout=5).status_code == 400
    for verdict, left in (("accept", 3), ("undo", 4), ("accept", 3)):
        answer = requests.post(f"{base}/decide", json={"id": "p0", "verdict": verdict}, headers=token, timeout=5)
        assert answer.json() == {"left": left}


class Browser:
    """Chromium without a window, driven through its DevTools protocol."""

    def __init__(self, folder: Path):
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                   f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        file, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (file.is_file() and len(file.read_text().split()) == 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        port = file.read_text().split()[0]
        self.page = next(
            item for item in requests.get(f"http://127.0.0.1:{port}/json", timeout=10).json() if item["type"] == "page"
        )

    def drive(self, steps: list[tuple[str, dict]]) -> list[dict]:
        """Send commands in order; their results."""
        import asyncio

        import aiohttp

        async def talk() -> list[dict]:
            results = []
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(self.page["webSocketDebuggerUrl"]) as socket,
            ):
                for number, (method, parameters) in enumerate(steps):
                    await socket.send_json({"id": number, "method": method, "params": parameters})
                    while (answer := await socket.receive_json(timeout=30)).get("id") != number:
                        pass
                    results.append(answer.get("result", {}))
            return results

        return asyncio.run(talk())

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_review_page_in_a_browser(review: ReviewServer, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")

    def value(expression: str) -> object:
        (result,) = browser.drive([("Runtime.evaluate", {"expression": expression})])
        return result["result"].get("value")

    def press(key: str) -> None:
        browser.drive(
            [("Input.dispatchKeyEvent", {"type": kind, "key": key, "text": key}) for kind in ("keyDown", "keyUp")]
        )

    def decisions() -> list[tuple[str, str, str]]:
        return [(item["id"], item["verdict"], item["reason"]) for item in review.folder.decisions.records]

    try:
        browser.drive([("Page.navigate", {"url": review.address})])
        wait_until(lambda: value("document.getElementById('id').textContent") == "p0")
        wait_until(lambda: value("document.getElementById('gt').naturalWidth") == 256)
        assert value("document.getElementById('prompt').innerHTML") == "&lt;b&gt;x&lt;/b&gt;"
        press("f")
        assert value("document.getElementById('lq').className") == "hidden"
        press(" ")
        assert value("[...document.querySelectorAll('#views img')].map(i => i.className).join()") == ",hidden"
        press("a")
        wait_until(lambda: decisions() == [("p0", "accept", "")])
        press("4")
        wait_until(lambda: decisions()[1:] == [("p1", "reject", "person changed")])
        press("u")
        wait_until(lambda: decisions()[2:] == [("p1", "undo", "")])
        press("s")
        wait_until(lambda: value("document.getElementById('id').textContent") == "p2")
        press("a")
        wait_until(lambda: decisions()[3:] == [("p2", "accept", "")])
    finally:
        browser.close()
    assert [item["id"] for item in review.waiting()] == ["p1", "p3"]
