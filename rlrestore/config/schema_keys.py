"""The keys of a train config from its packaged JSON schema, without importing any plug-in: for completion in the shell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

SCHEMA_FILE = "train.schema.json"  # written by `rlrestore schema`; a test holds that it is up to date


def packaged_schema() -> dict[str, Any]:
    return json.loads(resources.files("rlrestore.config").joinpath(SCHEMA_FILE).read_text("utf-8"))


def dotted_keys(schema: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All keys of a JSON schema that can be given as key=value."""
    found: list[str] = []
    for name, entry in schema.get("properties", {}).items():
        variants = [entry, *(case["then"] for case in entry.get("allOf", ()))]
        inner = [key for variant in variants for key in dotted_keys(variant, f"{prefix}{name}.")]
        found += inner or [f"{prefix}{name}"]
    return list(dict.fromkeys(found))
