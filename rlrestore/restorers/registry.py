"""Restorer families: `kind -> (config dataclass, class)`. One line a family; heavy imports inside the family's file."""

from __future__ import annotations

from rlrestore.restorers.base import Restorer
from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer

RESTORERS: dict[str, tuple[type, type[Restorer]]] = {
    "embedded": (EmbeddedConfig, EmbeddedRestorer),
}
