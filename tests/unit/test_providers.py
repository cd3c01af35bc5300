"""Gemini's API over HTTP, the shapes that editors return, and what no server may get us to write down."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from envs.images import decode_rgb
from envs.pipeline.config import ApiSection, GenerateSection
from envs.pipeline.framing import framed, nearest_shape, unframed
from envs.pipeline.gemini import GeminiEditor, GeminiVlm
from envs.pipeline.http import Refused, Rejected, Unanswered, WrongKeyError
from envs.pipeline.ncnn_models import ncnn_restorer, restored
from envs.pipeline.process import png_of
from envs.pipeline.providers import OpenAIEditor, OpenAIVlm
from tests.fake_api import SECRET, FakeApi, Fault, serving
from tests.unit.test_manifest import picture


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", SECRET)


def editor(api: FakeApi, **more: object) -> GeminiEditor:
    return GeminiEditor(GenerateSection("gemini", api.gemini_url, "nano", "FAKE_KEY", 60_000, 5, 1, **more))  # type: ignore[arg-type]


def vlm(api: FakeApi) -> GeminiVlm:
    return GeminiVlm(ApiSection("gemini", api.gemini_url, "pro", "FAKE_KEY", 60_000, 5, 1))


def test_gemini_edits_and_answers() -> None:
    seen = []

    def script(kind: str, pictures: list[np.ndarray], text: str, times: int) -> bytes | str:
        seen.append((kind, [view.shape for view in pictures], text))
        return png_of(255 - pictures[0]) if kind == "edit" else '{"D": 90}'

    photo = picture(1, 96, 64)  # 2:3, which Gemini returns
    with serving(script) as api:
        made = editor(api).edit(png_of(photo), "mend it", 3, "k1")
        said = vlm(api).ask([png_of(photo), png_of(photo)], "good?", 0, "k2")
    np.testing.assert_array_equal(decode_rgb(made.payload, ""), 255 - photo)
    assert (made.tokens_in, made.tokens_out, made.request_id, made.model) == (300, 1290, "r1", "fake-gemini-1")
    assert said.payload == b'{"D": 90}'
    assert seen == [("edit", [(96, 64, 3)], "mend it"), ("chat", [(96, 64, 3)] * 2, "good?")]


def gemini_fault(candidate: dict | None = None, **more: object) -> Fault:
    return Fault(200, json.dumps({"candidates": [candidate] if candidate is not None else [], **more}))


WORDS = {"content": {"parts": [{"text": f"I cannot, and your key is {SECRET}."}]}, "finishReason": "STOP"}


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (gemini_fault({"finishReason": "IMAGE_SAFETY", "finishMessage": "no"}), Refused, r"gave nothing \(IMAGE_SAFETY\) no"),
        (gemini_fault(promptFeedback={"blockReason": "PROHIBITED_CONTENT"}), Refused, "blocked"),
        (gemini_fault(WORDS), Refused, r"words instead of a picture: I cannot, and your key is \[key\]\."),
        (gemini_fault({"finishReason": "STOP"}), Refused, "holds no picture"),
        (gemini_fault({"finishReason": "MAX_TOKENS"}), Rejected, "cut off"),
        (gemini_fault(), Rejected, "no candidate"),
        (gemini_fault(["x"]), Rejected, "no candidate"),  # type: ignore[arg-type]
        (gemini_fault({"content": {"parts": [{"inlineData": {"mimeType": "image/png", "data": "?"}}]}}), Rejected, "base64"),
        (Fault(400, '{"error": {"status": "INVALID_ARGUMENT"}}'), Rejected, "INVALID_ARGUMENT"),
        (Fault(400, '{"error": {"details": [{"reason": "API_KEY_INVALID"}]}}'), WrongKeyError, r"\$FAKE_KEY is not accepted"),
        (Fault(503, "{}"), Unanswered, "status 503, tried 2 times"),
    ],
)  # fmt: skip
def test_gemini_answers_that_are_none(fault: Fault, error: type[Exception], words: str) -> None:
    with serving(lambda *_: fault) as api, pytest.raises(error, match=words) as raised:
        editor(api).edit(png_of(picture(1, 64, 64)), "mend it", 0, "k")
    assert SECRET not in str(raised.value)
    assert api.requests["edit"] == (2 if error is Unanswered else 1)


def test_gemini_says_in_the_body_how_long_to_wait() -> None:
    waits = []
    busy = Fault(429, json.dumps({"error": {"details": [{"retryDelay": "0.25s"}]}}))
    with serving(lambda kind, pictures, text, times: busy if times == 1 else "{}") as api:
        asked = vlm(api)
        asked._api._sleep = waits.append
        assert asked.ask([], "?", 0, "k").payload == b"{}"
    assert waits == [0.25]


def test_a_key_that_a_server_echoes_is_in_no_answer() -> None:
    with serving(lambda *_: f"your key is {SECRET}") as api:
        section = ApiSection("openai", api.url, "m", "FAKE_KEY", 60_000, 5, 0)
        assert OpenAIVlm(section).ask([], "?", 0, "k").payload == b"your key is [key]"


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shape"),
    [((100, 100), (1024, 1024)), ((120, 100), (1024, 1024)), ((130, 100), (1536, 1024)), ((60, 100), (1024, 1536))],
)  # between 1 and 1.5 the border is at their geometric mean, 1.2247
def test_the_nearest_shape(size: tuple[int, int], shape: tuple[int, int]) -> None:
    assert nearest_shape(size, OpenAIEditor.shapes) == shape


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 90), (90, 50), (97, 61), (64, 200)])
@pytest.mark.parametrize("scale", [1, 3])
def test_padding_is_cut_away_again(height: int, width: int, scale: int) -> None:
    photo = picture(2, height, width)
    for shapes in ((), OpenAIEditor.shapes, GeminiEditor.shapes):
        frame = framed(png_of(photo), shapes)
        sent = decode_rgb(frame.png, "")
        if shapes:
            aspect = sent.shape[1] / sent.shape[0]
            assert min(abs(w / h / aspect - 1) for w, h in shapes) < 0.02
        back = unframed(sent.repeat(scale, 0).repeat(scale, 1), frame)
        np.testing.assert_array_equal(back, photo.repeat(scale, 0).repeat(scale, 1))


def test_a_photo_of_another_shape_goes_through_an_editor_of_few_shapes() -> None:
    photo = picture(3, 60, 100)

    def script(kind: str, pictures: list[np.ndarray], text: str, times: int) -> bytes:
        assert pictures[0].shape == (67, 100, 3)  # 3:2
        return png_of(pictures[0].repeat(2, 0).repeat(2, 1))

    with serving(script) as api:
        section = GenerateSection("openai", api.url, "m", "FAKE_KEY", 60_000, 5, 0)
        frame = framed(png_of(photo), OpenAIEditor.shapes)
        made = OpenAIEditor(section).edit(frame.png, "mend", 0, "k")
    np.testing.assert_array_equal(unframed(decode_rgb(made.payload, ""), frame)[::2, ::2], photo)


# --- restorers of packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "eaten"), [(1, 0), (1, 5), (4, 0)])
def test_tiles_of_a_packaged_restorer_fit_together(scale: int, eaten: int) -> None:
    """A network that returns what it sees, larger or without its border, returns the photo."""
    photo = picture(4, 150, 290)

    def forward(shown: np.ndarray) -> np.ndarray:
        inner = shown[eaten : len(shown) - eaten, eaten : shown.shape[1] - eaten]
        return inner.repeat(scale, 0).repeat(scale, 1)

    back = restored(photo, forward, downscale=1)
    assert back.shape == photo.shape
    assert np.abs(back.astype(int) - photo).max() <= (0 if scale == 1 else 6)  # Lanczos of blocks rings a little
    assert restored(photo, forward, downscale=2).shape == photo.shape


def test_an_ncnn_network_runs(tmp_path: Path) -> None:
    pytest.importorskip("ncnn", reason="pip install ncnn")
    layers = "7767517\n2 2\nInput in 0 1 data\nInterp up 1 1 data out 0=1 1=2.0 2=2.0\n"  # nearest, twice as large
    (tmp_path / "m.param").write_text(layers)
    (tmp_path / "m.bin").write_bytes(b"")
    photo = picture(5, 40, 52)
    made = decode_rgb(ncnn_restorer(tmp_path / "m", 1)(png_of(photo), 0), "")
    assert made.shape == photo.shape
    assert np.abs(made.astype(int) - photo).max() <= 6


def test_missing_networks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.param does not exist: unpack a wheel"):
        ncnn_restorer(tmp_path / "nothing", 1)
