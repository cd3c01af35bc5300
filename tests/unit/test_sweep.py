"""Sweeps without training: mixes by name, what a file enumerates and refuses, fronts and choices on numbers that can be derived."""

import json
import math

import numpy as np
import pytest
import yaml

from rlrestore.build import load_train_config
from rlrestore.commands.report import run_report
from rlrestore.commands.sweep import run_sweep
from rlrestore.config.files import ConfigError, read_yaml
from rlrestore.sweeps.report import Outcome, choose, front_shares, importance, on_front
from rlrestore.sweeps.sweep import load_sweep
from tests.fake_run import write_run

TRAIN = """
run: {name: base, steps: 2}
env: {kind: photos, size: 64}
restorer: {kind: embedded}
algorithm: {kind: nft}
rewards: {nss: {weight: 1.0}, low_frequency: {weight: 1.0}}
evaluate: {gold: {psnr_rgb: {}}}
placement: {kind: local}
"""
SWEEP = """
sweep: {name: mixes, dir: DIR, config: train.yaml, seeds: [0, 1], quality: nss, fidelity: psnr_rgb}
set: {engine: {lr: 2.0e-4}, evaluate.gold: {psnr_rgb: {}, nss: {}}}
space:
  mixes: [plain, [plain, sharp]]
  blocks.quality: [0.5, 2]
"""


@pytest.fixture
def sweep_file(tmp_path):
    (tmp_path / "mixes").mkdir()
    (tmp_path / "mixes" / "plain.yaml").write_text(
        "rewards: {low_frequency: {weight: 1.0}, nss: {weight: 1.0, floor: 0.2}}"
    )
    (tmp_path / "mixes" / "sharp.yaml").write_text(
        "rewards: {niqe: {}, nss: {weight: 0.5}}\nregularise: {velocity: 1.0e-4}"
    )
    (tmp_path / "train.yaml").write_text(TRAIN)
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("DIR", str(tmp_path / "runs")))
    return path


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


# ---- mixes


def test_a_mix_replaces_what_the_config_rewards_and_adds_weights(sweep_file):
    config = load_train_config(
        sweep_file.with_name("train.yaml"), ["mixes={plain: 1, sharp: 2}", "rewards.niqe.scale=3"]
    )
    # nss: 1 of plain + 2 x 0.5 of sharp, floor of plain; niqe: default weight 1, times 2; the override comes last
    weights = {name: (term.weight, term.floor, term.scale) for name, term in config.rewards.items()}
    assert weights == {"low_frequency": (1.0, 0.1, None), "nss": (2.0, 0.2, None), "niqe": (2.0, 0.1, 3.0)}
    assert config.regularise.velocity == 1e-4


def test_rewards_beside_mixes_in_a_file_are_laid_over_them(sweep_file):
    path = sweep_file.with_name("mine.yaml")
    path.write_text("base: train.yaml\nmixes: plain\nrewards: {nss: null, gmsd: {weight: 3}}")
    assert set(read_yaml(path)["rewards"]) == {"low_frequency", "gmsd"}


@pytest.mark.parametrize(
    ("mixes", "message"),
    [
        ("plane", r"mix 'plane' is unknown. Did you mean 'plain'\?"),
        ("[plain, plain]", "names one twice"),
        ("{plain: -1}", "must be a positive factor"),
        ("7", "must be a name, a list of names"),
        ("bad", "a mix may not set 'engine'"),
    ],
)
def test_mixes_that_are_wrong_are_named(sweep_file, mixes, message):
    (sweep_file.parent / "mixes" / "bad.yaml").write_text("engine: {lr: 1}")
    with pytest.raises(ConfigError, match=message):
        load_train_config(sweep_file.with_name("train.yaml"), [f"mixes={mixes}"])


def test_shares_of_quality_and_fidelity_follow_blocks(sweep_file):
    from rewards.rubric import Rubric

    config = load_train_config(sweep_file.with_name("train.yaml"), ["blocks.quality=3"])
    assert Rubric(list(config.rewards.values()), vars(config.blocks)).weight_R.tolist() == [0.75, 0.25]


# ---- what a file enumerates


def test_a_grid_is_every_combination_with_every_seed(sweep_file):
    sweep = load_sweep(sweep_file)
    assert len(sweep.trials) == 2 * 2 * 2 and len(sweep.points) == 4
    config = load_train_config(sweep.train, sweep.trials[-1].overrides)
    assert (config.engine.lr, config.blocks.quality, config.run.seed) == (2e-4, 2.0, 1)
    assert set(config.rewards) == {"low_frequency", "nss", "niqe"}
    assert set(config.evaluate.gold) == {"psnr_rgb", "nss"}
    assert config.run.name == sweep.trials[-1].folder.name


def test_points_keep_their_folders_when_the_space_grows(sweep_file):
    before = {trial.folder for trial in load_sweep(sweep_file).trials}
    after = {trial.folder for trial in load_sweep(edited(sweep_file, "[0.5, 2]", "[0.1, 0.5, 2]")).trials}
    assert before < after


def test_draws_lie_in_their_ranges_and_the_first_ones_stay(sweep_file):
    edited(sweep_file, "blocks.quality: [0.5, 2]", "blocks.quality: {low: 0.1, high: 10, log: true}")
    few, many = (load_sweep(sweep_file, ["method=random", f"points={n}", "seeds=[0]"]).trials for n in (8, 64))
    assert [trial.sets for trial in many[:8]] == [trial.sets for trial in few]
    values = [trial.sets["blocks.quality"] for trial in many]
    assert all(0.1 <= value <= 10 for value in values)
    assert 16 <= sum(value < 1 for value in values) <= 48  # log-uniform: half below 1, 32 +- 4 standard deviations of 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "blocks.quality:",
            "blocks.qualty:",
            r"point mixes=plain, blocks.qualty=0.5: .*unknown key. Did you mean 'quality'",
        ),
        ("quality: nss", "quality: nsss", r"sweep.quality=nsss is not measured at point .*low_frequency"),
        ("seeds:", "seed:", r"sweep.seed: unknown key. Did you mean 'seeds'"),
        ("space:", "spaces:", "has the sections sweep and space"),
        ("config: train.yaml", "config: trian.yaml", "sweep.config 'trian.yaml' does not exist"),
        ("[0.5, 2]", "[0.5, 0.5]", "are equal: name each once"),
        ("[0.5, 2]", "{low: 1, high: 2}", "must be a list of values for sweep.method=grid"),
        ("set: {", "set: {blocks.quality: 1, ", "'blocks.quality' stands in set and in space"),
        ("set: {", "set: {placement.kind: colocated, ", "a trial is one process"),
    ],
)
def test_a_sweep_that_is_wrong_is_refused_before_anything_is_written(sweep_file, old, new, message):
    with pytest.raises(ConfigError, match=message):
        run_sweep(edited(sweep_file, old, new), [], dry_run=False)
    assert not (sweep_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("method=pbt", "one of asha, grid, random"), ("parallel=-1", "parallel"), ("method=asha parallel=0", "parallel")],
)
def test_settings_that_are_wrong(sweep_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(sweep_file, override.split())


def test_a_dry_run_lists_states_from_the_folders(sweep_file, capsys):
    sweep = load_sweep(sweep_file)
    write_run(sweep.trials[0].folder)
    for trial, how in ((sweep.trials[1], "running"), (sweep.trials[2], "stopped early after 4 iterations")):
        trial.folder.mkdir()
        (trial.folder / "run.json").write_text(json.dumps({"exit": how}))
    run_sweep(sweep_file, [], dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert "8 trials" in lines[0] and "2 of them finished" in lines[0]
    assert [line.split("  ")[2].strip() for line in lines[1:5]] == ["done", "unfinished", "stopped early", "new"]


# ---- the report


def test_the_front_holds_what_no_other_point_beats():
    gain = np.array([[0.0, 3.0], [1.0, 2.0], [1.0, 1.0], [2.0, 0.0], [-1.0, 3.0]])
    # the third is beaten by the second, the last by the first
    assert on_front(gain).tolist() == [True, True, False, True, False]


def outcome(point, quality, fidelity):
    gains = {"q": np.array(quality, dtype=float)[:, None], "f": np.array(fidelity, dtype=float)[:, None]}
    return Outcome(point, {"x": point}, (), gains, {})


def test_the_chosen_point_is_the_best_of_the_faithful_ones():
    gamed = outcome("gamed", [9, 9.1, 9, 8.9], [-2, -2.1, -2, -1.9])
    good = outcome("good", [2, 2.1, 2, 1.9], [0.1, -0.1, 0.1, 0.0])
    timid = outcome("timid", [0, 0.1, 0, 0], [1, 1.1, 1, 0.9])
    assert choose([gamed, good, timid], "q", "f") is good
    assert choose([gamed, outcome("worse", [9, 9, 9, 9.1], [-5, -5.1, -5, -5])], "q", "f") is gamed
    assert choose([], "q", "f") is None
    shares = front_shares([gamed, good, timid, outcome("beaten", [-1, -1.1, -1, -1], [-3, -3, -3.1, -3])], "q", "f")
    assert shares.tolist() == [1, 1, 1, 0]


def test_importance_is_a_rank_correlation_with_an_interval():
    rho, low, high = importance([0, 1, 2, 3, 4, 5], [0, 1, 4, 9, 16, 25])
    assert (rho, low, high) == pytest.approx((1, 1, 1))  # any rising curve
    rho, low, high = importance([0, 1, 2], [2, 1, 0])
    assert rho == pytest.approx(-1) and math.isnan(low) and math.isnan(high)


def test_the_report_of_a_sweep_names_its_choice_and_the_chosen_config_loads(sweep_file, capsys):
    sweep = load_sweep(sweep_file)
    for index, trial in enumerate(sweep.trials[:-2]):
        point = index // 2
        psnr = [-3.0, -3.1, -2.9] if point == 1 else [0.5 * point, 0.5 * point + 0.1, 0.2]
        write_run(trial.folder, {"mix": [0.1] * 3, "nss": [-0.5 * (point + 1), -0.4, -0.6], "psnr_rgb": psnr})
    run_report(sweep_file, [])
    page = (sweep.folder / "report.html").read_text()
    assert "6 of 8 trials finished" in page and "http" not in page.replace("http-equiv", "")
    assert (
        "<td><b>mixes=plain+sharp, blocks.quality=0.5</b></td>" in page
    )  # the third: nss fell most, and psnr did not fall
    assert page.count('alt="LQ of cat') == 3
    chosen = sweep.folder / "chosen.yaml"
    # mixes are resolved, so that the file stands alone
    assert "mixes" not in yaml.safe_load(chosen.read_text())
    config = load_train_config(chosen)
    assert (config.run.name, config.blocks.quality, config.engine.lr) == ("mixes_chosen", 0.5, 2e-4)
    assert set(config.rewards) == {"low_frequency", "nss", "niqe"}
    run_report(sweep_file, ["quality=psnr_rgb"])
    assert "psnr_rgb, gain over the base" in (sweep.folder / "report.html").read_text()


def test_the_report_of_a_sweep_without_results_says_so(sweep_file):
    load_sweep(sweep_file).folder.mkdir(parents=True)
    run_report(sweep_file, [])
    assert "No trial has finished yet" in (sweep_file.parent / "runs/mixes/report.html").read_text()
