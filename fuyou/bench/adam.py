"""`fuyou bench adam`: the update in host memory beside the same traffic without arithmetic, torch and DeepSpeed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuyou.bench import MIN_REPEATS, median_ratio, spread, take_turns
from fuyou.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

SUMMARY = "the optimizer's arithmetic in host memory beside the same traffic without arithmetic"

MIN_PARAMETERS = 2**24
"""On machines with small caches; elsewhere so many that the smallest kernel's arrays are 8 times the cache."""
TILE_PARAMETERS = 2**18
"""What one call of a kernel works on, as in training."""
TRIAD_BYTES = 12
"""A parameter: a = b + scalar * c in float32; STREAM counts no read of a."""
COMPUTED_PARAMETERS, NUM_PASSES = 1024, 2**9
"""What `compute` works on, within the first cache, and how often: about as long as a kernel takes for a tile."""
PAGE_BYTES, LINE_BYTES = 4096, 64
LARGEST_CACHE_BYTES = 64 * 2**20
"""Where the system does not say."""

Tile = slice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--parameters", type=float, default=0, help="parameters (default: far beyond the caches)")
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help=f"rounds (default: {MIN_REPEATS})")
    parser.add_argument("--workers", type=int, default=0, help="threads beside a single one (default: all cores)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; blocks for ten seconds or so. ConfigError for bad options.

    Takes 34 B of memory a parameter, with DeepSpeed 42.
    """
    from fuyou.hardware import num_cores

    if options.repeats < 1 or options.workers < 0 or not 0 <= options.parameters <= 2**31:
        raise ConfigError("bench adam: --repeats must be at least 1, --parameters and --workers not negative")
    wanted = int(options.parameters) or max(MIN_PARAMETERS, 8 * _largest_cache_bytes() // 16)
    bench = _Bench(-(-wanted // TILE_PARAMETERS) * TILE_PARAMETERS)
    others, missing = bench.others()
    rows = {
        str(num_workers): _measure(bench, others, num_workers, options.repeats)
        for num_workers in sorted({1, options.workers or num_cores()})
    }
    return {
        "cpu": _cpu(),
        "num_parameters": bench.num_parameters,
        "num_repeats": options.repeats,
        "workers": rows,
        "missing": missing,
    }


def describe(result: dict[str, Any]) -> str:
    """The same as a table for each number of workers."""
    lines = [
        f"{result['cpu']}: {result['num_parameters'] / 1e6:.1f}M parameters, medians of {result['num_repeats']} rounds; "
        "limit: the same reads and writes without arithmetic, in turn with the kernels"
    ]
    for num_workers, row in result["workers"].items():
        lines += [
            "",
            f"{f'{num_workers} worker' + ('s' if num_workers != '1' else ''):12}{'ratio':>6}{'ns':>7}{'GB/s':>6}"
            f"{'spread':>8}{'B':>6}{'limit ns':>10}{'limit GB/s':>11}{'limit/triad':>12}",
        ]
        for name, kernel in row["kernels"].items():
            limit = kernel["limit"]
            lines.append(
                f"{name:12}{kernel['ratio']:>6.2f}{kernel['nanoseconds_per_parameter']:>7.3f}"
                f"{kernel['bytes_per_second'] / 1e9:>6.1f}{kernel['spread']:>8.1%}{kernel['bytes_per_parameter']:>6.4g}"
                f"{limit['nanoseconds_per_parameter']:>10.3f}{limit['bytes_per_second'] / 1e9:>11.1f}"
                f"{limit['ratio_to_triad']:>12.2f}"
            )
        for name, other in row["others"].items():
            lines.append(
                f"{name:12}{'':6}{other['nanoseconds_per_parameter']:>7.3f}{other['bytes_per_second'] / 1e9:>6.1f}"
                f"{other['spread']:>8.1%}{other['bytes_per_parameter']:>6.4g}  ours is "
                f"{other['our_speedup']:.2f} times as fast"
            )
        triad = row["triad"]
        lines.append(f"{'triad':12}{'':13}{triad['bytes_per_second'] / 1e9:>6.1f}{triad['spread']:>8.1%}")
        if num_workers != "1":
            lines.append(
                f"in the cache {num_workers} workers compute {row['compute_speedup']:.2f} times as fast as one"
            )
    lines += ["", *(f"{name}: {reason}" for name, reason in result["missing"].items())]
    lines.append("ns, B: of a parameter; ratio: limit over kernel, round by round; spread: half of the quartile range")
    return "\n".join(lines)


def _measure(
    bench: _Bench, others: dict[str, Callable[[], object]], num_workers: int, num_repeats: int
) -> dict[str, Any]:
    """All contestants in turn with so many threads."""
    import torch

    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_workers, "fuyou-bench") as workers:
        contestants = {name: bench.spread_over(workers, num_workers, call) for name, call in bench.calls.items()}
        contestants["compute alone"] = bench.spread_over(workers, 1, bench.calls["compute"])
        torch.set_num_threads(num_workers)
        try:
            seconds = take_turns(contestants | others, num_repeats)
        finally:
            torch.set_num_threads(num_threads)

    def rates(name: str, bytes_per_parameter: float) -> dict[str, Any]:
        median = statistics.median(seconds[name])
        return {
            "nanoseconds_per_parameter": median / bench.num_parameters * 1e9,
            "bytes_per_second": bytes_per_parameter * bench.num_parameters / median,
            "spread": spread(seconds[name]),
            "bytes_per_parameter": bytes_per_parameter,
        }

    kernels = {}
    for name, num_bytes in bench.bytes_per_parameter.items():
        limit = rates(f"{name} limit", num_bytes)
        limit["ratio_to_triad"] = median_ratio(seconds["triad"], seconds[f"{name} limit"]) * num_bytes / TRIAD_BYTES
        kernels[name] = rates(name, num_bytes) | {
            "ratio": median_ratio(seconds[f"{name} limit"], seconds[name]),
            "limit": limit,
        }
    float32_bytes = bench.bytes_per_parameter["float32"]
    return {
        "kernels": kernels,
        "others": {
            name: rates(name, float32_bytes) | {"our_speedup": median_ratio(seconds[name], seconds["float32"])}
            for name in others
        },
        "triad": rates("triad", TRIAD_BYTES),
        "compute_speedup": median_ratio(seconds["compute alone"], seconds["compute"]),
    }


class _Bench:
    """The arrays, and what works on one tile of them."""

    def __init__(self, num_parameters: int) -> None:
        import numpy as np

        from optim import kernels

        self.num_parameters = num_parameters
        self._num_arrays = 0
        g = self._array(np.float32, 0.1)
        g[:] = np.random.default_rng(0).standard_normal(num_parameters, np.float32)
        self._p, self._g = self._array(np.float32, 0.02), g
        p, m, v = self._p, self._array(np.float32, 0.01), self._array(np.float32, 0.01)
        high, low = self._array(np.uint16, 0x3C00), self._array(np.uint16, 0)
        m16, v16 = self._array(np.uint16, 0x3C00), self._array(np.uint16, 0x3C00)
        m8, v8 = self._array(np.int8, 64), self._array(np.uint8, 64)
        block = kernels.MOMENT_BLOCK_ELEMENTS
        m_scales, v_scales = (np.full(num_parameters // block, 1e-3, np.float32) for _ in range(2))
        scalars = kernels.AdamWScalars.at_step(1e-5, 0.9, 0.999, 1e-8, 0.01, step=1000)

        def update_int8(tile: Tile) -> int:
            blocks = slice(tile.start // block, tile.stop // block)
            return kernels.adamw_split_int8(
                high[tile], low[tile], m8[tile], m_scales[blocks], v8[tile], v_scales[blocks], g[tile], scalars,
                first_element=tile.start,
            )  # fmt: skip

        updates: dict[str, tuple[Callable[[Tile], int], tuple[Any, ...]]] = {
            "float32": (lambda t: kernels.adamw_float32(p[t], m[t], v[t], g[t], scalars), (p, m, v)),
            "split": (
                lambda t: kernels.adamw_split(high[t], low[t], m[t], v[t], g[t], scalars),
                (high, low, m, v),
            ),
            "bfloat16": (
                lambda t: kernels.adamw_split_bfloat16(
                    high[t], low[t], m16[t], v16[t], g[t], scalars, first_element=t.start
                ),
                (high, low, m16, v16),
            ),
            "int8": (update_int8, (high, low, m8, v8)),
        }
        touch, triad, compute = _bare_loops()
        self.calls: dict[str, Callable[[Tile], object]] = {
            "triad": lambda t: triad(p[t], m[t], v[t]),
            "compute": lambda t: compute(np.full(COMPUTED_PARAMETERS, 0.5, np.float32)),
        }
        self.bytes_per_parameter: dict[str, float] = {}
        for name, (update, written) in updates.items():
            self.calls[name] = update
            self.calls[f"{name} limit"] = touch(written, g)
            # Each is read and written, g is read; the scales are four bytes a moment and block.
            scale_bytes = 16 / block if name == "int8" else 0
            self.bytes_per_parameter[name] = sum(2 * array.itemsize for array in written) + g.itemsize + scale_bytes

    def _array(self, dtype: Any, value: float) -> np.ndarray[Any, Any]:
        """Filled, so that its pages exist, and begun at another line of another page than the arrays before it.

        Arrays of a power of two in size would otherwise compete for the same few lines of each cache.
        """
        import numpy as np

        self._num_arrays += 1
        offset = self._num_arrays * (PAGE_BYTES + 5 * LINE_BYTES)
        num_bytes = self.num_parameters * np.dtype(dtype).itemsize
        memory = np.empty(num_bytes + offset + PAGE_BYTES, np.uint8)
        start = -memory.ctypes.data % PAGE_BYTES + offset
        array: np.ndarray[Any, Any] = memory[start : start + num_bytes].view(dtype)
        array.fill(value)
        return array

    def spread_over(
        self, workers: ThreadPoolExecutor, num_workers: int, call: Callable[[Tile], object]
    ) -> Callable[[], object]:
        """`call` on every tile, the next one by the worker that is free, as in training; blocks until all have ended."""
        tiles = [slice(a, a + TILE_PARAMETERS) for a in range(0, self.num_parameters, TILE_PARAMETERS)]

        def work(waiting: Iterator[Tile]) -> None:
            for tile in waiting:
                call(tile)

        return lambda: list(workers.map(work, [iter(tiles)] * num_workers))

    def others(self) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        """What else there is for float32 parameters, and why something is missing."""
        import torch

        parameter = torch.nn.Parameter(torch.from_numpy(self._p))
        parameter.grad = torch.from_numpy(self._g)
        torch_step = torch.optim.AdamW([parameter], lr=1e-5, fused=True).step
        found: dict[str, Callable[[], object]] = {"torch fused": lambda: torch_step()}
        if importlib.util.find_spec("deepspeed") is None:
            return found, {"DeepSpeedCPUAdam": "not installed"}
        try:
            with _stdout_to_stderr():
                deepspeed = importlib.import_module("deepspeed.ops.adam")
                deepspeed_step = deepspeed.DeepSpeedCPUAdam([parameter], lr=1e-5).step
                deepspeed_step()
        except Exception as error:  # it compiles itself here, and can fail in as many ways as a compiler
            return found, {"DeepSpeedCPUAdam": f"{type(error).__name__}: {error}".partition("\n")[0]}
        return found | {"DeepSpeedCPUAdam": lambda: deepspeed_step()}, {}


@functools.cache
def _bare_loops() -> tuple[Callable[..., Callable[[Tile], object]], Callable[..., object], Callable[..., object]]:
    """(touch, triad, compute): touch(written, read) gives a call that moves a tile's bytes as an update of these arrays does.

    compute(a) is the reverse, arithmetic on what is in the cache already.
    """
    import numba
    import numpy as np

    njit = numba.njit(nogil=True)

    @njit  # type: ignore[untyped-decorator, unused-ignore]
    def touch_three(a: Any, b: Any, c: Any, g: Any) -> Any:
        seen = np.uint32(0)
        for i in range(g.size):
            a[i] ^= 1
            b[i] ^= 1
            c[i] ^= 1
            seen ^= g[i]
        return seen

    @njit  # type: ignore[untyped-decorator, unused-ignore]
    def touch_four(a: Any, b: Any, c: Any, d: Any, g: Any) -> Any:
        seen = np.uint32(0)
        for i in range(g.size):
            a[i] ^= 1
            b[i] ^= 1
            c[i] ^= 1
            d[i] ^= 1
            seen ^= g[i]
        return seen

    @njit  # type: ignore[untyped-decorator, unused-ignore]
    def triad(a: Any, b: Any, c: Any) -> None:
        for i in range(a.size):
            a[i] = b[i] + np.float32(3.0) * c[i]

    @njit  # type: ignore[untyped-decorator, unused-ignore]
    def compute(a: Any) -> None:
        for _ in range(NUM_PASSES):
            for i in range(a.size):
                x = a[i]
                for _ in range(4):
                    x = x * np.float32(0.5) + np.float32(0.25)
                a[i] = x

    def touch(written: tuple[Any, ...], read: Any) -> Callable[[Tile], object]:
        # As integers, of which the lowest bit is turned over: no value becomes one that is slow to compute with.
        arrays = [array.view(f"u{array.itemsize}") for array in (*written, read)]
        function = touch_three if len(written) == 3 else touch_four
        return lambda tile: function(*(array[tile] for array in arrays))

    return touch, triad, compute


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Compilers and C++ write where only the result may go."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _largest_cache_bytes() -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=LARGEST_CACHE_BYTES)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown processor"
