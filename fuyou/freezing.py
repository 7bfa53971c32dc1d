"""Training a part of a model: which parameters, by patterns of their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from fuyou.errors import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str] | None) -> None:
    """Let those parameters require gradients whose name, or that of a module around them, is matched whole; None: all.

    ConfigError for a pattern that is no regular expression or matches nothing; nothing has changed then.
    """
    if patterns is None:
        return
    if isinstance(patterns, str):
        raise ConfigError(f"trainable={patterns!r}: expected a list of patterns")
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied weights go by each of their names
    modules = {name: list(_around(name)) for name in parameters}
    wanted: set[int] = set()
    for pattern in patterns:
        try:
            matches = re.compile(pattern).fullmatch
        except re.error as error:
            raise ConfigError(f"trainable: {pattern!r} is no regular expression ({error})") from None
        found = {name for name, around in modules.items() if any(matches(n) for n in (name, *around))}
        if not found:
            near = _nearest(pattern, [*parameters, *(n for around in modules.values() for n in around)])
            raise ConfigError(
                f"trainable: {pattern!r} matches no parameter and no module with parameters of this model; the nearest names "
                f"are {', '.join(near)}"
            )
        wanted |= {id(parameters[name]) for name in found}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in wanted and parameter.is_floating_point())


def _around(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    plain = re.sub(r"\\(.)", r"\1", pattern).replace(".*", "")
    return difflib.get_close_matches(plain, list(dict.fromkeys(names)), n=3, cutoff=0.0)
