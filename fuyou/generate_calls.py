"""Calls of `model.generate` from Python: what they need beside the weights is found before they start, or refused."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from fuyou.errors import ConfigError
from fuyou.generation_plan import CacheShape, Demand, Fit, cache_shape

RoomFor = Callable[[Demand, CacheShape, "Literal['device', 'host'] | None"], AbstractContextManager[Fit]]
"""Keeps room for what is demanded inside; PlanError where there is none."""


def plan_calls(model: Any, itemsize: int, on_host: bool, room_for: Callable[[], RoomFor | None]) -> None:
    """Let `room_for` decide where the cache of each call of model.generate lies; None from it: somebody has planned it.

    How long texts can become is known where transformers prepares a call's cache: behind all settings, before any pass.
    """
    plain = type(model).generate
    prepare = type(model)._prepare_cache_for_generation
    # Of the call under way: what is given back at its end, and its prompts' tokens.
    under_way: list[tuple[contextlib.ExitStack, int]] = []

    @functools.wraps(plain.__get__(model))
    def generate(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            under_way.append((stack, _prompt_tokens(args, kwargs)))
            stack.callback(under_way.pop)
            return plain(model, *args, **kwargs)

    @functools.wraps(prepare.__get__(model))
    def prepare_cache(
        generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        room = room_for()
        if room is not None and under_way:
            stack, prompt_tokens = under_way[-1]
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            context = max_cache_length + 1
            with contextlib.suppress(ConfigError):  # of an unusual model nothing is known
                shape = cache_shape(model.config, itemsize)
                if generation_config.use_cache is False:
                    shape, prompt_tokens = CacheShape(0, ()), context - 1
                demand = Demand(rows, min(prompt_tokens, context - 1), max(1, context - prompt_tokens))
                own = _own_tier(generation_config, model_kwargs)
                fit = stack.enter_context(room(demand, shape, None if on_host else own))
                if fit.cache_tier == "host" and own is None and generation_config.use_cache is not False:
                    generation_config.cache_implementation = "offloaded"
        return prepare(model, generation_config, model_kwargs, mode, batch_size, max_cache_length)

    object.__setattr__(model, "generate", generate)
    object.__setattr__(model, "_prepare_cache_for_generation", prepare_cache)


def _prompt_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    return max((int(t.shape[1]) for t in given if isinstance(t, torch.Tensor) and t.ndim > 1), default=1)


def _own_tier(generation_config: Any, model_kwargs: dict[str, Any]) -> Literal["device", "host"] | None:
    """Where the caller's own settings put the cache; None: they say nothing."""
    cache, kind = model_kwargs.get("past_key_values"), generation_config.cache_implementation
    if cache is None and kind is None:
        return None
    is_offloaded = getattr(cache, "offloading", False) or str(kind).startswith("offloaded")
    return "host" if is_offloaded else "device"
