"""The accepted pairs as a data set: images, a manifest that env `manifest` reads, provenance of every image, statistics, a card."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from envs.pipeline.config import BuildConfig
from envs.pipeline.ledger import Ledger
from envs.pipeline.process import ACCEPTED, Outcome
from envs.pipeline.run import counts
from envs.pipeline.store import BuildFolder


def publish(outcomes: dict[str, Outcome], config: BuildConfig, folder: BuildFolder, ledger: Ledger) -> Path:
    """`dataset/` below the build, whole or not at all; one that is there is replaced by the new one. Returns its path."""
    target, new, old = (folder.path / name for name in ("dataset", ".tmp-dataset", ".old-dataset"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    accepted = [outcomes[name] for name in sorted(outcomes) if outcomes[name].status == ACCEPTED]
    rows, provenance = [], []
    for item in accepted:
        files = {role: f"{role.upper()}/{item.id}.png" for role in ("lq", "gt")}
        for role, name in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(folder.blobs.get(getattr(item, role)))
        rows.append({
            "id": item.id, **files, "types": item.types, "prompt": item.prompt, "licence": item.licence,
            "source": item.source, "gt_kind": "generated", "sha256_lq": item.lq, "sha256_gt": item.gt,
        })  # fmt: skip
        provenance.append({
            "id": item.id, "source": item.source, "licence": item.licence, "generator": config.generate.model or config.generate.kind,
            "assessor": config.assess.model, "judge": config.judge.model, "rounds": item.rounds,
        })  # fmt: skip
    new.mkdir(exist_ok=True)
    statistics = report(outcomes, ledger)
    _write_lines(new / "manifest.jsonl", rows)
    _write_lines(new / "provenance.jsonl", provenance)
    (new / "statistics.json").write_text(json.dumps(statistics, indent=1) + "\n")
    (new / "README.md").write_text(card(accepted, config, statistics))
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def report(outcomes: dict[str, Outcome], ledger: Ledger) -> dict[str, Any]:
    """Counts by stage and reason, and what was paid."""
    accepted = sum(item.status == ACCEPTED for item in outcomes.values())
    kinds = Counter(
        (item.stage, part.split(" ")[0].rstrip(":")) for item in outcomes.values() if item.status == "rejected"
        for part in item.reason.split("; ")
    )  # fmt: skip
    return {
        "photos": len(outcomes),
        "outcomes": [[status, stage, n] for (status, stage), n in sorted(counts(outcomes).items())],
        "reasons": [[stage, kind, n] for (stage, kind), n in kinds.most_common(40)],
        "accepted_by_type": dict(sorted(Counter(i.types for i in outcomes.values() if i.status == ACCEPTED).items())),
        "requests": ledger.requests,
        "tokens_in": ledger.tokens_in,
        "tokens_out": ledger.tokens_out,
        "cost": round(ledger.cost, 6),
        "cost_per_accepted": round(ledger.cost / accepted, 6) if accepted else None,
    }


def card(accepted: list[Outcome], config: BuildConfig, statistics: dict[str, Any]) -> str:
    licences = Counter(item.licence for item in accepted)
    lines = [
        f"# {config.build.name}",
        "",
        f"{len(accepted)} pairs of real low-quality photographs and *generated* targets, built with `rlrestore data build`.",
        "A score against these targets measures closeness to one generator's taste.",
        "",
        f"Generator: {config.generate.model or config.generate.kind}. Prompts: {config.assess.model or 'fixed'}. "
        f"Judge: {config.judge.model or 'none'}.",
        f"Of {statistics['photos']} photos: "
        + ", ".join(f"{n} {s} {t}".strip() for s, t, n in statistics["outcomes"])
        + ".",
        f"Cost {statistics['cost']:g} in {statistics['requests']} requests.",
        "",
        "| licence of the photo | pairs |",
        "|---|---|",
        *(f"| {licence.replace('|', '/')} | {n} |" for licence, n in sorted(licences.items())),
        "",
        "`manifest.jsonl` names source and licence of each photo, `provenance.jsonl` every candidate with its measurements and",
        "verdicts. Whether the targets may be passed on depends on the generator's terms as well.",
    ]
    return "\n".join(lines) + "\n"


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
