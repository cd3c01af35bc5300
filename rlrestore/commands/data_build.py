"""`rlrestore data build` and `data review`: pairs from real photos, and a person's decisions about the doubtful ones."""

from __future__ import annotations

import getpass
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from envs.images import decode_rgb
from envs.pipeline.config import ApiSection, BuildConfig, GenerateSection, check_build_config
from envs.pipeline.gemini import GeminiEditor, GeminiVlm
from envs.pipeline.ledger import Ledger
from envs.pipeline.ncnn_models import ncnn_restorer
from envs.pipeline.process import REVIEW, Outcome, Tools, png_of
from envs.pipeline.providers import Editor, LocalEditor, OpenAIEditor, OpenAIVlm, Restore, Vlm
from envs.pipeline.publish import publish, report
from envs.pipeline.review import ReviewServer
from envs.pipeline.run import decided, run
from envs.pipeline.store import BuildFolder
from rlrestore.commands.data_check import open_user_index
from rlrestore.config.files import ConfigError, dump, read_yaml, typed
from rlrestore.errors import InputError

EDITORS: dict[str, Callable[[GenerateSection], Editor]] = {"gemini": GeminiEditor, "openai": OpenAIEditor}
VLMS: dict[str, Callable[[ApiSection], Vlm]] = {"gemini": GeminiVlm, "openai": OpenAIVlm}
STEPS, SAMPLES, TILE, OVERLAP = 8, 4, 256, 64  # of generate.kind=local, as `rlrestore restore` takes them


@dataclass(frozen=True)
class Built:
    """What a run of the command left."""

    outcomes: dict[str, Outcome]  # after people's decisions
    dataset: Path | None  # None while photos await review


def run_build(config_path: Path, overrides: list[str]) -> Built:
    """Bring every photo to its end, then publish, unless some await a person."""
    config = load_build_config(config_path, overrides)
    index = open_user_index(Path(config.build.source), Path(config.build.root) if config.build.root else None)
    with opened(config, dump(config)) as folder:
        ledger = Ledger(folder.calls, folder.blobs, config.budget)
        tools = Tools(ledger, folder.blobs, make_editor(config), make_vlm(config.assess), make_vlm(config.judge))
        try:
            with tqdm(total=len(index), desc="building", unit="photo") as bar:
                found = run(index, config, folder, tools, lambda _: bar.update())
        finally:
            _write_report(folder, {}, ledger)
        outcomes = decided(found, folder)
        _write_report(folder, outcomes, ledger)
        waiting = [item for item in outcomes.values() if item.status == REVIEW]
        print(json.dumps(report(outcomes, ledger), indent=1))
        if waiting:
            print(
                f"\n{len(waiting)} photos await review: rlrestore data review {config_path} {' '.join(overrides)}".rstrip()
            )
            return Built(outcomes, None)
        dataset = publish(outcomes, config, folder, ledger)
    print(f"\ndata set  {dataset}\nto train  env.kind=manifest env.source={dataset}")
    return Built(outcomes, dataset)


def run_review(config_path: Path, overrides: list[str], port: int, reviewer: str | None) -> None:
    """Serve the review page until Ctrl-C, or until nothing is left."""
    config = load_build_config(config_path, overrides)
    with opened(config) as folder:
        found = {record["id"]: Outcome(**record["outcome"]) for record in folder.outcomes.records}
        server = ReviewServer(found, folder, reviewer or getpass.getuser(), port)
        if not server.waiting():
            raise InputError(f"nothing awaits review in {folder.path}: run `rlrestore data build {config_path}`")
        print(
            f"{len(server.waiting())} photos to review at {server.address}\nCtrl-C ends; decisions are kept", flush=True
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"\n{len(server.waiting())} left; `rlrestore data build {config_path}` goes on with the decisions")
        finally:
            server.server_close()


def load_build_config(path: Path, overrides: list[str]) -> BuildConfig:
    config = typed(BuildConfig, read_yaml(path, overrides), {}, str(path))
    try:
        check_build_config(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config


@contextmanager
def opened(config: BuildConfig, text: str = "") -> Iterator[BuildFolder]:
    try:
        folder = BuildFolder(Path(config.build.dir) / config.build.name, text)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        yield folder
    finally:
        folder.close()


def make_editor(config: BuildConfig) -> Editor:
    section = config.generate
    if section.kind == "local":
        return LocalEditor(local_restorer(section.checkpoint))
    if section.kind == "ncnn":
        try:
            return LocalEditor(ncnn_restorer(Path(str(section.checkpoint)), section.downscale))
        except ValueError as error:
            raise InputError(str(error)) from error
    return EDITORS[section.kind](section)


def make_vlm(section: ApiSection) -> Vlm | None:
    """None for the kinds that ask nobody (`fixed`, `none`)."""
    return VLMS[section.kind](section) if section.kind in VLMS else None


def local_restorer(checkpoint: str | None) -> Restore:
    """A restorer of ours as a provider; calls take turns, because they share one model."""
    from rlrestore.commands.restore import load_restorer
    from rlrestore.restorers.restoration import restore_pixels

    restorer, lock = load_restorer(Path(checkpoint) if checkpoint else None), threading.Lock()

    def restore(png: bytes, seed: int) -> bytes:
        pixels = decode_rgb(png, "the photo")
        with lock:
            restored = restore_pixels(
                restorer, pixels, seed=seed, steps=STEPS, samples=SAMPLES, tile=TILE, overlap=OVERLAP
            )
        return png_of(restored)

    return restore


def _write_report(folder: BuildFolder, outcomes: dict[str, Outcome], ledger: Ledger) -> None:
    temporary = folder.path / ".tmp-report.json"
    temporary.write_text(json.dumps(report(outcomes, ledger), indent=1) + "\n")
    os.replace(temporary, folder.path / "report.json")
