"""Recipes as text: YAML the way people write it, overrides, and messages that say what is wrong and where."""

from __future__ import annotations

import difflib
import json
import os
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fuyou.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-5 is a number (YAML 1.1 reads text), a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, what: str) -> Any:
    """The plain value that `text` is; ConfigError names `what` and the place."""
    try:
        # _Loader is a SafeLoader: it makes plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        advice = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
        raise ConfigError(f"{what} is not valid YAML{place}: {error.problem}{advice}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one value in nested dictionaries, from "section.key=value"; ConfigError if it is no such text."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected section.key=value")
    target = values
    for depth, key in enumerate(keys[:-1]):
        inner = target.get(key)
        if inner is None:
            inner = target[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[: depth + 1])} is no section but {inner!r}")
        target = inner
    target[keys[-1]] = parse_yaml(text, f"the value of --set {override}")


def read_json(path: str | os.PathLike[str], field: str) -> dict[str, Any]:
    """The object in a JSON file; ConfigError names `field` if it cannot be read or is something else."""
    try:
        value = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{field}={os.fspath(path)!r}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{field}={os.fspath(path)!r}: expected a JSON object, found {type(value).__name__}")
    return value


def explain(error: pydantic.ValidationError, recipe: type[pydantic.BaseModel]) -> list[str]:
    """One line for each wrong place, in the recipe's order; alternatives of one field are put together."""
    lines: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for problem in error.errors():
        path = _dotted(problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines[path] = [_unknown_key(problem["loc"], recipe)]
        elif problem["type"] == "missing":
            lines[path] = [f"{path} is missing{_field_hint(problem['loc'], recipe)}"]
        elif problem["type"] == "value_error":
            message = str(problem["ctx"]["error"])
            lines.setdefault(path, []).append(f"{path}: {message}" if path else message)
        else:
            values[path] = problem["input"]
            lines.setdefault(path, []).append(_expectation(problem))
    # Of the alternatives "text or a list of text", a list with a wrong item is wrong in that item only.
    for path in [path for path in values if any(other.startswith(f"{path}[") for other in values)]:
        del lines[path], values[path]
    return [
        f"{path}={_short(values[path])}: expected {' or '.join(dict.fromkeys(parts))}" if path in values else parts[0]
        for path, parts in lines.items()
    ]


def _sections(recipe: type[pydantic.BaseModel]) -> dict[str, type[pydantic.BaseModel]]:
    found: dict[str, type[pydantic.BaseModel]] = {}
    for name, field in recipe.model_fields.items():
        for kind in (field.annotation, *typing.get_args(field.annotation)):  # a section may be left out
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
                found[name] = kind
    return found


def _known_keys(loc: Sequence[str | int], recipe: type[pydantic.BaseModel]) -> Iterable[str]:
    if not loc:
        return recipe.model_fields
    section = _sections(recipe).get(str(loc[0]))
    return section.model_fields if section is not None else ()


def _dotted(loc: Sequence[str | int]) -> str:
    # pydantic names the alternatives of a union in the location ("store", "list[...]", 0); a recipe has two
    # levels.
    path = ".".join(str(part) for part in loc[:2])
    indices = [part for part in loc[2:] if isinstance(part, int)]
    return path + "".join(f"[{index}]" for index in indices)


def _unknown_key(loc: Sequence[str | int], recipe: type[pydantic.BaseModel]) -> str:
    key, parents = str(loc[-1]), loc[:-1]
    where = "recipe" if not parents else ".".join(str(part) for part in parents)
    full = key if not parents else f"{where}.{key}"
    known = list(_known_keys(parents, recipe))
    elsewhere = [f"{name}.{key}" for name, section in _sections(recipe).items() if key in section.model_fields]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if elsewhere:
        suggestion = f"did you mean '{elsewhere[0]}'?"
    elif near:
        suggestion = f"did you mean '{near[0]}'?"
    else:
        suggestion = f"known here: {', '.join(known)}"
    return f"unknown key '{full}' in recipe: {suggestion}"


def _field_hint(loc: Sequence[str | int], recipe: type[pydantic.BaseModel]) -> str:
    section = _sections(recipe).get(str(loc[0]))
    if section is None:
        return ""
    if len(loc) == 1:
        return f": {section.__doc__}"
    field = section.model_fields.get(str(loc[1]))
    return f": {field.description}" if field is not None and field.description else ""


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list of texts",
    "dict_type": "a section of key: value lines",
    "model_type": "a section of key: value lines",
    "model_attributes_type": "a section of key: value lines",
}


def _expectation(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        return f"one of {context['expected']}"
    words = {
        "greater_than": "above",
        "greater_than_equal": "at least",
        "less_than": "below",
        "less_than_equal": "at most",
    }
    if kind in words:
        limit = next(iter(value for key, value in context.items() if key in ("gt", "ge", "lt", "le")))
        return f"a number {words[kind]} {limit}"
    message: str = problem["msg"]
    return message[0].lower() + message[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
