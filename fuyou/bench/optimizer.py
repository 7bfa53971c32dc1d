"""`fuyou bench optimizer`: the out-of-core step beside the same reads and writes without arithmetic."""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuyou.bench import MIN_REPEATS, existing_directory, median_ratio, spread, take_turns
from fuyou.config import counted

if TYPE_CHECKING:
    from io_engine import Engine, Extent, Store, Transfer
    from optim import OffloadedAdamW, ShardLayout

SUMMARY = "a step of the out-of-core optimizer beside its own reads and writes without arithmetic"
SHARD_PARAMETERS = 6 * 2**20
"""Of one shard: a decoder layer of a small model, three records."""
RECORD_BUFFERS, WEIGHT_BUFFERS, GRADIENT_BUFFERS = 6, 3, 3
NUM_COPIES, COPIES_READ_AHEAD = 10, 4
"""Buffers of the limit, and how many are being read: more than the step has, so that it is a limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("directory", nargs="?", default=".", help="a directory on the drive to measure (here)")
    parser.add_argument("--parameters", type=float, default=48e6, help="trainable parameters (48e6)")
    parser.add_argument(
        "--moment-dtype", choices=("float32", "bfloat16", "int8"), default="float32", help="of the moments (float32)"
    )
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help=f"rounds ({MIN_REPEATS})")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="threads of the arithmetic (all cores)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; blocks for a minute or two. Makes a store in a temporary folder of the directory.

    ConfigError if there is no such directory, OSError from the drive.
    """
    with tempfile.TemporaryDirectory(prefix="fuyou-bench-", dir=existing_directory(options.directory)) as folder:
        return _measure(Path(folder), options)


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from io_engine import PosixEngine, Store
    from optim import ShardLayout

    num_shards = max(2, round(options.parameters / SHARD_PARAMETERS))
    layouts = [
        ShardLayout.of(
            f"layers.{i}", {f"layers.{i}.weight": (SHARD_PARAMETERS,)}, "bfloat16", moment_dtype=options.moment_dtype
        )
        for i in range(num_shards)
    ]
    with (
        PosixEngine() as engine,
        Store.create(folder / "store", identity={}, engine=engine) as store,
        Store.create(folder / "clipping", identity={}, engine=engine) as second_store,
        _Bench(engine, store, layouts, options.workers, None) as bench,
        # A limit that is never reached: gradients are kept until the norm is known, and every guess is right.
        _Bench(engine, second_store, layouts, options.workers, 1e9) as clipping,
    ):
        seconds = take_turns({"step": bench.step, "clipping": clipping.step, "limit": bench.copy}, options.repeats)
    moved = sum(2 * (layout.weight_bytes + layout.state_bytes) for layout in layouts)
    parameters = sum(layout.num_parameters for layout in layouts)
    return {
        "ratio": median_ratio(seconds["limit"], seconds["step"]),
        "clipping_ratio": median_ratio(seconds["clipping"], seconds["step"]),
        "num_parameters": parameters,
        "moment_dtype": options.moment_dtype,
        "num_workers": options.workers,
        "bytes_moved": moved,
        "bytes_per_parameter": moved / parameters,
        "io": engine.reason,
    } | {
        name: {
            "seconds": statistics.median(values),
            "spread": spread(values),
            "bytes_per_second": moved / statistics.median(values),
        }
        for name, values in seconds.items()
    }


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"ratio to the limit  {result['ratio']:.3f}",
        f"clipping that never triggers: {result['clipping_ratio']:.3f} of a step without",
        f"{result['num_parameters'] / 1e6:.1f}M parameters, {result['moment_dtype']} moments, "
        f"{counted(result['num_workers'], 'worker')}, "
        f"{result['bytes_per_parameter']:.2f} B a parameter and step; {result['io']}",
    ]
    for name, text in (
        ("step", "optimizer step"),
        ("clipping", "with clipping"),
        ("limit", "reads and writes alone"),
    ):
        measured = result[name]
        lines.append(
            f"{text:<22}  {measured['seconds']:.3f} s  {measured['bytes_per_second'] / 1e9:.2f} GB/s  "
            f"+-{100 * measured['spread']:.0f} %"
        )
    return "\n".join(lines)


class _Bench:
    """A store of shards, the optimizer over it, and the same transfers with nothing done to the bytes."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        layouts: list[ShardLayout],
        num_workers: int,
        max_grad_norm: float | None,
    ) -> None:
        import torch

        from io_engine import BufferPool, ExtentSpec
        from io_engine.buffers import size_class_bytes
        from optim import OffloadedAdamW

        self._engine, self._store, self._layouts = engine, store, layouts
        specs = []
        for layout in layouts:
            specs += [
                ExtentSpec(layout.weight_name, layout.weight_bytes, 2, piece_bytes=layout.weight_piece_bytes),
                ExtentSpec(layout.state_name, layout.state_bytes, 2, piece_bytes=layout.full_record_bytes),
            ]
        store.allocate(specs)
        store.commit(step=0, slots={}, checksums={}, state={})

        def pool(name: str, num_buffers: int, num_bytes: int) -> BufferPool:
            return BufferPool(num_buffers * size_class_bytes(num_bytes), name=name)

        first = layouts[0]
        self._weights = pool("weights", WEIGHT_BUFFERS, first.weight_bytes)
        num_gradients = GRADIENT_BUFFERS if max_grad_norm is None else len(layouts) + GRADIENT_BUFFERS
        self._gradients = pool("gradients", num_gradients, first.gradient_bytes)
        self._records = pool("records", RECORD_BUFFERS, first.full_record_bytes)
        self._copied = pool("copies", NUM_COPIES, first.full_record_bytes)
        self._copies = [self._copied.acquire(first.full_record_bytes) for _ in range(NUM_COPIES)]
        parameters = {
            torch.nn.Parameter(torch.empty(SHARD_PARAMETERS, device="meta")): layout.parameters[0].name
            for layout in layouts
        }
        self._optimizer: OffloadedAdamW = OffloadedAdamW(
            list(parameters),
            names=parameters,
            shards=layouts,
            store=store,
            engine=engine,
            records=self._records,
            gradients=self._gradients,
            early=frozenset(layout.name for layout in layouts),
            waiting={layout.name: "free" if max_grad_norm is None else "host" for layout in layouts},
            max_grad_norm=max_grad_norm,
            num_workers=num_workers,
            load_shard=lambda _name: None,
            drop_resident_weights=lambda: None,
        )

    def step(self) -> None:
        """A backward pass that takes no time, with early updates, and its commit."""
        optimizer = self._optimizer
        optimizer.begin_backward()
        under_way: collections.deque[tuple[ShardLayout, Any, Any, Transfer]] = collections.deque()
        waiting = iter(reversed(self._layouts))
        for layout in waiting:
            under_way.append(self._read_weights(layout))
            if len(under_way) == WEIGHT_BUFFERS - 1:
                self._give(*under_way.popleft())
        while under_way:
            self._give(*under_way.popleft())
        optimizer.step()
        optimizer.flush()

    def _read_weights(self, layout: ShardLayout) -> tuple[ShardLayout, Any, Any, Transfer]:
        optimizer = self._optimizer
        buffer = self._weights.acquire(layout.weight_bytes)
        array = buffer.array[: layout.weight_bytes]
        extent = self._store.extent(layout.weight_name, optimizer.slot_of(layout.name))
        return layout, buffer, array, self._engine.read(extent, array)

    def _give(self, layout: ShardLayout, buffer: Any, array: Any, transfer: Transfer) -> None:
        gradient = self._optimizer.acquire_gradient(layout.name)
        gradient.array[:] = 1e-3
        gradient.arrived.add(layout.parameters[0].name)
        transfer.wait()
        self._optimizer.gradient_complete(gradient, array, wait=lambda: None, on_done=buffer.release)

    def copy(self) -> None:
        """The transfers of one step, as many at a time, from one slot to the other, and a sync; no commit."""
        tasks = list(self._extents())
        reads: list[Transfer] = []
        writes: list[Transfer] = []
        for number in range(len(tasks) + COPIES_READ_AHEAD):
            if number < len(tasks):
                source, _ = tasks[number]
                if number >= len(self._copies):
                    writes[number - len(self._copies)].wait()  # out of this buffer
                array = self._copies[number % len(self._copies)].array[: source.num_bytes]
                reads.append(self._engine.read(source, array))
            done = number - COPIES_READ_AHEAD
            if done >= 0:
                reads[done].wait()
                writes.append(self._engine.write(tasks[done][1], reads[done].array))
        for transfer in writes:
            transfer.wait()
        for path in {segment.path for _, target in tasks for segment in target.segments}:
            self._engine.sync(path)

    def _extents(self) -> Iterator[tuple[Extent, Extent]]:
        store = self._store
        for layout in reversed(self._layouts):
            for chunk in range(layout.num_chunks):
                for name, part in (
                    (layout.weight_name, layout.weight_range(chunk)),
                    (layout.state_name, layout.state_range(chunk)),
                ):
                    slot = self._optimizer.slot_of(layout.name)
                    yield store.extent(name, slot).sub(*part), store.extent(name, 1 - slot).sub(*part)

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        """Give everything back."""
        self._optimizer.close()
        for buffer in self._copies:
            buffer.release()
        for pool in (self._weights, self._gradients, self._records, self._copied):
            pool.close()
