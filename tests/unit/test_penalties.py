"""Fidelity penalties: derived numbers, what each type licenses, and optional packages that are not there."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs.types import Restoration, Task
from rewards.check import check_batching, check_values
from rewards.penalties.backbones import open_backbone
from rewards.penalties.colour_drift import chroma
from rewards.penalties.no_op import ssim_uniform
from rewards.penalties.semantic import worst_mean
from rewards.penalties.text_change import Word, levenshtein, text_distance
from rewards.registry import build_reward, reward_spec


def one(kind: str, x: Tensor, lq: Tensor, types: tuple[str, ...] = (), **params: object) -> float:
    scores = build_reward(kind, params).score([Restoration(Task("t", lq, types), x)])
    assert scores.reason_N == ("",)
    return scores.value_N.item()


def noise(seed: int, size: int = 64) -> Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def photo() -> Tensor:
    """A face of about 90 px."""
    file = Path(find_spec("skimage").origin).parent / "data/astronaut.png"  # type: ignore[union-attr, arg-type]
    picture = np.array(Image.open(file).convert("RGB"))[:256, 96:352]
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


# -- colour ----------------------------------------------------------------------------------------------------------


def test_chroma_is_that_of_cielab() -> None:
    # sRGB red has a = 80.09, b = 67.20; greys have none
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert (chroma(red) * 255).flatten().tolist() == pytest.approx([80.09, 67.20], abs=0.05)
    grey = torch.linspace(0, 1, 11).view(1, 1, 1, 11).expand(1, 3, 1, 11)
    assert chroma(grey).abs().max() < 2e-4


def test_colour_drift_is_local_and_licensed_for_haze() -> None:
    lq = 0.3 + 0.4 * noise(0)
    cast = lq.clone()
    cast[0, :32, :32] += 0.1
    assert one("colour_drift", lq, lq) == 0.0
    assert one("colour_drift", cast, lq) > 0.004 and one("colour_drift", cast, lq, ("haze",)) == 0.0
    # a cast over a quarter, and its opposite over another: the whole picture's mean sees little of it
    both = cast.clone()
    both[0, 32:, 32:] -= 0.1
    assert one("colour_drift", both, lq) > 5 * one("colour_drift", both, lq, cells=1)


# -- structure and copies --------------------------------------------------------------------------------------------


def test_structure_counts_edges_without_evidence_and_edges_that_are_gone() -> None:
    flat = torch.full((3, 64, 64), 0.4)
    edge = flat.clone()
    edge[:, :, 32:] = 0.7
    sharp, soft = edge, torch.nn.functional.avg_pool2d(edge[None], (1, 9), 1, (0, 4), count_include_pad=False)[0]
    assert one("structure", edge, edge) == 0.0
    assert (
        one("structure", edge, flat) == pytest.approx(one("structure", flat, edge), rel=1e-4)
        and one("structure", edge, flat) > 0.001
    )
    assert one("structure", sharp, soft) < 0.1 * one("structure", edge, flat)  # deblurring is not inventing
    assert (
        one("structure", flat, edge, ("rain",)) == 0.0 and one("structure", edge, flat, ("rain",)) > 0
    )  # drops may go
    assert one("structure", 1.4 * edge - 0.2, edge, ("lowlight",)) == pytest.approx(0.0, abs=1e-6)  # contrast may rise


def test_a_copy_is_a_no_op_and_another_picture_is_not() -> None:
    lq = photo()
    assert one("no_op", lq, lq) == pytest.approx(1, abs=1e-5) and one("no_op", photo().flip(2), lq) == 0.0
    assert ssim_uniform(noise(0)[None, :1], noise(1)[None, :1]).item() == pytest.approx(0.0, abs=0.6)
    items = [Restoration(Task("t", lq, ()), (lq + a * noise(1, 256)).clamp(0, 1)) for a in (0, 0.02, 0.05)]
    reward = build_reward("no_op")
    check_values(reward, items)
    check_batching(reward, items, reward.score(items))
    assert reward.spec.block == "quality" and not reward.spec.higher_is_better


# -- text ------------------------------------------------------------------------------------------------------------


def word(text: str, left: float = 0, confidence: float = 0.99, height: float = 20) -> Word:
    return Word(text, confidence, (left, 0, left + 50, height))


def test_levenshtein() -> None:
    assert [levenshtein(a, b) for a, b in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))] == [
        3,
        3,
        0,
        2,
    ]


def test_text_distance_counts_changed_and_invented_characters() -> None:
    lq = [word("station"), word("exit42", 100)]  # 13 characters
    assert text_distance(lq, lq, 0.9, 12) == 0
    assert text_distance(lq, [word("statlon"), word("exit42", 100)], 0.9, 12) == pytest.approx(1 / 13)
    assert text_distance(lq, [word("station")], 0.9, 12) == pytest.approx(6 / 13)  # a word is gone
    assert text_distance(lq, [*lq, word("free", 300)], 0.9, 12) == pytest.approx(4 / 13)  # a word is new
    assert text_distance([], [word("free")], 0.9, 12) == 4 / 8  # the shortest ground
    # what was read with doubt, or is small, is no evidence; what lies on something that looked like text is not new
    assert text_distance([word("x", confidence=0.5)], [word("free")], 0.9, 12) == 0
    assert text_distance([word("station", height=8)], [], 0.9, 12) == 0
    assert text_distance([], [], 0.9, 12) == 0


def test_text_is_read_in_pictures() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="pip install 'rlrestore[ocr]'")

    def sign(text: str) -> Tensor:
        image = Image.new("RGB", (224, 64), (235, 230, 220))
        if text:
            ImageDraw.Draw(image).text((14, 12), text, fill=(20, 20, 30), font=ImageFont.load_default(36))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    reward = build_reward("text_change")
    lq = sign("STATION 42")
    items = [Restoration(Task("t", lq, ()), sign(text)) for text in ("STATION 42", "STATUE 47", "")]
    same, changed, gone = reward.score(items).value_N.tolist()
    assert same == 0 and 0.2 < changed < 0.8 and gone == 1
    assert one("text_change", sign("STATION"), sign("")) == pytest.approx(7 / 8)


# -- faces, features -------------------------------------------------------------------------------------------------


def test_another_face_costs_and_the_same_one_does_not() -> None:
    pytest.importorskip("dlib", reason="pip install 'rlrestore[face]'")
    pytest.importorskip("face_recognition_models", reason="pip install 'rlrestore[face]'")
    lq = photo()
    softer = torch.nn.functional.avg_pool2d(lq[None], 3, 1, 1, count_include_pad=False)[0]
    squeezed = lq.clone()  # the eyes where the mouth was
    squeezed[:, 60:180, 80:190] = lq[:, 60:180, 80:190].flip(1)
    assert one("face_identity", lq, lq) == 0 and one("face_identity", softer, lq) == 0
    assert one("face_identity", squeezed, lq) > 0.1
    assert one("face_identity", noise(0), noise(1)) == 0  # nobody is there


def test_worst_mean_is_the_mean_of_the_largest() -> None:
    assert worst_mean(torch.tensor([[0.0, 1.0, 2.0, 5.0]]), 0.5).item() == 3.5
    assert worst_mean(torch.tensor([[0.0, 1.0]]), 0.01).item() == 1.0


def test_any_vision_transformer_can_be_the_backbone(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16
    )
    torch.manual_seed(0)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    backbone = open_backbone(f"transformers:{tmp_path}")
    assert [tuple(level.shape) for level in backbone(noise(0)[None])] == [(1, 32, 4, 4)]
    params = {"backbone": f"transformers:{tmp_path}"}
    assert one("semantic", noise(0), noise(0), **params) < 1e-5 < one("semantic", noise(1), noise(0), **params)


@pytest.mark.parametrize("name", ["resnet", "timm:", "timm:no_such_model", "transformers:nowhere/at-all"])
def test_backbones_that_are_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=r"is unknown|no pretrained feature model|cannot be opened here"):
        open_backbone(name)


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [
        ("text_change", "rapidocr_onnxruntime", "ocr"),
        ("face_identity", "dlib", "face"),
        ("semantic", "efficientnet_lite_pytorch", "features"),
    ],
)
def test_a_missing_package_is_named(kind: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert reward_spec(kind).name == kind  # the driver may look
    with pytest.raises(ValueError, match=rf"is not installed: pip install 'rlrestore\[{extra}\]'"):
        build_reward(kind)


def test_an_anchor_learns_which_place_is_which(tmp_path: Path) -> None:
    """On blocks of random colour: a place finds itself, and a pasted block is seen better than before training."""
    from transformers import ViTConfig, ViTModel

    from rewards.embedded_judge.arena import Source
    from rewards.penalties.anchor import AnchorConfig, save_anchor, train_anchor

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**size, image_size=64, patch_size=8), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    sources = []
    for i in range(8):
        clean = torch.nn.functional.interpolate(noise(i, 8)[None], 64)[0]
        faulty = clean.clone()
        faulty[:, :24, :24] = clean[:, 40:, 40:]
        images = torch.stack([clean, clean + 0.05 * (noise(i + 50) - 0.5), faulty]).clamp(0, 1)
        lq = (clean + 0.2 * (noise(i + 90) - 0.5)).clamp(0, 1)
        pixels = [(255 * z).round().to(torch.uint8) for z in (lq, clean, images)]
        sources.append(Source(str(i), *pixels, torch.zeros(3), ("policy",) * 3, ("", "", "clone")))
    config = AnchorConfig(f"transformers:{tmp_path / 'vit'}")
    _, losses = train_anchor(sources, config, 60, 4, 3e-3, 0)
    anchor, again = train_anchor(sources, config, 60, 4, 3e-3, 0)
    assert losses == again and losses[-1] < losses[0] - 1  # nats; chance is ln 256 = 5.5
    save_anchor(anchor, tmp_path)
    reward = build_reward("anchored", {"weights": str(tmp_path)})
    items = [
        Restoration(Task(s.id, s.lq / 255, ()), image / 255) for s in sources for image in (s.images[1], s.images[2])
    ]
    value = reward.score(items).value_N
    assert (value[0::2] > value[1::2]).all()
    check_values(reward, items)
    with pytest.raises(ValueError, match="holds no anchor"):
        reward_spec("anchored", {"weights": str(tmp_path / "vit")})
