"""Every key with its meaning and its origin; the JSON schema against all shipped configs; completion in the shell."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import yaml

from rlrestore.build import load_train_config, train_schema
from rlrestore.cli.views import complete_key
from rlrestore.config.explain import as_text, explained, field_docs
from rlrestore.config.files import layers
from rlrestore.config.schema_keys import packaged_schema

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Above:
    # said above,
    # in two lines
    first: int = 1
    second: int = 2  # said behind
    third: tuple[int, ...] = (
        1,
        2,
    )  # behind the last line
    fourth: str = "# not a comment"


@dataclass
class Inherits(Above):
    second: int = 3  # said again


def test_a_comment_above_or_behind_a_field_is_its_meaning():
    assert field_docs(Inherits) == {
        "first": "said above, in two lines", "second": "said again", "third": "behind the last line", "fourth": "",
    }  # fmt: skip


@pytest.fixture
def chain(tmp_path):
    (tmp_path / "mixes").mkdir()
    (tmp_path / "mixes" / "plain.yaml").write_text("rewards: {nss: {weight: 2.0}}")
    (tmp_path / "base.yaml").write_text(
        "run: {name: a, steps: 3}\nenv: {kind: photos}\nrestorer: {kind: embedded}\nalgorithm: {kind: grpo, updates: 1}\n"
        "rewards: {gmsd: {}}\nengine: {lr: 1.0e-3}\n"
    )
    path = tmp_path / "top.yaml"
    path.write_text("base: base.yaml\nmixes: plain\nalgorithm: {kind: nft}\nrun: {steps: 4}\n")
    return path


def test_each_key_says_where_it_comes_from(chain):
    text = explained(load_train_config(chain, ["engine.lr=2e-3"]), chain, ["engine.lr=2e-3"])
    lines = {line.split("#")[0].strip(): line.partition("# ")[2] for line in text.splitlines()}
    base = str(chain.with_name("base.yaml"))
    assert lines["name: a"] == f"{base}: folder under `dir`"
    assert lines["steps: 4"].startswith(str(chain))
    assert lines["lr: 0.002"] == "command line"
    assert lines["kind: nft"] == str(chain)
    assert lines["updates: 1"].startswith("default")  # the base's belonged to grpo
    assert lines["weight: 2.0"].startswith("mixes plain: relative to the other terms of its block")
    assert lines["micro_batch: 16"] == "default: samples of one forward and backward"
    # what is printed is a config that says the same
    again = chain.with_name("again.yaml")
    again.write_text(text)
    assert load_train_config(again) == load_train_config(chain, ["engine.lr=2e-3"])


def test_layers_forget_what_a_mix_replaces(chain):
    found = dict(layers(chain, []))
    assert not any(key.startswith("rewards") for key in found[str(chain.with_name("base.yaml"))])
    assert found["mixes plain"] == {"rewards.nss.weight"}


def test_the_packaged_schema_is_up_to_date():
    assert (ROOT / "rlrestore/config/train.schema.json").read_text() == as_text(train_schema()), (
        "a key or a plug-in has changed: rlrestore schema rlrestore/config/train.schema.json --overwrite"
    )


CONFIGS = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "algorithm" in yaml.safe_load(path.read_text())
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_train_configs_fit_the_schema(config):
    jsonschema.validate(yaml.safe_load(config.read_text()), packaged_schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": {"lrr": 1e-4}}, {"engine": {"lr": "fast"}}, {"algorithm": {"kind": "gpro"}}, {"trainer": {}},
        {"algorithm": {"kind": "nft", "kl_beta": 0.1}}, {"rewards": {"nss": {"wheight": 1}}}, {"rewards": {"a": {"kind": "nsss"}}},
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_program_would(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, packaged_schema())


def test_the_schema_explains_keys():
    lr = packaged_schema()["properties"]["engine"]["properties"]["micro_batch"]
    assert lr == {"type": "integer", "default": 16, "description": "samples of one forward and backward"}
    json.dumps(packaged_schema())


def test_the_shell_completes_keys_and_nothing_after_the_equals_sign():
    assert {"engine.lr=", "engine.grad_clip="} <= set(complete_key("engine."))
    assert "algorithm.beta=" in complete_key("algorithm.b")
    assert complete_key("engine.lr=") == []


def test_completion_imports_nothing_heavy():
    code = "import sys; from rlrestore.cli.views import complete_key; assert complete_key('run.'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
