"""What tells one model's architecture from another's: a fingerprint, and the settings that differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

_NOT_SHAPING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache")
_MOST_NAMED = 3
_MOST_CHARACTERS = 60


def fingerprint(config: Any, model_class: str) -> str:
    """Identifies an architecture: a hash of the model's class and config without what does not shape the weights."""
    text = json.dumps({"class": model_class, "config": _shaping(config.to_dict())}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(description: Any, config: Mapping[str, Any], model_class: str) -> str:
    """The first settings in which the model that a store describes is another than this one, to be put behind its name:
    "; hidden_size is 8 there and 16 here". "" where the classes differ, which says it already.

    `config` is this model's in strict JSON's types, as the store's is; the description may be hostile.
    """
    if not isinstance(description, Mapping) or description.get("model") != model_class:
        return ""
    there, here = (dict(_settings(_shaping(values))) for values in (description.get("config"), config))
    names = [name for name in here | there if there.get(name) != here.get(name)]
    if not names or not there:
        return ""
    found = [
        f"{name[:_MOST_CHARACTERS]} is {_shown(there.get(name))} there and {_shown(here.get(name))} here"
        for name in names[:_MOST_NAMED]
    ]
    more = len(names) - len(found)
    return f"; {', '.join(found)}" + (f", and {more} more differ{'s' * (more == 1)}" if more else "")


def _shaping(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {}
    return {name: value for name, value in values.items() if name not in _NOT_SHAPING and not name.startswith("_")}


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, and values as JSON."""
    for name, value in values.items():
        # Configs hold others for their parts, not deeper.
        if isinstance(value, Mapping) and value and prefix.count(".") < 4:
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, sort_keys=True)


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= _MOST_CHARACTERS else f"{value[: _MOST_CHARACTERS - 3]}..."
