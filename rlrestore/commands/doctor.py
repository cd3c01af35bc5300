"""`rlrestore doctor`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlrestore import doctor
from rlrestore.actors import before_ray
from rlrestore.build import build_env, build_restorer, build_term, load_train_config
from rlrestore.config.sections import RayConfig, all_terms
from rlrestore.doctor import FAIL, OK, WARN, Finding
from rlrestore.errors import ClusterError
from rlrestore.quiet import quiet

MARKS = {OK: "  ", WARN: "! ", FAIL: "X "}


def run_doctor(
    config_path: Path | None, overrides: Sequence[str], address: str | None, fast: bool, as_json: bool, limit_s: float
) -> None:
    """Print all findings; ClusterError if a run would not start."""
    quiet()
    config = load_train_config(config_path, overrides) if config_path else None
    ray_config = config.ray if config else RayConfig()
    findings = [
        *doctor.python_version(),
        *doctor.packages(),
        *doctor.compiler(),
        *doctor.gpus(),
        *doctor.disk(Path(config.run.dir if config else "runs")),
        *doctor.shared_memory(ray_config.object_store_mb),
        *doctor.open_files(),
        *doctor.token_file(),
    ]
    if config:
        terms = all_terms(config).items()
        makers = [("restorer", lambda: build_restorer(config.restorer)), ("env", lambda: build_env(config.env))]
        findings += doctor.parts(
            [*makers, *((f"metric {name}", lambda term=term: build_term(term)) for name, term in terms)]
        )
    if not fast:
        address = address or ray_config.address
        before_ray(address)
        from rlrestore.actors.doctor import check_ray

        findings += check_ray(address, limit_s)
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else table(findings))
    if broken := [finding.name for finding in findings if finding.status == FAIL]:
        raise ClusterError(f"a run would not start here: {', '.join(broken)}; the remedies stand above")


def table(findings: Sequence[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.status]}{finding.name:{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"  {'':{width}}  -> {finding.remedy}")
    return "\n".join(lines)
