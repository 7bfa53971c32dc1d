"""Rates of a token step, measured here for one model's shapes: few rows times large matrices, and caches that grow.

Such products move weights rather than compute, and how fast depends on their shapes and on the number of rows; a cache is
copied as a whole for each token that it takes in. Neither follows from the rates of training.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fuyou.counters import Counters
from fuyou.hardware import num_cores
from fuyou.memory import bound_process_memory

COLD_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}
"""Worked through in turn, so that nothing is in a cache of the processor from one repeat to the next."""
NUM_REPEATS = 5
MOST_ATTEMPTS, MOST_OTHERS = 3, 0.1
"""Measured again where other processes took more than this share of the cores meanwhile."""


class DecodeRates:
    """What `generation_plan.Machine` asks for, by number of rows, each measured once and kept.

    `matrices` are the shapes (outputs, inputs) that a decoder layer multiplies with, `heads` the numbers of heads of
    queries and of keys, and the width of each. Measuring takes a quarter of the budget at most; of larger matrices a part
    stands for the whole.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[int, int]],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        device: str,
        budget_bytes: int,
    ) -> None:
        self._device, self._dtype, self._heads = device, dtype, heads
        itemsize = dtype.itemsize
        self._cold_bytes = min(COLD_BYTES["cpu" if device == "cpu" else "cuda"], budget_bytes // 4)
        most = self._cold_bytes // (max(1, len(matrices)) * itemsize)
        self._matrices = [(max(1, min(outputs, most // inputs)), inputs) for outputs, inputs in matrices] or [(64, 64)]
        self.weight_bytes_per_second = functools.cache(self._weight_bytes_per_second)
        self._measured_cache_seconds = functools.cache(self._measured_cache)
        # What large temporaries cost depends on it, and a model that is opened calls it too.
        bound_process_memory()

    def cache_seconds(self, rows: int, tokens: int) -> float:
        """One layer's cache of so many tokens of each text: made longer by one, and read; beyond one of next to nothing,
        whose operations are part of what a block costs however small it is.
        """
        measured = tokens
        while measured > 16 and self._cache_bytes(rows, measured) > self._cold_bytes // 4:
            measured //= 2
        seconds = self._measured_cache_seconds(rows, measured) * tokens / measured
        return max(0.0, seconds - self._measured_cache_seconds(1, 2))

    def _cache_bytes(self, rows: int, tokens: int) -> int:
        _, num_kv_heads, width = self._heads
        return 2 * rows * num_kv_heads * tokens * width * self._dtype.itemsize

    def _weight_bytes_per_second(self, rows: int) -> float:
        one_layer = sum(outputs * inputs for outputs, inputs in self._matrices) * self._dtype.itemsize
        layers = [
            [torch.ones(shape, dtype=self._dtype, device=self._device) for shape in self._matrices]
            for _ in range(max(1, min(64, self._cold_bytes // one_layer)))
        ]
        hidden = {n: torch.ones((rows, 1, n), dtype=self._dtype, device=self._device) for _, n in self._matrices}

        def work() -> None:
            for layer in layers:
                for weight in layer:
                    torch.nn.functional.linear(hidden[weight.shape[1]], weight)

        return one_layer * len(layers) / self._seconds(work)

    def _measured_cache(self, rows: int, tokens: int) -> float:
        """Seconds of one layer."""
        num_heads, num_kv_heads, width = self._heads
        options: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        count = max(1, min(64, self._cold_bytes // max(1, self._cache_bytes(rows, tokens))))
        caches = [
            [torch.zeros((rows, num_kv_heads, tokens - 1, width), **options) for _ in range(2)] for _ in range(count)
        ]
        new = torch.zeros((rows, num_kv_heads, 1, width), **options)
        query = torch.zeros((rows, num_heads, 1, width), **options)
        repeat = num_heads // num_kv_heads

        def work() -> None:
            for cache in caches:
                keys, values = (torch.cat([part, new], dim=-2) for part in cache)
                if repeat > 1:
                    keys, values = (torch.repeat_interleave(part, repeat, dim=1) for part in (keys, values))
                torch.nn.functional.scaled_dot_product_attention(query, keys, values)

        # The rest of attention is part of what a block costs anyway.
        return self._seconds(work) / count

    def _seconds(self, work: Callable[[], None]) -> float:
        attempts = []
        with torch.no_grad():
            work()
            for _ in range(MOST_ATTEMPTS):
                before = Counters.now()
                seconds = [self._timed(work) for _ in range(NUM_REPEATS)]
                others = before.others_share(Counters.now(), num_cores())
                attempts.append((others, statistics.median(seconds)))
                if others <= MOST_OTHERS:
                    break
        return min(attempts)[1]

    def _timed(self, work: Callable[[], None]) -> float:
        self._synchronise()
        started = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - started

    def _synchronise(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
