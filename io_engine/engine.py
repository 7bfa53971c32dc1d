"""The seam between those who move bytes and those who want them moved: `Engine` and `Transfer`.

Every engine promises the same, and one contract suite (tests/io_engine/test_engine_contract.py) checks it:
`read` and `write` return at once; the array belongs to the transfer until it is done (do not read a read's
array, do not change a write's array before `wait()`); transfers may complete in any order, so two that
overlap on disk need a wait between; a completed write is readable at once, and survives a power loss only
after `sync`. In the main thread, where a Ctrl-C may come between the start of a transfer and the note of it,
`io_engine.interrupts` lets it wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Protocol, TypeVar

from io_engine.buffers import ByteArray
from io_engine.extents import ALIGNMENT_BYTES, Extent

Kind = Literal["read", "write"]

_logger = logging.getLogger("io_engine")

PATIENCE_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 20e6
"""A transfer that takes longer than its bytes at this rate and `PATIENCE_SECONDS` is reported: no drive that works,
not even a busy one, is that slow."""


class Transfer:
    """One read or write under way or done; keeps its array alive for as long as it lives itself."""

    def __init__(self, kind: Kind, extent: Extent, array: ByteArray, submitted_seconds: float) -> None:
        self.kind: Kind = kind
        self.extent = extent
        self.array = array
        self.num_bytes = extent.num_bytes
        self.submitted_seconds = submitted_seconds
        """When it was asked for, as all three on the engine's clock: time.perf_counter, or virtual time."""
        self.started_seconds = submitted_seconds
        """When the first byte was asked of the drive; the time of submission until then."""
        self.ended_seconds = submitted_seconds
        """When the last byte had arrived; the time of submission until then."""
        self.unfinished: list[Extent] = list(extent.segments)
        """Its ranges that are not moved yet, where the engine knows; for reports."""
        self._error: BaseException | None = None
        self._is_done = threading.Event()
        self._is_reported = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Transfer], object]] = []

    @property
    def seconds(self) -> float:
        """How long the drive worked on it, waiting in the queue not counted; 0 until it is done."""
        return max(0.0, self.ended_seconds - self.started_seconds)

    @property
    def error(self) -> BaseException | None:
        """What `wait()` raises; None while under way and after success. Does not block."""
        return self._error

    def done(self) -> bool:
        """Whether it has completed or failed; does not block."""
        return self._is_done.is_set()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Block until done; the array then belongs to the caller again. May be called any number of times.

        Raises the real OSError of a failed transfer (the array's content is then undefined), TimeoutError
        when it is still under way after `timeout_seconds` (the array still belongs to the transfer). What takes
        far longer than a working drive needs is logged as a warning, once, with path and offset.
        """
        if not self._wait_and_watch(timeout_seconds):
            raise self._timeout_error(timeout_seconds)
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _wait_and_watch(self, timeout_seconds: float | None) -> bool:
        patience_seconds = PATIENCE_SECONDS + self.num_bytes / SLOWEST_BYTES_PER_SECOND
        deadline_seconds = float("inf") if timeout_seconds is None else time.perf_counter() + timeout_seconds
        while not self._is_done.is_set():
            report_seconds = float("inf") if self._is_reported else self.started_seconds + patience_seconds
            now_seconds = time.perf_counter()
            if now_seconds >= report_seconds:
                self._report(now_seconds)
                continue
            next_seconds = min(report_seconds, deadline_seconds)
            if now_seconds >= deadline_seconds:
                return False
            self._is_done.wait(None if next_seconds == float("inf") else next_seconds - now_seconds)
        return True

    def _report(self, now_seconds: float) -> None:
        with self._lock:
            if self._is_reported:
                return
            self._is_reported = True
        unfinished = list(self.unfinished)
        if unfinished:  # else it has just ended
            _logger.warning(
                "the %s of %d bytes at offset %d of %s is not done after %.0f s (%d of the transfer's parts are left); "
                "the drive or its file system hangs or is overloaded, see the kernel's log; waiting on",
                self.kind,
                unfinished[0].num_bytes,
                unfinished[0].offset_bytes,
                unfinished[0].path,
                now_seconds - self.submitted_seconds,
                len(unfinished),
            )

    def _timeout_error(self, timeout_seconds: float | None) -> TimeoutError:
        return TimeoutError(
            f"{self.kind} of {self.num_bytes} bytes at offset {self.extent.offset_bytes} of "
            f"{self.extent.path} is still under way after {timeout_seconds} s; its array must stay untouched "
            "until it is done"
        )

    def add_done_callback(self, callback: Callable[[Transfer], object]) -> None:
        """Call `callback(self)` once it is done: from an I/O thread, or at once if it is done already.

        The callback must be short and must not wait for another transfer. What it raises is logged and
        dropped.
        """
        with self._lock:
            if not self._is_done.is_set():
                self._callbacks.append(callback)
                return
        self._call(callback)

    def mark_started(self, now_seconds: float) -> None:
        """For engines: the drive begins to work on it."""
        self.started_seconds = now_seconds

    def mark_done(self, error: BaseException | None, now_seconds: float) -> None:
        """For engines: it has ended. Wakes the waiting threads, then runs the callbacks in this thread."""
        self.ended_seconds = now_seconds
        self._error = error
        with self._lock:
            self._is_done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Transfer], object]) -> None:
        try:
            callback(self)
        except Exception:
            _logger.exception("a callback of the %s of %s raised", self.kind, self.extent)

    def __repr__(self) -> str:
        state = "under way" if not self.done() else "done" if self._error is None else f"failed: {self._error}"
        return f"<Transfer: {self.kind} {self.extent}, {state}>"


class Engine(Protocol):
    """Moves bytes between host memory and files; see the module's docstring for what all engines promise."""

    @property
    def reason(self) -> str:
        """Which path the bytes take and why, for people, e.g. 'posix: O_DIRECT, 4 threads'."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes of completed reads."""
        ...

    @property
    def bytes_written(self) -> int:
        """Bytes of completed writes."""
        ...

    @property
    def read_seconds(self) -> float:
        """Wall time during which at least one read was under way."""
        ...

    @property
    def write_seconds(self) -> float:
        """Wall time during which at least one write was under way."""
        ...

    def read(self, extent: Extent, array: ByteArray) -> Transfer:
        """Start to fill `array` (uint8, 1-D, contiguous, aligned, len == extent.num_bytes) from the file.

        ValueError for an array that does not fit, RuntimeError after close; all else is raised by `wait()`.
        """
        ...

    def write(self, extent: Extent, array: ByteArray) -> Transfer:
        """Start to write `array` to the file, which is made if missing; arguments and errors as in `read`."""
        ...

    def sync(self, path: str) -> None:
        """Block until each write to `path` that was done before survives a power loss (fdatasync)."""
        ...

    def preallocate(self, path: str, num_bytes: int) -> None:
        """Create `path` if missing and reserve its first `num_bytes` bytes; unwritten ones read as zeros.
        Blocks.
        """
        ...

    def file_size(self, path: str) -> int:
        """Return how many bytes the file `path` has; FileNotFoundError when there is none."""
        ...

    def forget(self, path: str) -> None:
        """Close what the engine keeps open of `path`; transfers under way still complete."""
        ...

    def remove(self, path: str) -> None:
        """Forget `path` and delete the file; FileNotFoundError when there is none."""
        ...

    def close(self) -> None:
        """Wait for what is under way, then release everything; later calls raise RuntimeError. Idempotent."""
        ...

    def __enter__(self: EngineType) -> EngineType: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


EngineType = TypeVar("EngineType", bound=Engine)


class TransferCounters:
    """Bytes and busy time of one kind of transfer; thread safe. For engines, which pass the time in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_under_way = 0
        self._busy_since_seconds = 0.0
        self._busy_seconds = 0.0
        self.num_bytes = 0

    def begin(self, now_seconds: float) -> None:
        """A transfer was submitted."""
        with self._lock:
            if self._num_under_way == 0:
                self._busy_since_seconds = now_seconds
            self._num_under_way += 1

    def end(self, now_seconds: float, num_bytes: int) -> None:
        """A transfer has ended and moved `num_bytes` (0 if it failed)."""
        with self._lock:
            self.num_bytes += num_bytes
            self._num_under_way -= 1
            if self._num_under_way == 0:
                self._busy_seconds += max(0.0, now_seconds - self._busy_since_seconds)

    def seconds(self, now_seconds: float) -> float:
        """Return the time during which at least one transfer was under way, up to now."""
        with self._lock:
            open_seconds = max(0.0, now_seconds - self._busy_since_seconds) if self._num_under_way else 0.0
            return self._busy_seconds + open_seconds


def check_array(kind: Kind, extent: Extent, array: ByteArray, *, needs_alignment: bool) -> None:
    """Raise ValueError unless `array` can be the memory of a transfer of `extent`. For engines."""
    what = f"{kind} of {extent.num_bytes} bytes at offset {extent.offset_bytes} of {extent.path}"
    if array.dtype != "uint8" or array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(
            f"{what}: the array is {array.dtype} of shape {array.shape}, not 1-D contiguous uint8; "
            "pass array.reshape(-1).view(numpy.uint8)"
        )
    if array.size != extent.num_bytes:
        raise ValueError(
            f"{what}: the array has {array.size} bytes; slice it to {extent.num_bytes}, or take a part of "
            "the extent with extent.sub()"
        )
    if kind == "read" and not array.flags.writeable:
        raise ValueError(f"{what}: the array is read-only; pass a writable one, such as Buffer.array")
    address = int(array.__array_interface__["data"][0])
    if needs_alignment and address % ALIGNMENT_BYTES:
        raise ValueError(
            f"{what}: the array's memory at {address:#x} is not aligned to {ALIGNMENT_BYTES} bytes, which "
            "O_DIRECT needs; take it from a BufferPool, at an offset that is a multiple of 4096"
        )
