"""`rlrestore data compare`: providers against each other on the same photos: measurements, rewards, and a VLM's duels."""

from __future__ import annotations

import getpass
import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from envs.degradations.jpeg import from_uint8_hwc
from envs.pipeline.compare import CompareConfig, Entry, candidates, duel
from envs.pipeline.config import APIS, BuildConfig, BuildSection, check_build_config
from envs.pipeline.duels import Duel, DuelServer, duels_of, people_wins
from envs.pipeline.ledger import Ledger
from envs.pipeline.process import Photo
from envs.pipeline.ranking import ranking
from envs.pipeline.run import photos
from envs.pipeline.store import BuildFolder
from envs.sources.rows import primary_type
from envs.types import Restoration, Task
from rewards.base import Reward
from rlrestore.build import build_term
from rlrestore.commands.data_build import make_editor, make_vlm
from rlrestore.commands.data_check import open_user_index
from rlrestore.config.files import ConfigError, dump, read_yaml, typed
from rlrestore.errors import InputError


@dataclass(frozen=True)
class Result:
    """What is known of one photo."""

    photo: Photo
    entries: dict[str, Entry]  # by provider
    wins: np.ndarray  # [M, M] of the VLM's duels; 0 without a judge
    scene: str = ""  # as the VLM names it


def run_compare(
    config_path: Path, overrides: list[str], people: bool = False, port: int = 0, reviewer: str | None = None
) -> dict[str, Any]:
    """Ask, measure, judge and rank; writes report.json and report.md into the folder of the comparison.

    people: first show all duels that nobody has decided on a local page, until Ctrl-C or until none is left.
    """
    config, sections = load_compare_config(config_path, overrides)
    rewards = {name: build_term(term) for name, term in config.rewards.items()}
    section = config.compare
    index = open_user_index(Path(section.source), Path(section.root) if section.root else None)
    try:
        told = dump({**vars(config), "providers": {name: one.generate for name, one in sections.items()}})
        folder = BuildFolder(Path(section.dir) / section.name, told)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        ledger = Ledger(folder.calls, folder.blobs, config.budget)
        as_build = BuildConfig(BuildSection(section.name, section.source, licence="(compared only)", min_side=64,
                                            long_edge=section.long_edge))  # fmt: skip
        chosen = [item for item in photos(index, as_build, {}) if isinstance(item, Photo)][: section.photos]
        providers = {name: (one.generate, make_editor(one)) for name, one in sections.items()}
        judge = make_vlm(config.judge) if config.judge.url else None
        results: list[Result] = []
        for photo in tqdm(chosen, desc="comparing", unit="photo"):
            entries = candidates(photo, providers, config.filter, ledger)
            none = np.zeros((len(providers), len(providers))), ""
            results.append(
                Result(photo, entries, *(duel(photo, entries, judge, config.judge, ledger) if judge else none))
            )
        duels = duels_of([(result.photo, result.entries) for result in results], folder)
        if people:
            _ask_people(duels, folder, reviewer, port)
        decided = people_wins(duels, folder, len(providers))
        summary = summarise(list(providers), results, rewards)
        by_people = [replace(result, wins=decided[result.photo.id]) for result in results if result.photo.id in decided]
        summary["people"] = rankings_of(list(providers), by_people)
        summary |= {"photos": len(chosen), "requests": ledger.requests, "cost": round(ledger.cost, 6)}
        for name, text in (("report.json", json.dumps(summary, indent=1) + "\n"), ("report.md", table(summary))):
            temporary = folder.path / f".tmp-{name}"
            temporary.write_text(text)
            os.replace(temporary, folder.path / name)
    finally:
        folder.close()
    print(f"{table(summary)}\nreport  {folder.path / 'report.md'}")
    return summary


def load_compare_config(path: Path, overrides: list[str]) -> tuple[CompareConfig, dict[str, BuildConfig]]:
    """The config, and each provider as the `generate` section of a build; ConfigError for what cannot work."""
    given = {"rewards": {}, **read_yaml(path, overrides)}
    providers = given.pop("providers", None) or {}
    config = typed(CompareConfig, given, {}, str(path))
    if len(providers) < 2 or config.compare.photos < 1:
        raise ConfigError(f"{path}: providers has {len(providers)} and compare.photos is {config.compare.photos}: "
                          "at least 2 and 1 are needed")  # fmt: skip
    if config.judge.kind not in APIS:
        raise ConfigError(f"{path}: judge.kind={config.judge.kind} is unknown: choose one of {', '.join(APIS)}")
    sections = {}
    for name, options in providers.items():
        data = {
            "build": {"name": name, "source": "-"},
            "generate": options,
            "assess": {"kind": "fixed"},
            "judge": {"kind": "none"},
        }
        sections[name] = typed(BuildConfig, data, {}, f"{path}: providers.{name}")
        try:
            check_build_config(sections[name])
        except ValueError as error:
            raise ConfigError(f"{path}: providers.{name}: {error}") from error
    return config, sections


def summarise(names: list[str], results: list[Result], rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """Per provider: answers, what the filter would take, means of measurements and rewards; rankings, all and by type."""
    scores = {name: _mean_rewards([(one.photo, one.entries[name]) for one in results], rewards) for name in names}
    rows = {}
    for name in names:
        entries = [result.entries[name] for result in results]
        usable = [entry for entry in entries if entry.pair is not None]
        keys = sorted({key for entry in usable for key in entry.values})
        rows[name] = {
            "answered": len(usable),
            "passes_filter": sum(not entry.fault for entry in usable),
            "measured": {key: round(float(np.mean([entry.values[key] for entry in usable])), 4) for key in keys},
            "rewards": scores[name],
        }
    return {"providers": rows, "rankings": rankings_of(names, results)}


def rankings_of(names: list[str], results: list[Result]) -> dict[str, Any]:
    """Of all photos, by degradation, and by scene where the VLM named one."""
    groups = {"all": results}
    for result in results:
        groups.setdefault(primary_type(result.photo.types), []).append(result)
        if result.scene:
            groups.setdefault(f"scene: {result.scene}", []).append(result)
    return {group: _ranked(names, members) for group, members in groups.items()}


def _ask_people(duels: list[Duel], folder: BuildFolder, reviewer: str | None, port: int) -> None:
    server = DuelServer(duels, folder, reviewer or getpass.getuser(), port)
    left = len(server.waiting())
    print(f"{left} duels to decide at {server.address}\nCtrl-C ends; decisions are kept", flush=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        while server.waiting():
            thread.join(0.2)
    except KeyboardInterrupt:
        print(f"\n{len(server.waiting())} duels left; the same command goes on with them")
    finally:
        server.shutdown()
        server.server_close()


def _ranked(names: list[str], results: list[Result]) -> dict[str, Any]:
    duels = [result.wins for result in results if result.wins.sum() > 0]
    if not duels:
        return {}
    beta, low, high = ranking(duels)
    return {
        name: {
            "beta": round(float(beta[n]), 4),
            "low": _rounded(low[n]),
            "high": _rounded(high[n]),
            "photos": len(duels),
        }
        for n, name in sorted(enumerate(names), key=lambda item: -beta[item[0]])
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _mean_rewards(entries: list[tuple[Photo, Entry]], rewards: Mapping[str, Reward]) -> dict[str, float | None]:
    """Means over the valid scores; a reference is not there, so rewards that need one give None."""
    items = [
        Restoration(
            Task(photo.id, from_uint8_hwc(entry.pair.lq), tuple(photo.types.split("|"))), from_uint8_hwc(entry.pair.gt)
        )
        for photo, entry in entries
        if entry.pair is not None
    ]
    means: dict[str, float | None] = {}
    for name, reward in rewards.items():
        scored = reward.score(items)
        means[name] = round(float(scored.value_N[scored.valid_N].mean()), 4) if bool(scored.valid_N.any()) else None
    return means


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: a row a provider, best first where there were duels."""
    ranked = summary["rankings"]["all"]
    rewards = list(next(iter(summary["providers"].values()))["rewards"])
    header = ["provider", "beta", "95 %", "answered", "passes filter", *rewards]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in [*ranked, *(name for name in summary["providers"] if name not in ranked)]:
        row, rank = summary["providers"][name], ranked.get(name)
        cells = [name, str(rank["beta"]) if rank else "-", f"{rank['low']} to {rank['high']}" if rank else "-",
                 str(row["answered"]), str(row["passes_filter"]), *(str(row["rewards"][key]) for key in rewards)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\n{summary.get('photos')} photos, {summary.get('requests')} requests, cost {summary.get('cost')}. beta: "
                 "Bradley-Terry log strength from the VLM's duels, interval by bootstrap over photos.")  # fmt: skip
    for title, rankings in (("Duels by the VLM", summary["rankings"]), ("Duels by people", summary.get("people", {}))):
        lines += _rankings_table(title, {group: ranked for group, ranked in rankings.items() if ranked})
    return "\n".join(lines) + "\n"


def _rankings_table(title: str, rankings: Mapping[str, Any]) -> list[str]:
    """Every group of photos that was judged, best provider first."""
    if not rankings:
        return []
    lines = ["", f"{title}: beta [95 %]", "", "| photos | n | ranking |", "|---|---|---|"]
    for group, ranked in rankings.items():
        told = ", ".join(f"{name} {one['beta']} [{one['low']}, {one['high']}]" for name, one in ranked.items())
        lines.append(f"| {group} | {next(iter(ranked.values()))['photos']} | {told} |")
    return lines
