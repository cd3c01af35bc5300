"""Restorations that exist already: the manifest, its refusals, and training off line on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from envs.check import check_env
from envs.preferences import PreferencesConfig, PreferencesEnv
from rlrestore.build import build_crew, check_parts, load_train_config
from rlrestore.config.files import ConfigError
from rlrestore.config.sections import TrainConfig
from rlrestore.crew import LocalCrew, StageTimes
from rlrestore.iteration.stages import rollout_chain
from scripts.make_preferences import make
from tests.tiny import iterate, tiny_config, write_tiny


def photo(folder: Path, name: str, grey: int, size: int = 40) -> str:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(grey)
    noise = torch.randint(0, 32, (size, size, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray((noise + grey).numpy()).save(folder / name)
    return name


def pairs(folder: Path, count: int) -> Path:
    rows = [
        {
            "lq": photo(folder, f"{i}.png", i),
            "chosen": photo(folder, f"{i}w.png", i + 90),
            "rejected": photo(folder, f"{i}l.png", i + 180),
            "gt": f"{i}w.png",
        }
        for i in range(count)
    ]
    return written(folder, rows)


def written(folder: Path, rows: Sequence[dict]) -> Path:
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_it_keeps_the_contract_of_envs(tmp_path: Path) -> None:
    check_env(PreferencesEnv(PreferencesConfig(str(pairs(tmp_path, 12)), size=32, held_out_fraction=0.4)))


def test_restorations_are_cut_where_the_photo_is(tmp_path: Path) -> None:
    env = PreferencesEnv(PreferencesConfig(str(pairs(tmp_path, 12)), size=32, held_out_fraction=0.4))
    for task in env.draw(0, 6):
        won, lost = task.recorded
        assert (won.score, lost.score) == (1.0, 0.0)
        left, top = int(task.record["x_px"]), int(task.record["y_px"])
        number = int(task.photo.rsplit("/", 1)[1].removesuffix(".png"))
        for image, name in ((task.lq, f"{number}.png"), (won.image, f"{number}w.png"), (lost.image, f"{number}l.png")):
            with Image.open(tmp_path / name) as whole:
                cut = whole.crop((left, top, left + 32, top + 32))
            if task.record["flip"]:
                cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes() == cut.tobytes()
    assert all(task.recorded == () for task in env.held_out(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "none.png"}, "none.png"),
        ({"r_w": 0.1, "r_l": 0.2}, "chosen and rejected swapped"),
        ({"r_w": float("nan")}, "must be finite"),
        ({"chosen": "0w.png", "rejected": 3, "r_w": "good"}, "manifest.jsonl:3"),
        ({"rejected": "small.png"}, "must have the size of the LQ"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_or_file(tmp_path: Path, change: dict, message: str) -> None:
    manifest = pairs(tmp_path, 4)
    photo(tmp_path, "small.png", 1, size=36)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[2] |= change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PreferencesEnv(PreferencesConfig(str(written(tmp_path, rows)), size=32, held_out_fraction=0.5))


def test_lines_must_have_as_many_restorations(tmp_path: Path) -> None:
    manifest = pairs(tmp_path, 4)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    items = [{"image": "0.png", "score": 0.5}, {"image": "1.png", "score": 0.1}, {"image": "2.png", "score": 0.2}]
    rows.append({"lq": "3.png", "restorations": items})
    with pytest.raises(ValueError, match="has 2 to 3 restorations a line"):
        PreferencesEnv(PreferencesConfig(str(written(tmp_path, rows)), size=32, held_out_fraction=0.5))


def offline(folder: Path, manifest: Path, kind: str, *more: str) -> TrainConfig:
    """The tiny run, with its photos from `manifest`."""
    base = write_tiny(folder, kind)
    path = folder / f"offline_{kind}.yaml"
    env = f"{{kind: preferences, manifest: {manifest}, size: 32, held_out_fraction: 0.4}}"
    path.write_text(f"base: {base.name}\nenv: {env}\nrewards: {{ssim_rgb: null}}\n")
    return load_train_config(path, more)


def test_dpo_learns_off_line_to_prefer_what_was_chosen(tmp_path: Path) -> None:
    """Ten steps on recorded samples: the loss falls below log 2, nothing is sampled."""
    config = tiny_config(tmp_path, "dpo")
    make(config, check_parts(config).draw(0, 12), tmp_path / "recorded")
    config = offline(tmp_path, tmp_path / "recorded" / "manifest.jsonl", "dpo", "algorithm.beta=100", "engine.lr=3e-4")
    env = check_parts(config)
    crew = build_crew(config, StageTimes())
    assert isinstance(crew, LocalCrew)
    losses = []
    for _ in range(10):
        scored, (report,) = iterate(crew, config, env, 0)
        assert all(part.images.forwards == 0 for part in scored)
        losses.append(report.sums["loss"][0] / report.sums["loss"][1])
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.66
    chunk = scored[0].chunk
    assert [item.seed for item in scored[0].images.restorations(chunk)] == [row.seed for row in chunk.rows]
    chain = rollout_chain(config.sampling, 0, 0, crew.learner.algorithm)
    images, latents = crew.learner.sampler.sample(chunk, chain, crew.learner.behaviour, 0, "")
    expected = torch.stack([chunk.tasks[row.group].recorded[row.member].image for row in chunk.rows])
    assert torch.equal(images.pixels.float() / 255, expected)
    encoded = crew.learner.restorer.encode(expected, crew.learner.sampler.condition(chunk))
    assert torch.equal(latents.z_0, encoded.clamp(-8, 8))


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("grpo", ["rollout.samples=2", "engine.micro_batch=2"], "has finished restorations only"),
        ("dpo", [], "has 2 restorations of a photo and rollout.samples=4: set rollout.samples=2"),
    ],
)
def test_what_recorded_restorations_do_not_allow(tmp_path: Path, kind: str, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parts(offline(tmp_path, pairs(tmp_path / "pairs", 8), kind, *more))
