"""`rlrestore score`: rows and folders, a mix, and what it refuses by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from rlrestore.cli import app


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """x, lq and gt, three pictures each: x1 is the gt, the others have noise."""
    rng = np.random.default_rng(0)
    for name in ("x", "lq", "gt"):
        (tmp_path / name).mkdir()
    for i in range(3):
        gt = rng.integers(60, 190, (48, 64, 3))
        lq = (gt + rng.normal(0, 20, gt.shape)).clip(0, 255)
        x = gt if i == 1 else (gt + rng.normal(0, 8, gt.shape)).clip(0, 255)
        for name, picture in (("x", x), ("lq", lq), ("gt", gt)):
            suffix = "bmp" if name == "lq" else "png"
            Image.fromarray(picture.astype(np.uint8)).save(tmp_path / name / f"p{i}.{suffix}")
    return tmp_path


def score(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["score", *map(str, arguments)])
    return done.exit_code, done.output


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_beside_its_lqs_and_references(folders: Path) -> None:
    out = folders / "out.jsonl"
    arguments = [
        folders / "x",
        "--lq",
        folders / "lq",
        "--gt",
        folders / "gt",
        "--reward",
        "psnr_rgb",
        "--reward",
        "low_frequency",
    ]
    code, said = score(*arguments, "--output", out, "--types", "noise", "--batch", 2)
    assert code == 0, said
    found = rows(out)
    assert [row["id"] for row in found] == ["p0", "p1", "p2"] and "reasons" not in found[0]
    assert (
        found[1]["scores"]["psnr_rgb"] == 80 and 28 < found[0]["scores"]["psnr_rgb"] < 32
    )  # 20 log10(255 / 8) = 30.07
    assert found[1]["mix"] == max(row["mix"] for row in found)
    assert "psnr_rgb" in said and "mix" in said and str(out) in said.replace("\n", "")
    assert score(*arguments, "--output", out)[0] == 64  # it exists


def test_rows_of_a_file_with_a_configs_mix(folders: Path) -> None:
    (folders / "mix.yaml").write_text("rewards: {ssim_rgb: {weight: 2}, low: {kind: low_frequency}}")
    row = {"restored_image": "x/p1.png", "degraded_image": "lq/p1.bmp", "gt": "gt/p1.png", "task": "Denoise", "id": "a"}
    (folders / "in.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps({**row, "id": "b"}) + "\n")
    code, said = score(folders / "in.jsonl", "--config", folders / "mix.yaml", "--output", folders / "o.jsonl")
    assert code == 0, said
    assert [r["id"] for r in rows(folders / "o.jsonl")] == ["a", "b"] and rows(folders / "o.jsonl")[0]["scores"][
        "ssim_rgb"
    ] == 1
    (folders / "in.csv").write_text("image,lq,types\nx/p0.png,lq/p0.bmp,blur noise\n")
    assert score(folders / "in.csv", "--reward", "low_frequency", "--output", folders / "c.jsonl")[0] == 0


@pytest.mark.parametrize(
    ("text", "reward", "message"),
    [
        ("image\nx/none.png\n", "nss", "line 2: image .*none.png does not exist"),
        ("picture\nx/p0.png\n", "nss", "has the columns picture; wanted one of image"),
        ("image\nx/p0.png\n", "low_frequency", "line 2: no lq, and one of the rewards needs it"),
        ("image,lq\nx/p0.png,small.png\n", "low_frequency", "line 2: lq has 32x32 px and the image 64x48"),
        ("image,lq,task\nx/p0.png,lq/p0.bmp,Levitation\n", "low_frequency", "line 2: task 'Levitation' is unknown"),
        ("image\nbroken.png\n", "nss", "line 2: .*broken.png"),
        ("image\nx/p0.png\n", "nsss", "Did you mean: 'nss'"),
        ("image\n", "nss", "nothing to score"),
    ],
)
def test_refuses_by_name(
    text: str, reward: str, message: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    Image.new("RGB", (32, 32)).save(folders / "small.png")
    (folders / "broken.png").write_bytes((folders / "x/p0.png").read_bytes()[:100])
    (folders / "in.csv").write_text(text)
    code, said = score(folders / "in.csv", "--reward", reward, "--output", folders / "o.jsonl")
    assert code == 64 and re.search(message, " ".join(said.split())), said
    assert not (folders / "o.jsonl").exists()


def test_refuses_a_folder_without_partners_and_no_rewards(folders: Path) -> None:
    (folders / "lq" / "p2.bmp").unlink()
    code, said = score(folders / "x", "--lq", folders / "lq", "--reward", "low_frequency", "--output", folders / "o")
    assert code == 64 and "p2.png has no partner p2.*" in " ".join(said.split())
    code, said = score(folders / "x", "--output", folders / "o")
    assert code == 64 and "--reward KIND" in " ".join(said.split())
