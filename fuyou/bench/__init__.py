"""`fuyou bench`: rates beside the limit that the same machine shows in the same run.

Contestants take turns, so that whatever else the machine does falls on all of them; what is published are medians,
and first of all ratios. Each module here has `SUMMARY`, `add_arguments(parser)`, `run(options)` (a result as JSON) and
`describe(result)` (the same for people), and imports what is heavy inside `run`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from fuyou.errors import ConfigError

SHAPES = {  # hidden, intermediate, layers, heads; untied, a vocabulary of 256
    "26M": (512, 1408, 8, 8),
    "85M": (768, 2048, 12, 12),
    "206M": (1024, 2816, 16, 16),
    "567M": (1536, 4096, 20, 16),
}
"""Llamas that are measured with random weights."""

MIN_REPEATS = 9
"""Turns of each contestant; fewer give medians that wander."""


def existing_directory(directory: str) -> str:
    """The absolute path of a directory to be measured; ConfigError if there is none: it is not made, since a mistyped
    path would be measured on another drive.
    """
    path = os.path.abspath(directory)
    if not os.path.isdir(path):
        what = "is not a directory" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"{path} {what}: name an existing directory on the drive to measure")
    return path


def llama(size: str, length: int) -> Any:
    """The config of a Llama of one of the `SHAPES`, for texts of so many tokens."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads = SHAPES[size]
    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(2048, length),
        tie_word_embeddings=False,
    )


def choose(device: str | None, compute_dtype: str | None) -> tuple[str, Any]:
    """The device and the dtype to measure with: a GPU in bfloat16 if there is one, else the CPU in float32. ConfigError."""
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {chosen}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return chosen, compute_dtype or ("float32" if chosen == "cpu" else "bfloat16")


def take_turns(
    contestants: Mapping[str, Callable[[], object]], num_repeats: int = MIN_REPEATS
) -> dict[str, list[float]]:
    """Seconds of each call, by contestant: one untimed call each, then `num_repeats` rounds; blocks.

    Every second round goes backwards, so that nobody always runs behind the same neighbour.
    """
    for call in contestants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(num_repeats):
        order = list(contestants) if repeat % 2 == 0 else list(contestants)[::-1]
        for name in order:
            started_seconds = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - started_seconds)
    return seconds


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; 0.0 for fewer than four values."""
    if len(values) < 4:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4)
    return (upper - lower) / 2 / statistics.median(values)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the rounds' own ratios: neighbours in time share what disturbed them."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
