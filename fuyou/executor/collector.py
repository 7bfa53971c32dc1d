"""What layers leave beside their results: transformers collects router logits and the like through hooks into a dict of lists
held by a private context variable. Without it (older versions) models return them in their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fuyou.executor.record import is_float


def _collector_variable() -> Any:
    try:
        from transformers.utils.output_capturing import _active_collector as variable
    except ImportError:
        return None
    return variable


def active_collector() -> dict[str, list[Any]] | None:
    """The lists that the model collects in now, by key; None if it collects nothing."""
    variable = _collector_variable()
    found = variable.get() if variable is not None else None
    return {k: v for k, v in found.items() if isinstance(v, list)} if found is not None else None


def activate_collector(collected: Mapping[str, int]) -> tuple[dict[str, list[Any]] | None, Any]:
    """A collector of our own for a layer's recomputation, and what `deactivate_collector` takes."""
    variable = _collector_variable()
    if variable is None:
        return None, None
    collector: dict[str, list[Any]] = {key: [] for key in collected}
    return collector, variable.set(collector if collected else None)


def deactivate_collector(token: Any) -> None:
    """Back to what was active before `activate_collector`."""
    variable = _collector_variable()
    if variable is not None and token is not None:
        variable.reset(token)


def collected_tensors(collector: dict[str, list[Any]] | None, counts: Mapping[str, int]) -> list[torch.Tensor]:
    """The float tensors among the last `counts[key]` entries of each key."""
    if not collector:
        return []
    return [v for key, n in counts.items() for v in collector[key][len(collector[key]) - n :] if is_float(v)]


def replace_collected(
    collector: dict[str, list[Any]] | None, counts: Mapping[str, int], values: list[torch.Tensor]
) -> None:
    """Put `values` in the place of what `collected_tensors` gives."""
    for key, n in counts.items() if collector else ():
        entries = collector[key]  # type: ignore[index]
        for i in range(len(entries) - n, len(entries)):
            if is_float(entries[i]):
                entries[i] = values.pop(0)
