"""All envs by name: a literal dict `name -> (config dataclass, env class)`.

An env is built as `env_class(config)`; files are read then, not at import.
"""

from __future__ import annotations

from envs.base import Env
from envs.manifest import ManifestConfig, ManifestEnv
from envs.paired import PairedConfig, PairedEnv
from envs.photos import PhotosConfig, PhotosEnv
from envs.preferences import PreferencesConfig, PreferencesEnv

ENVS: dict[str, tuple[type, type[Env]]] = {
    "manifest": (ManifestConfig, ManifestEnv),
    "paired": (PairedConfig, PairedEnv),
    "photos": (PhotosConfig, PhotosEnv),
    "preferences": (PreferencesConfig, PreferencesEnv),
}
