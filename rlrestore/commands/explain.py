"""`rlrestore train --print-config` and `rlrestore schema`: what a config may say, and what it says."""

from __future__ import annotations

from pathlib import Path

from rlrestore.build import load_train_config, train_schema
from rlrestore.config.errors import ConfigError
from rlrestore.config.explain import as_text, explained


def print_explained(path: Path, overrides: list[str]) -> None:
    print(explained(load_train_config(path, overrides), path, overrides))


def write_schema(target: Path | None, overwrite: bool) -> None:
    """To the terminal, or to a file."""
    text = as_text(train_schema())
    if target is None:
        print(text, end="")
        return
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already: add --overwrite to replace it")
    target.write_text(text)
    print(f"schema       {target}")
