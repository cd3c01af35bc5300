"""`rlrestore evaluate` with a config that has `sets`: LQ, base and tuned side by side on test sets (`evaluation.protocol`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from envs.index import Index
from rewards.base import Reward
from rewards.rubric import TermConfig
from rlrestore.build import best_device, build_restorer, build_term, load_train_config
from rlrestore.checkpoint import load_tensors
from rlrestore.commands.data_check import open_user_index
from rlrestore.commands.restore import load_restorer
from rlrestore.config.files import ConfigError, dump, typed
from rlrestore.errors import InputError
from rlrestore.evaluation.protocol import (
    LQ,
    ProtocolConfig,
    ProtocolSection,
    Restore,
    SetResult,
    SetSection,
    measure_set,
    rows_of,
    summary_of,
    table_of,
)
from rlrestore.quiet import quiet
from rlrestore.reporting.pictures import grid, to_pil
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.restoration import check_tiling, restore_pixels
from rlrestore.rundir import newest_checkpoint, versions


def run_sets(path: Path, given: Mapping[str, Any], checkpoint: Path | None) -> Path:
    """Measure everything, then write result.json, report.md, config.yaml and a picture a set. Returns the folder."""
    quiet()
    config, sections = read_config(path, given)
    section = config.protocol
    target = _target(section)
    metrics, missing = make_metrics(config.rewards, section.skip_missing)
    indices = {
        name: open_user_index(Path(one.source), Path(one.root) if one.root else None) for name, one in sections.items()
    }
    restorers = {name: _restore(made, section) for name, made in make_restorers(config, checkpoint).items()}
    results = _measure(indices, section, restorers, metrics)
    summaries = {name: summary_of(result, section, metrics) for name, result in results.items()}
    text = report(section.name, sections, summaries, missing)
    new = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    facts = {"sets": summaries, "left_out": missing, "versions": versions(), "seed": section.seed}
    (new / "result.json").write_text(json.dumps(facts, indent=1) + "\n")
    (new / "report.md").write_text(text)
    (new / "config.yaml").write_text(dump(config))
    for name, result in results.items():
        if result.shown:
            titles = ["LQ", *restorers, *(["GT"] if result.has_gt else [])]
            to_pil(grid(result.shown, titles, [one[-40:] for one in result.ids[: len(result.shown)]])).save(
                new / f"{name}.png"
            )
    if target.exists():
        shutil.rmtree(target)
    new.rename(target)
    print(f"\n{text}\nreport  {target / 'report.md'}")
    return target


def read_config(path: Path, given: Mapping[str, Any]) -> tuple[ProtocolConfig, dict[str, SetSection]]:
    """ConfigError for what cannot be measured. `metrics` are terms as `evaluate.gold` of a train config has them."""
    data = {"rewards": {}, **given}
    if "metrics" in data:
        data["rewards"] = data.pop("metrics")
    sets, restorers = data.pop("sets") or {}, data.pop("restorers", None) or {}
    top = typed(_Sections, data, {}, str(path))
    wrapped = {name: one if isinstance(one, Mapping) else {"source": one} for name, one in sets.items()}
    sections = {name: typed(_OneSet, {"set": one}, {}, f"{path}: sets.{name}").set for name, one in wrapped.items()}
    config = ProtocolConfig(
        top.protocol, sections, {str(name): str(where) for name, where in restorers.items()}, top.rewards
    )
    if not sections or not config.rewards:
        raise ConfigError(
            f"{path}: sets has {len(sections)} entries and metrics {len(config.rewards)}: at least one of each is needed"
        )
    if bool(config.restorers) == bool(config.protocol.run) or LQ in config.restorers:
        raise ConfigError(
            f"{path}: set protocol.run=RUN (columns base and tuned) or restorers.NAME=FOLDER; no NAME is '{LQ}'"
        )
    if config.protocol.samples < 1 or config.protocol.steps < 1:
        raise ConfigError(
            f"{path}: protocol.samples={config.protocol.samples} and steps={config.protocol.steps} must be at least 1"
        )
    return config, sections


@dataclass
class _Sections:
    """What `typed` reads; sets and restorers are named by the user."""

    protocol: ProtocolSection
    rewards: dict[str, TermConfig]


@dataclass
class _OneSet:
    """For `typed`, which reads sections."""

    set: SetSection


def _target(section: ProtocolSection) -> Path:
    folder = Path(section.dir or (Path(section.run) / "evaluations" if section.run else "evaluations")) / section.name
    if section.run and not Path(section.run).is_dir():
        raise InputError(f"protocol.run={section.run} does not exist: give the folder of a run")
    if folder.exists() and not (folder / "result.json").is_file():
        raise InputError(f"{folder} exists and is no report of an evaluation: choose another protocol.name")
    if folder.exists() and not section.overwrite:
        raise InputError(f"{folder} exists: set protocol.overwrite=true to replace it, or another protocol.name")
    return folder


def make_metrics(terms: Mapping[str, TermConfig], skip_missing: bool) -> tuple[dict[str, Reward], dict[str, str]]:
    """(metrics, what was left out and why). ConfigError for the first that cannot be built, unless it may be skipped."""
    metrics, missing = {}, {}
    for name, term in terms.items():
        try:
            metrics[name] = build_term(term)
        except ConfigError as error:
            if not skip_missing:
                raise ConfigError(f"{error}; or set protocol.skip_missing=true") from error
            missing[name] = str(error)
    if not metrics:
        raise ConfigError(f"no metric can be built here: {next(iter(missing.values()))}")
    return metrics, missing


def make_restorers(config: ProtocolConfig, checkpoint: Path | None) -> dict[str, Restorer]:
    """By column. Of a run: `base` as it started, and `tuned` of its newest checkpoint (or the given one)."""
    if config.restorers:
        if checkpoint is not None:
            raise InputError("--checkpoint belongs to protocol.run: with restorers, name the checkpoint there")
        return {
            name: load_restorer(None if where == "packaged" else Path(where))
            for name, where in config.restorers.items()
        }
    run = Path(config.protocol.run)
    source = checkpoint or newest_checkpoint(run)[0]
    if source is None or not (run / "config.resolved.yaml").is_file():
        raise InputError(f"{run} has no complete checkpoint, or no config.resolved.yaml: train it first")
    base = build_restorer(load_train_config(run / "config.resolved.yaml").restorer).to(best_device())
    if not (source / "base.safetensors").is_file():
        raise InputError(f"{source} is not of `rlrestore train`: give restorers.NAME=FOLDER instead of protocol.run")
    parameters = dict(base.denoiser.named_parameters())
    for name, value in load_tensors(
        source / "base.safetensors"
    ).items():  # the files of its start may have changed since
        parameters[name].data.copy_(value)
    return {"base": base, "tuned": load_restorer(source)}


def _restore(restorer: Restorer, section: ProtocolSection) -> Restore:
    try:
        check_tiling(section.tile, section.overlap, restorer.multiple)
    except ValueError as error:
        raise ConfigError(f"protocol.tile={section.tile} protocol.overlap={section.overlap}: {error}") from error
    return lambda pixels, seed: restore_pixels(
        restorer, pixels, seed=seed, steps=section.steps, samples=1, tile=section.tile, overlap=section.overlap
    )


def _measure(
    indices: Mapping[str, Index],
    section: ProtocolSection,
    restorers: Mapping[str, Restore],
    metrics: Mapping[str, Reward],
) -> dict[str, SetResult]:
    total = sum(len(rows_of(index, section.photos)) for index in indices.values())
    with tqdm(total=total, desc="evaluating", unit="photo") as bar:
        return {name: measure_set(index, section, restorers, metrics, bar.update) for name, index in indices.items()}


def report(
    name: str, sections: Mapping[str, SetSection], summaries: Mapping[str, Any], missing: Mapping[str, str]
) -> str:
    parts: Sequence[str] = [table_of(one, summary) for one, summary in summaries.items()]
    notes = [f"{one}: {section.licence}" for one, section in sections.items() if section.licence]
    lines = [f"# {name}", "", *(["Licences: " + "; ".join(notes), ""] if notes else [])]
    if missing:
        lines += [
            "Left out, because they cannot be built here:",
            "",
            *(f"- {one}: {why}" for one, why in missing.items()),
            "",
        ]
    return "\n".join([*lines, *parts])
