"""How fast a directory's drive really is: sustained, without the page cache, sync included."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from io_engine.buffers import Buffer, BufferPool
from io_engine.engine import Engine, Kind, Transfer
from io_engine.extents import Extent, round_up
from io_engine.posix_engine import PosixEngine
from io_engine.space import check_space, free_bytes
from io_engine.verify import finish

_REQUEST_BYTES = 32 << 20  # about a record of states or a small block; half of it read 8 % slower here
_DEPTH = 4  # transfers under way; notes on requests and threads: more changes nothing


@dataclass(frozen=True)
class DirectoryProbe:
    """What was measured; `mixed` counts read and written bytes together while both go on."""

    path: str
    read_bytes_per_second: float
    write_bytes_per_second: float
    mixed_bytes_per_second: float
    direct: bool
    reason: str
    free_bytes: int


def probe_directory(
    directory: str | Path, *, num_bytes: int = 256 << 20, seconds: float = 0.0, engine: Engine | None = None
) -> DirectoryProbe:
    """Measure reading, writing and both at once on a file of `num_bytes`, removed afterwards; blocks.

    Each measurement goes over the file until `seconds` are over, at least once; more bytes and seconds get
    past a drive's write cache. Takes 128 MiB of host memory. OSError with the path: no such directory, not
    writable, full.
    """
    path = os.path.abspath(directory)
    size_bytes = round_up(max(num_bytes, 2 * _REQUEST_BYTES), 2 * _REQUEST_BYTES)
    free = free_bytes(path)
    check_space({path: size_bytes}, "measuring the drive")
    file_path = os.path.join(path, f".io-engine-probe-{uuid.uuid4().hex}.bin")
    own_engine = engine is None
    mover: Engine = PosixEngine() if engine is None else engine
    try:
        with BufferPool(_DEPTH * _REQUEST_BYTES, name="probe") as pool, contextlib.ExitStack() as stack:
            buffers = [stack.enter_context(pool.acquire(_REQUEST_BYTES)) for _ in range(_DEPTH)]
            for index, buffer in enumerate(buffers):
                buffer.array[:] = index + 1  # not zeros: some drives and virtual disks do not store those
            extents = [Extent(file_path, begin, _REQUEST_BYTES) for begin in range(0, size_bytes, _REQUEST_BYTES)]
            mover.preallocate(file_path, size_bytes)
            writes: list[tuple[Kind, Extent]] = [("write", extent) for extent in extents]
            reads: list[tuple[Kind, Extent]] = [("read", extent) for extent in extents]
            # Reads of one half beside writes of the other, so that no read meets a write.
            half = len(extents) // 2
            mixed = [task for pair in zip(reads[:half], writes[half:], strict=True) for task in pair]
            _run(mover, file_path, writes, buffers, seconds=0.0)  # fresh blocks cost half the speed once
            write_rate = _run(mover, file_path, writes, buffers, seconds)
            _drop_page_cache(file_path)
            read_rate = _run(mover, file_path, reads, buffers, seconds, before_each=lambda: _drop_page_cache(file_path))
            _drop_page_cache(file_path)
            mixed_rate = _run(
                mover, file_path, mixed, buffers, seconds, before_each=lambda: _drop_page_cache(file_path)
            )
        return DirectoryProbe(path, read_rate, write_rate, mixed_rate, "O_DIRECT" in mover.reason, mover.reason, free)
    finally:
        with contextlib.suppress(FileNotFoundError):
            mover.remove(file_path)
        if own_engine:
            mover.close()


def _run(
    engine: Engine,
    path: str,
    tasks: list[tuple[Kind, Extent]],
    buffers: list[Buffer],
    seconds: float,
    before_each: Callable[[], None] | None = None,
) -> float:
    """Do all tasks, again until `seconds` are over, and return bytes per second; the last sync counts too."""
    moved_bytes, busy_seconds = 0, 0.0
    while True:
        if before_each is not None:
            before_each()
        started_seconds = time.perf_counter()
        under_way: list[Transfer] = []
        try:
            for index, (kind, extent) in enumerate(tasks):
                if len(under_way) == len(buffers):
                    under_way.pop(0).wait()  # in order of submission, so the buffer of this task is free now
                array = buffers[index % len(buffers)].array
                under_way.append(engine.read(extent, array) if kind == "read" else engine.write(extent, array))
                moved_bytes += extent.num_bytes
            while under_way:
                under_way.pop(0).wait()
        finally:
            finish(under_way)
        if any(kind == "write" for kind, _ in tasks):
            engine.sync(path)
        busy_seconds += time.perf_counter() - started_seconds
        if busy_seconds >= seconds:
            return moved_bytes / max(busy_seconds, 1e-9)


def _drop_page_cache(path: str) -> None:
    """Make buffered reads come from the drive; with O_DIRECT there is nothing to drop."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
