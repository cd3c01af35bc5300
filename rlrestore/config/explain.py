"""What a config says, where each value comes from, and what each key means; and the same as a JSON schema for editors.

The meaning of a key is the comment beside its field in the dataclass, so that it is written once.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from rlrestore.config.files import Plugin, PluginSchemas, layers, plain

PRINT_WIDTH = 48  # column where comments begin
MIXES = {"description": "reward mixes by name (docs/experiments.md)", "type": ["string", "array", "object"]}


def field_docs(schema: Any) -> Mapping[str, str]:
    """Field -> its comment: the lines right above it, then what stands behind it. Inherited fields included."""
    docs: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if dataclasses.is_dataclass(owner):
            docs |= _own_docs(owner)
    return docs


def _own_docs(schema: Any) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    code = {token.start[0] for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)}
    docs = {}
    definition = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            line = node.lineno - 1
            while line in comments and line not in code:
                above.insert(0, comments[line])
                line -= 1
            behind = [comments[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
            docs[node.target.id] = " ".join([*above, *behind])
    return docs


# -- print-config ------------------------------------------------------------------------------------------------------


def explained(config: Any, path: Path, overrides: Sequence[str]) -> str:
    """The resolved config as YAML, a comment a key: where the value comes from, then what it means."""
    origin = {key: source for source, keys in layers(path, overrides) for key in keys}
    lines: list[str] = []
    _explain(lines, config, "", origin)
    return "\n".join(lines)


def _explain(lines: list[str], config: Any, prefix: str, origin: Mapping[str, str]) -> None:
    inner = config.config if isinstance(config, Plugin) else config
    indent = "  " * prefix.count(".")
    if isinstance(config, Plugin):
        lines.append(_line(f"{indent}kind: {config.kind}", origin.get(f"{prefix}kind", "default"), ""))
    if isinstance(inner, Mapping):
        items, docs = list(inner.items()), {}
    elif hasattr(inner, "term"):  # a gate or a constraint: its term's keys stand among its own
        items, docs = list(plain(inner).items()), {**field_docs(type(inner.term)), **field_docs(type(inner))}
    else:
        hidden = (
            ("name", "role") if type(inner).__name__ == "TermConfig" else ()
        )  # they follow from where the term stands
        items = [(f.name, getattr(inner, f.name)) for f in dataclasses.fields(inner) if f.name not in hidden]
        docs = dict(field_docs(type(inner)))
    for name, value in items:
        key = f"{prefix}{name}"
        holds_keys = (
            isinstance(value, Plugin) or dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and value)
        )
        if holds_keys:
            lines.append(f"{indent}{name}:")
            _explain(lines, value, f"{key}.", origin)
        else:
            shown = yaml.safe_dump(plain(value), default_flow_style=True, width=10**6).strip().removesuffix("\n...")
            source = origin.get(key) or next((origin[k] for k in origin if k.startswith(f"{key}.")), "default")
            lines.append(_line(f"{indent}{name}: {shown}", source, docs.get(name, "")))


def _line(text: str, source: str, meaning: str) -> str:
    return f"{text:<{PRINT_WIDTH}}  # {source}{': ' if meaning else ''}{meaning}"


# -- JSON schema -------------------------------------------------------------------------------------------------------


def json_schema(
    schema: type, plugins: PluginSchemas, term: type, term_kinds: Sequence[str], title: str
) -> dict[str, Any]:
    """Draft 7. Sections are open to being left out, because a file is sparse and may stand on a `base`; unknown keys are errors."""
    hints, guards = get_type_hints(schema), {}
    one_term = _object(term, {"kind": {"enum": sorted(term_kinds)}})
    terms = {"type": "object", "additionalProperties": {"anyOf": [one_term, {"type": "null"}]}}
    for guard in ("constraints", "gates"):
        if guard in hints:
            guards[guard] = {"type": "object", "additionalProperties": {"type": ["object", "null"]}}
    properties: dict[str, Any] = {"base": {"type": "string", "description": "the config that this one is laid over"}}
    if "rewards" in hints:
        properties["mixes"] = MIXES
    for name, hint in hints.items():
        if name in plugins:
            properties[name] = _plugin(plugins[name])
        elif name == "rewards":
            properties[name] = terms
        elif name in guards:
            properties[name] = guards[name]
        else:
            properties[name] = _type(hint, term)
    if "evaluate" in properties and "gold" in properties["evaluate"].get("properties", {}):
        properties["evaluate"]["properties"]["gold"] = terms
    return {
        "$schema": "http://json-schema.org/draft-07/schema#", "title": title, "type": "object", "properties": properties,
        "additionalProperties": False,
    }  # fmt: skip


def _plugin(kinds: Mapping[str, type]) -> dict[str, Any]:
    """Which keys are known depends on `kind`; without one (it stands in the base) any is."""
    cases = [
        {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": _object(schema, {"kind": {}})}
        for kind, schema in sorted(kinds.items())
    ]
    return {"type": "object", "properties": {"kind": {"enum": sorted(kinds)}}, "allOf": cases}


def _object(schema: type, more: Mapping[str, Any]) -> dict[str, Any]:
    docs, hints = field_docs(schema), get_type_hints(schema)
    properties: dict[str, Any] = {}
    for item in dataclasses.fields(schema):
        entry = _type(hints[item.name], None)
        if docs.get(item.name):
            entry["description"] = docs[item.name]
        if isinstance(item.default, bool | int | float | str) and item.default != "???":
            entry["default"] = item.default
        properties[item.name] = entry
    return {"type": "object", "properties": {**properties, **more}, "additionalProperties": False}


def _type(hint: Any, term: type | None) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type(part, term) for part in arguments]}
    if origin in (tuple, list, Sequence) or hint in (tuple, list):
        return {"type": "array"}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _object(hint, {})
    simple = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    if hint in simple:
        return {"type": simple[hint]}
    return {"type": "object"} if origin in (dict, Mapping) else {}


def as_text(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
