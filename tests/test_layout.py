"""The repository's rules about itself, read from the files without importing them (only the configs are really loaded).

Each rule is a function from source text to complaints, so that the end of this file can show it a wrong snippet and see
it complain. A complaint names the file, the line and what to do instead.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("envs", "rewards", "rlrestore")

TOP_LEVEL_FOLDERS = {".ci", "configs", "docs", "envs", "rewards", "rlrestore", "scripts", "tests"}

# What each package may import of ours: itself, and what lies below it.
MAY_IMPORT = {
    "envs": ("envs",),
    "rewards": ("rewards", "envs.types"),
    "rlrestore": ("rlrestore", "rewards", "envs"),
}
OURS = (*PACKAGES, "scripts", "tests")

# Heavy frameworks and the only files (by prefix) that may import them.
ONLY_IN = {"ray": "rlrestore/actors", "deepspeed": "rlrestore/engine"}

# The dicts of plug-ins, and what their kinds are called in a config.
REGISTRIES = {"ALGORITHMS": "algorithm", "ENVS": "env", "RESTORERS": "restorer", "REWARDS": "rewards"}
KNOWS_ALL_FAMILIES = "rlrestore/build.py"

# Plug-ins that no shipped config uses, each with the reason. Keep it short: a config is the best documentation.
WITHOUT_CONFIG: dict[str, str] = {
    **dict.fromkeys(
        ("flux2_klein", "flux_controlnet", "ldm_sr", "qwen_image_edit_plus", "sd_upscale"),
        "opened as its neighbours in docs/families.md are, and there is no published RL setting to write down",
    ),
    "anchored": "needs a head that somebody trained with configs/judges/anchor.yaml; docs/judges.md shows the lines",
}

NOT_LOCKED = {"face", "track"}  # extras that `make` does not install

ENTRY_MODULES = {"rewards.ll_score.infer", "rlrestore.__main__"}  # besides the console scripts of pyproject.toml


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported module, absolute: `from envs.types import Task` -> envs.types."""

    module: str
    line: int


def repository_files(*, tracked_only: bool = False) -> list[Path]:
    """Paths relative to the root of what belongs to the repository; outside git (a tarball), of all that is there."""
    command = ["git", "ls-files", "-z", *([] if tracked_only else ["--cached", "--others", "--exclude-standard"])]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [Path(name) for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.parts[len(ROOT.parts)] in TOP_LEVEL_FOLDERS]
    return sorted(path for path in files if (ROOT / path).is_file() and "__pycache__" not in path.parts)


def sources(*folders: str) -> dict[str, str]:
    """Relative path -> text of the Python files under `folders`."""
    return {
        path.as_posix(): (ROOT / path).read_text(encoding="utf-8")
        for path in repository_files()
        if path.suffix == ".py" and path.parts[0] in folders
    }


@functools.cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(source)))


def module_name(file: str) -> str:
    """envs/photos.py -> envs.photos; envs/__init__.py -> envs."""
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def our_modules(files: Mapping[str, str]) -> set[str]:
    return {module_name(file) for file in files}


def imports(file: str, source: str, modules: set[str]) -> Iterator[Import]:
    """Every import of a file, inside functions and by `import_module("literal")` too.

    `from a import b` is an import of a.b where that is a module of ours (`modules`), else of a.
    """
    package = module_name(file) if file.endswith("__init__.py") else module_name(file).rpartition(".")[0]
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(package, node.level, node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in modules else base, node.lineno)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(name.value, node.lineno)


def _absolute(package: str, level: int, module: str | None) -> str:
    if level == 0:
        return module or ""
    base = package.split(".")[: len(package.split(".")) - (level - 1)]
    return ".".join([*base, module] if module else base)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def registries(files: Mapping[str, str]) -> dict[str, tuple[str, ast.expr]]:
    """Registry name -> (file, the expression that it is assigned), from module-level assignments."""
    found = {}
    for file, source in files.items():
        for node in ast.parse(source, file).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name) and target.id in REGISTRIES and getattr(node, "value", None):
                    found[target.id] = (file, node.value)  # type: ignore[attr-defined]
    return found


def plugin_names(expression: ast.expr) -> list[str]:
    """The keys of a literal dict, or [] if it is anything else."""
    if not isinstance(expression, ast.Dict):
        return []
    keys = [key.value for key in expression.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return keys if len(keys) == len(expression.keys) else []


def plugins() -> list[tuple[str, str]]:
    """(registry, plug-in) for every plug-in that the repository has."""
    found = registries(sources(*PACKAGES))
    return [(registry, name) for registry in sorted(found) for name in plugin_names(found[registry][1])]


# --- rules ------------------------------------------------------------------------------------------------------------


def wrong_directions(file: str, source: str, modules: set[str]) -> list[str]:
    package = Path(file).parts[0]
    allowed = MAY_IMPORT[package]
    return [
        f"{file}:{found.line} imports {found.module}; of ours, {package} may import only {', '.join(allowed)}. "
        "Move what both need down a layer, or pass it in as an argument"
        for found in imports(file, source, modules)
        if found.module.split(".")[0] in OURS and not any(_within(found.module, prefix) for prefix in allowed)
    ]


def misplaced_frameworks(file: str, source: str) -> list[str]:
    return [
        f"{file}:{found.line} imports {found.module}; {framework} belongs in {prefix}* alone, as a thin wrapper around "
        "a plain class, so that everything else runs in one process"
        for framework, prefix in ONLY_IN.items()
        for found in imports(file, source, set())
        if _within(found.module, framework) and not file.startswith(prefix)
    ]


def families_known(source: str) -> set[str]:
    """The registries that a module touches, as `from x import NAME` or `x.NAME`."""
    imported = {alias.name for node in nodes(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    attributes = {node.attr for node in nodes(source) if isinstance(node, ast.Attribute)}
    return (imported | attributes) & REGISTRIES.keys()


def untidy_registry(registry: str, file: str, expression: ast.expr) -> list[str]:
    names = plugin_names(expression)
    if not names:
        return [f"{file}: {registry} must be a literal dict with string keys, one line each, for the eye and for grep"]
    if names != sorted(names):
        return [f"{file}: {registry} is not sorted; the order should be {', '.join(sorted(names))}"]
    return []


def orphans(files: Mapping[str, str], entry_modules: set[str]) -> list[str]:
    """Modules of the packages that nothing imports; `__init__` files are there for their folder.

    That a test imports a module does not make it used, but for the conformance checks (`check.py`): they are for tests,
    ours and those of third parties' plug-ins.
    """
    modules = our_modules(files)
    imported = {
        found.module
        for file, source in files.items()
        for found in imports(file, source, modules)
        if not file.startswith("tests/") or found.module.endswith(".check")
    }
    # A module run as a process of its own is named in a string: [sys.executable, "-m", "rewards.serve"].
    run = {
        node.value
        for file, source in files.items()
        for node in nodes(source)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not file.startswith("tests/")
    }
    return [
        f"{file} is imported by nobody; use it, delete it, or name it as an entry point"
        for file in files
        if Path(file).parts[0] in PACKAGES
        and not file.endswith("__init__.py")
        and module_name(file) not in imported | run | entry_modules
    ]


def names_a_private_place(file: str, text: str) -> list[str]:
    """Paths that exist on one machine only: beside the checkout, or somebody's home."""
    pattern = re.compile(r"""(?:^|[\s"'=(`])(\.\./sha""" + r"""red|/(?:ro""" + r"""ot|ho""" + r"""me)/)""")
    return [
        f"{file}:{number} names {match.group(1)}, a place outside the repository; say it here or pass it as an argument"
        for number, line in enumerate(text.splitlines(), start=1)
        for match in pattern.finditer(line)
    ]


def kinds_used(config: Any) -> set[tuple[str, str]]:
    """(section, kind) of the plug-ins that a config uses; a reward term's kind is its name unless it says otherwise."""
    if not isinstance(config, Mapping):
        return set()
    sections = {name: config.get(name) or {} for name in ("algorithm", "env", "restorer")}
    used = {(name, str(section["kind"])) for name, section in sections.items() if "kind" in section}
    for terms in (config.get("rewards"), (config.get("evaluate") or {}).get("gold")):
        used |= {("rewards", str((term or {}).get("kind", name))) for name, term in (terms or {}).items()}
    return used


def documented(name: str, docs: Sequence[str]) -> bool:
    """Whether a table row of some page starts with the plug-in's name in backticks."""
    row = re.compile(rf"^\|[^|]*`{re.escape(name)}`[^|]*\|", flags=re.MULTILINE)
    return any(row.search(text) for text in docs)


# --- the repository keeps them ----------------------------------------------------------------------------------------


def none_of(complaints: Sequence[str]) -> None:
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    modules = our_modules(sources(*OURS))
    files = sources(package)
    assert files, f"no Python file in {package}/"
    none_of([line for file, source in files.items() for line in wrong_directions(file, source, modules)])


def test_env_types_is_the_lowest_layer() -> None:
    source = (ROOT / "envs/types.py").read_text()
    found = [i.module for i in imports("envs/types.py", source, set())]
    none_of([module for module in found if module.split(".")[0] in OURS])


def test_ray_and_deepspeed_stay_in_their_rooms() -> None:
    none_of([line for file, source in sources(*PACKAGES).items() for line in misplaced_frameworks(file, source)])


def test_only_build_knows_all_families() -> None:
    known = {file: families_known(source) for file, source in sources(*PACKAGES).items()}
    # rewards have third-party entries too, so they are built through `rewards.registry.build_reward`
    assert known.get(KNOWS_ALL_FAMILIES) == set(REGISTRIES) - {"REWARDS"}, (
        f"{KNOWS_ALL_FAMILIES} is where registries meet"
    )
    curious = {file: names for file, names in known.items() if len(names) > 1 and file != KNOWS_ALL_FAMILIES}
    assert not curious, f"ask {KNOWS_ALL_FAMILIES} instead of looking into several registries: {curious}"


def test_registries_are_sorted_literal_dicts() -> None:
    found = registries(sources(*PACKAGES))
    assert found.keys() == REGISTRIES.keys()
    none_of([line for name, (file, value) in found.items() for line in untidy_registry(name, file, value)])


def test_only_three_packages_are_installed() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    installed = {name.split(".")[0] for name in find_packages(str(ROOT), include=find["include"])}
    assert installed == set(PACKAGES)


def test_every_folder_of_a_package_has_an_init() -> None:
    folders = {Path(file).parent for file in sources(*PACKAGES)}
    missing = [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()]
    assert not missing, f"add __init__.py, or the wheel leaves these folders out: {missing}"


def test_no_module_is_imported_by_nobody() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entries = ENTRY_MODULES | {target.partition(":")[0] for target in scripts.values()}
    none_of(orphans(sources(*PACKAGES, "scripts", "tests"), entries))


def test_top_level_folders() -> None:
    found = {path.parts[0] for path in repository_files(tracked_only=True) if len(path.parts) > 1}
    assert not found - TOP_LEVEL_FOLDERS, "put it into a folder that docs/architecture.md names, or change both"


def test_no_file_names_a_private_place() -> None:
    complaints = []
    for path in repository_files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:8192]:
            complaints += names_a_private_place(path.as_posix(), data.decode("utf-8", errors="replace"))
    none_of(complaints)


def test_lock_fits_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra, listed in project["optional-dependencies"].items() if extra not in NOT_LOCKED for r in listed),
    ]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith(("#", "-c ")))
    unmet = []
    for text in wanted:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name not in pins or not requirement.specifier.contains(pins[name], prereleases=True):
            unmet.append(f"{text} (locked: {pins.get(name)})")
    assert not unmet, f"run `make lock`: {unmet}"
    assert not [version for version in pins.values() if "+" in version], "a local version fits one machine only"


CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert "configs/quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_config_loads(config: str) -> None:
    from rlrestore.build import load_finetune_config, load_train_config
    from rlrestore.commands.data_build import load_build_config
    from rlrestore.commands.data_compare import load_compare_config
    from rlrestore.commands.evaluate_sets import read_config as read_protocol
    from rlrestore.judging.train import load_judge_config
    from rlrestore.sweeps.sweep import load_sweep

    sections = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))
    if config.startswith("configs/mixes/"):
        assert load_train_config(ROOT / "configs/quickstart.yaml", [f"mixes={Path(config).stem}"]).rewards
        return
    if "sweep" in sections:
        sweep = load_sweep(ROOT / config)
        for trials in sweep.points.values():
            load_train_config(sweep.train, trials[0].overrides)
        return
    if "base" in sections:  # what it is may be said there
        below = (ROOT / config).parent / sections["base"]
        sections = {**yaml.safe_load(below.read_text(encoding="utf-8")), **sections}
    if "compare" in sections:
        assert load_compare_config(ROOT / config, [])[0].compare.name
        return
    if "build" in sections:
        assert load_build_config(ROOT / config, []).build.name
        return
    if "sets" in sections:
        assert read_protocol(ROOT / config, sections)[0].protocol.name
        return
    loaders = {"algorithm": load_train_config, "judge": load_judge_config}
    load = next((loader for section, loader in loaders.items() if section in sections), load_finetune_config)
    loaded = load(ROOT / config)
    assert loaded.run.name, f"{config}: run.name says where the run is written"


@pytest.mark.parametrize(("registry", "name"), plugins())
def test_every_plugin_has_a_row_in_the_docs(registry: str, name: str) -> None:
    docs = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    assert documented(name, docs), f"add a table row that begins with `{name}` to a page in docs/ ({registry})"


@pytest.mark.parametrize(("registry", "name"), plugins())
def test_every_plugin_has_a_config(registry: str, name: str) -> None:
    used = {kind for config in CONFIGS for kind in kinds_used(yaml.safe_load((ROOT / config).read_text()))}
    section = REGISTRIES[registry]
    assert (section, name) in used or name in WITHOUT_CONFIG, (
        f"no file in configs/ uses {section} '{name}'; add one, or give the reason in WITHOUT_CONFIG"
    )


def test_exemptions_are_needed() -> None:
    names = {name for _, name in plugins()}
    assert not WITHOUT_CONFIG.keys() - names, "remove from WITHOUT_CONFIG what is no plug-in any more"


# --- the rules can fail -----------------------------------------------------------------------------------------------

MODULES = {"envs", "envs.types", "envs.photos", "rewards", "rewards.base", "rlrestore", "rlrestore.loop"}


@pytest.mark.parametrize(
    ("file", "source", "line"),
    [
        ("envs/photos.py", "import rewards", 1),
        ("envs/photos.py", "def f():\n    from rlrestore.loop import train", 2),
        ("envs/photos.py", "import tests.conftest", 1),
        ("rewards/base.py", "from envs import photos", 1),
        ("rewards/base.py", "from envs import Task", 1),  # through the package: it would run every env's module
        ("rewards/base.py", "import importlib\nimportlib.import_module('rlrestore.loop')", 2),
        ("rlrestore/loop.py", "from scripts import bench_loop", 1),
    ],
)
def test_a_wrong_arrow_is_seen(file: str, source: str, line: int) -> None:
    complaints = wrong_directions(file, source, MODULES)
    assert len(complaints) == 1
    assert complaints[0].startswith(f"{file}:{line} ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("envs/photos.py", "from . import types\nfrom .types import Task\nimport numpy"),
        ("rewards/base.py", "from envs.types import Task\nfrom envs import types\nimport rewards_of_others"),
        ("rlrestore/loop.py", "import envs.photos\nfrom rewards import base\nfrom . import loop"),
    ],
)
def test_a_right_arrow_is_let_through(file: str, source: str) -> None:
    assert wrong_directions(file, source, MODULES) == []


def test_relative_imports_are_resolved() -> None:
    # In rewards/iqa/__init__.py one dot is rewards.iqa itself; in rewards/iqa/metric.py two dots are rewards.
    in_package = imports("rewards/iqa/__init__.py", "from .metric import m", MODULES)
    in_module = imports("rewards/iqa/metric.py", "from .. import base", MODULES)
    assert [i.module for i in in_package] == ["rewards.iqa.metric"]
    assert [i.module for i in in_module] == ["rewards.base"]


def test_a_misplaced_framework_is_seen() -> None:
    both = "def f():\n    import ray.util\n    from deepspeed import zero"
    assert len(misplaced_frameworks("rlrestore/loop.py", both)) == 2
    assert misplaced_frameworks("rlrestore/actors/ranks.py", "import ray") == []
    assert misplaced_frameworks("rlrestore/engine_deepspeed.py", "import deepspeed") == []
    assert len(misplaced_frameworks("rlrestore/engine/zero.py", "import ray, deepspeed")) == 1
    assert misplaced_frameworks("rlrestore/loop.py", "import rayleigh") == []


def test_registries_are_recognised() -> None:
    assert families_known("from envs import ENVS\nimport rewards\nrewards.REWARDS['x']") == {"ENVS", "REWARDS"}
    found = registries({"envs/__init__.py": "ENVS: dict[str, type] = {'b': 1, 'a': 2}"})
    file, value = found["ENVS"]
    assert plugin_names(value) == ["b", "a"]
    assert "not sorted" in untidy_registry("ENVS", file, value)[0]
    assert "literal dict" in untidy_registry("ENVS", file, ast.parse("scan('envs')", mode="eval").body)[0]


def test_an_orphan_is_seen() -> None:
    files = {
        "envs/__init__.py": "from envs.types import Task",
        "envs/types.py": "",
        "envs/forgotten.py": "import envs.types",
        "rewards/serve.py": "",
        "envs/check.py": "",
        "tests/test_envs.py": "import envs.check, envs.forgotten",
        "scripts/start.py": "command = ['python', '-m', 'rewards.serve']",
    }
    assert [line.split()[0] for line in orphans(files, set())] == ["envs/forgotten.py"]
    assert orphans(files, {"envs.forgotten"}) == []


def test_a_private_place_is_seen() -> None:
    assert names_a_private_place("a.md", "see `.." + "/shared/x`")
    assert names_a_private_place("a.py", "p = '/ho" + "me/me/photos'")
    assert names_a_private_place("a.md", "shared/x and runs/home/x") == []


def test_kinds_are_found_in_a_config() -> None:
    config = yaml.safe_load("""
        env: {kind: photos}
        rewards: {sharp: {kind: nss, weight: 1}, lowfreq: null}
        evaluate: {gold: {ssim_rgb: {}}}
    """)
    rewards = {("rewards", "nss"), ("rewards", "lowfreq"), ("rewards", "ssim_rgb")}
    assert kinds_used(config) == {("env", "photos"), *rewards}


def test_a_row_in_the_docs_is_found() -> None:
    assert documented("nft", ["| method | paper |\n|---|---|\n| `nft` | 2509.16117 |"])
    assert not documented("nft", ["`nft` is a method", "| `nftx` | |", "| see | `nft` |"])
