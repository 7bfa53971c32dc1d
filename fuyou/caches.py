"""Caches of keys and values of a batch, made by parts of it: what lets prompts run in vertical micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def can_be_split(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward pass reads prompts into an empty cache that grows, and gives nothing but the next token's logits.

    Other passes (one token, caches of a fixed size, hidden states asked for) run whole.
    """
    from transformers import DynamicCache

    cache, ids = arguments.get("past_key_values"), arguments.get("input_ids")
    wanted = ("output_hidden_states", "output_attentions", "output_router_logits", "labels")
    return (
        type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and isinstance(ids, torch.Tensor)
        and ids.shape[1] > 1
        and not any(arguments.get(name) for name in wanted)
        and arguments.get("return_dict", True)
    )


def split(arguments: Mapping[str, Any], rows_at_once: int) -> list[dict[str, Any]]:
    """The arguments of each part: slices of what has a row for each text, and a new empty cache."""
    rows = arguments["input_ids"].shape[0]

    def part(start: int) -> dict[str, Any]:
        return {
            # Two dimensions at least: a vector of positions may be as long as there are texts.
            name: value[start : start + rows_at_once]
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == rows
            else value
            for name, value in arguments.items()
        }

    return [
        part(start) | {"past_key_values": _empty_like(arguments["past_key_values"])}
        for start in range(0, rows, rows_at_once)
    ]


def _empty_like(cache: Any) -> Any:
    """Another cache of this kind; one whose layers wait in host memory brings them back on the same stream."""
    other = copy.copy(cache)
    other.layers = copy.deepcopy(cache.layers)
    return other


def join(cache: Any, parts: Sequence[Any]) -> None:
    """Make an empty cache that of all texts, layer by layer; the parts' caches are emptied on the way.

    Each layer's is where the parts have it: in host memory if it waits there, all but the first, which comes next.
    """
    if cache.offloading and torch.cuda.is_available():
        torch.cuda.synchronize()  # layers may be on their way to the device, or from it
    layers = [list(part.layers) for part in parts]
    for part in parts:
        part.layers.clear()
    cache.layers.clear()
    for same in zip(*layers, strict=True):
        whole = same[0]  # which knows how many tokens it has seen
        if whole.is_initialized:
            for name in ("keys", "values"):
                setattr(whole, name, torch.cat([getattr(layer, name) for layer in same]))
                for layer in same[1:]:
                    setattr(layer, name, None)
        cache.layers.append(whole)
