"""A build from photos to outcomes: collects, sends photos through `process` several at once, and can be cut off anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

from envs.audit import NEAR
from envs.images import decode_rgb
from envs.index import Index
from envs.inspection import perceptual_hash
from envs.pipeline.config import BuildConfig
from envs.pipeline.process import DEFERRED, REJECTED, Outcome, Photo, Tools, ingest, process, with_decision
from envs.pipeline.store import BuildFolder, digest_of
from envs.sources.blobs import shown
from envs.sources.rows import Row

# Keys that change no outcome: a build may go on with other values.
FREE = frozenset({
    "api_key_env", "concurrency", "dir", "name", "price_in", "price_out", "price_request", "requests_per_minute", "retries", "root",
    "source", "timeout_s",
})  # fmt: skip


def run(
    index: Index, config: BuildConfig, folder: BuildFolder, tools: Tools, progress: Callable[[Outcome], object] = lambda _: None
) -> dict[str, Outcome]:  # fmt: skip
    """Outcomes of all photos by id; those that an earlier run has decided are not done again.

    The first error that ends a run (budget, key, a bug) is raised after the photos under way have come to their end.
    """
    version = outcome_version(config)
    known = {
        record["id"]: Outcome(**record["outcome"])
        for record in folder.outcomes.records
        if record["version"] == version and record["outcome"]["status"] != DEFERRED
    }
    seen: dict[int, str] = {}
    pending: set[Future[Outcome]] = set()
    stop: BaseException | None = None
    with ThreadPoolExecutor(config.build.concurrency) as pool:

        def collect(done: set[Future[Outcome]]) -> None:
            nonlocal stop
            for future in done:
                if future.exception() is not None:
                    stop = stop or future.exception()
                    continue
                outcome = future.result()
                known[outcome.id] = outcome
                folder.outcomes.append({"id": outcome.id, "version": version, "outcome": asdict(outcome)})
                progress(outcome)

        for item in photos(index, config, seen):
            if item.id in known:
                progress(known[item.id])
                continue
            if isinstance(item, Outcome):
                known[item.id] = item
                folder.outcomes.append({"id": item.id, "version": version, "outcome": asdict(item)})
                progress(item)
                continue
            pending.add(pool.submit(process, item, config, tools))
            if len(pending) >= 2 * config.build.concurrency:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                collect(done)
            if stop is not None:
                break
        collect(wait(pending).done)
    if stop is not None:
        raise stop
    return known


def photos(index: Index, config: BuildConfig, seen: dict[int, str]) -> Iterator[Photo | Outcome]:
    """Each row as a photo to send, or as the outcome that it is not sent: unreadable, small, twin, without licence."""
    for row in index:
        try:
            yield _photo(index, row, config, seen)
        except ValueError as error:
            yield Outcome(row.id, REJECTED, str(error), stage="ingest", types=row.types, source=row.source)


def _photo(index: Index, row: Row, config: BuildConfig, seen: dict[int, str]) -> Photo:
    licence = row.licence or config.build.licence
    if not licence:
        raise ValueError("no licence is known: give the row one, or set build.licence")
    png = ingest(shown(row.lq), index.blobs.read(row.lq), config)
    own = perceptual_hash(decode_rgb(png, row.id))
    twin = next((name for other, name in seen.items() if (own ^ other).bit_count() <= NEAR), None)
    if twin is not None:
        raise ValueError(f"shows the same as {twin}")
    seen[own] = row.id
    return Photo(row.id, png, row.types, licence, row.source)


def outcome_version(config: BuildConfig) -> str:
    """Digest of all that an outcome depends on besides the photo."""
    sections = {name: section for name, section in vars(config).items() if name != "budget"}
    return digest_of({
        name: {key: value for key, value in vars(section).items() if key not in FREE} for name, section in sections.items()
    })  # fmt: skip


def decided(outcomes: dict[str, Outcome], folder: BuildFolder) -> dict[str, Outcome]:
    """Outcomes after the people's decisions."""
    latest = latest_decisions(folder)
    return {name: with_decision(outcome, latest.get((name, outcome.gt))) for name, outcome in outcomes.items()}


def latest_decisions(folder: BuildFolder) -> dict[tuple[str, str], dict[str, Any]]:
    """(photo, candidate's blob) -> the last decision, unless it was taken back. A new candidate needs a new decision."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for record in folder.decisions.records:
        key = (record["id"], record["gt"])
        latest.pop(key, None)
        if record["verdict"] != "undo":
            latest[key] = record
    return latest


def counts(outcomes: dict[str, Outcome]) -> Counter[tuple[str, str]]:
    """(status, stage) -> photos."""
    return Counter((item.status, item.stage if item.status == REJECTED else "") for item in outcomes.values())
