"""An engine over files in memory, in virtual time, for tests: ours and those of users.

It loses every race on purpose. Nothing completes by itself; the array of a read holds poison until the read
is done; the bytes of a write are taken when the write is done. So a missing wait, or a buffer reused too
early, gives wrong bytes every time and on every machine, and not once a month.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from io_engine.buffers import ByteArray
from io_engine.engine import Kind, Transfer, TransferCounters, check_array
from io_engine.errors import io_error
from io_engine.extents import Extent

POISON_BYTE = 0xA5
"""What the array of a read holds from submission until completion."""

Order = Literal["fifo", "lifo"] | Callable[[Sequence[Transfer]], int]


@dataclass
class _Fault:
    kind: str
    path_contains: str
    error: OSError | None
    """What to raise; None for a short transfer."""
    short_bytes: int
    num_to_skip: int


class _MockTransfer(Transfer):
    """A transfer whose `wait` moves the virtual clock on instead of blocking."""

    def __init__(self, engine: MockEngine, kind: Kind, extent: Extent, array: ByteArray, now_seconds: float) -> None:
        super().__init__(kind, extent, array, now_seconds)
        self._engine = engine
        self.is_started = False
        self.failure: OSError | None = None

    def wait(self, timeout_seconds: float | None = None) -> None:
        limit_seconds = None if timeout_seconds is None else self._engine.now_seconds + timeout_seconds
        if not self._engine._run_until_done(self, limit_seconds):
            raise self._timeout_error(timeout_seconds)
        super().wait()


@dataclass
class _Part:
    """What one drive does of a transfer: a range in one piece, and its bytes."""

    transfer: _MockTransfer
    extent: Extent
    array: ByteArray
    fault: _Fault | None


class _Lane:
    """A drive's work on one kind: one part of a transfer at a time."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self.waiting: list[_Part] = []
        self.current: _Part | None = None
        self.current_end_seconds = 0.0
        self.free_at_seconds = 0.0


class MockEngine:
    """`Engine` in virtual time; each directory is a drive, whose reads and writes are two lanes that work side by
    side, each one transfer (of a striped extent: one part) at a time.

    That takes `latency_seconds` + its bytes / the lane's rate, and completes in `advance`, `run_until` or
    `wait`, in the thread that calls these. `directory_bytes_per_second` has the rates, both ways, of directories
    that differ from the others. `order` picks the next of a lane's waiting transfers: "fifo", "lifo", or a function
    from the list of them to an index. `files` maps paths to their bytes. Thread safe.
    """

    def __init__(
        self,
        *,
        read_bytes_per_second: float = 1e9,
        write_bytes_per_second: float = 1e9,
        latency_seconds: float = 1e-4,
        order: Order = "fifo",
        directory_bytes_per_second: Mapping[str, float] | None = None,
    ) -> None:
        self.files: dict[str, bytearray] = {}
        self.transfers: list[str] = []
        """What completed, in order, as 'read PATH OFFSET LENGTH', 'write ...' and 'sync PATH', for tests to
        compare.
        """
        self._durable: dict[str, bytes] = {}
        self._latency_seconds = latency_seconds
        self._order: Order = order
        self._bytes_per_second: dict[Kind, float] = {"read": read_bytes_per_second, "write": write_bytes_per_second}
        self._directory_bytes_per_second = dict(directory_bytes_per_second or {})
        self._lanes: dict[tuple[str, Kind], _Lane] = {}
        self._counters: dict[Kind, TransferCounters] = {"read": TransferCounters(), "write": TransferCounters()}
        self._faults: list[_Fault] = []
        self._now_seconds = 0.0
        self._lock = threading.RLock()
        self._closed = False

    @property
    def reason(self) -> str:
        """That this is a mock."""
        return "mock: files in memory, virtual time"

    @property
    def now_seconds(self) -> float:
        """The virtual clock."""
        return self._now_seconds

    @property
    def bytes_read(self) -> int:
        """Bytes of completed reads."""
        return self._counters["read"].num_bytes

    @property
    def bytes_written(self) -> int:
        """Bytes of completed writes."""
        return self._counters["write"].num_bytes

    @property
    def read_seconds(self) -> float:
        """Virtual time during which at least one read was under way."""
        return self._counters["read"].seconds(self._now_seconds)

    @property
    def write_seconds(self) -> float:
        """Virtual time during which at least one write was under way."""
        return self._counters["write"].seconds(self._now_seconds)

    @property
    def num_under_way(self) -> int:
        """How many transfers, of striped extents their parts, have not completed."""
        with self._lock:
            return sum(len(lane.waiting) + (lane.current is not None) for lane in self._lanes.values())

    def fail_next(
        self,
        kind: Literal["read", "write", "sync"],
        path_contains: str,
        error: OSError,
        *,
        num_to_skip: int = 0,
    ) -> None:
        """Make the next transfer of `kind` submitted for a matching path fail with `error`'s errno, nothing
        moved (of a striped extent: nothing of the first part that matches).
        """
        with self._lock:
            self._faults.append(_Fault(kind, path_contains, error, 0, num_to_skip))

    def short_next(self, kind: Kind, path_contains: str, num_bytes: int, *, num_to_skip: int = 0) -> None:
        """Make the next transfer of `kind` submitted for a matching path move `num_bytes`, then fail with
        EIO.
        """
        with self._lock:
            self._faults.append(_Fault(kind, path_contains, None, num_bytes, num_to_skip))

    def lose_unsynced(self) -> None:
        """Act like a power loss: files go back to their bytes at the last `sync`, unsynced ones vanish."""
        with self._lock:
            self.files = {path: bytearray(data) for path, data in self._durable.items()}

    def read(self, extent: Extent, array: ByteArray) -> Transfer:
        """Poison `array` now, fill it when the transfer completes; see `Engine.read`."""
        return self._submit("read", extent, array)

    def write(self, extent: Extent, array: ByteArray) -> Transfer:
        """Take the bytes of `array` when the transfer completes; see `Engine.write`."""
        return self._submit("write", extent, array)

    def _submit(self, kind: Kind, extent: Extent, array: ByteArray) -> Transfer:
        check_array(kind, extent, array, needs_alignment=True)
        with self._lock:
            self._check_open()
            if kind == "read":
                array.fill(POISON_BYTE)
            transfer = _MockTransfer(self, kind, extent, array, self._now_seconds)
            self._counters[kind].begin(self._now_seconds)
            begin_bytes = 0
            for segment in extent.segments:
                part = array[begin_bytes : begin_bytes + segment.num_bytes]
                begin_bytes += segment.num_bytes
                fault = self._take_fault(kind, segment.path)
                self._lane(segment.path, kind).waiting.append(_Part(transfer, segment, part, fault))
        return transfer

    def _lane(self, path: str, kind: Kind) -> _Lane:
        directory = os.path.dirname(path)
        if (directory, kind) not in self._lanes:
            rate = self._directory_bytes_per_second.get(directory, self._bytes_per_second[kind])
            self._lanes[directory, kind] = _Lane(rate)
        return self._lanes[directory, kind]

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed; make a new one")

    def _take_fault(self, kind: str, path: str) -> _Fault | None:
        for fault in self._faults:
            if fault.kind == kind and fault.path_contains in path:
                if fault.num_to_skip:
                    fault.num_to_skip -= 1
                    continue
                self._faults.remove(fault)
                return fault
        return None

    def advance(self, seconds: float) -> None:
        """Move the virtual clock on by `seconds` and complete what ends until then."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds} is negative; virtual time goes forward only")
        limit_seconds = self._now_seconds + seconds
        while self._complete_next(limit_seconds):
            pass
        with self._lock:
            self._now_seconds = max(self._now_seconds, limit_seconds)

    def run_until(self, transfer: Transfer) -> None:
        """Move the virtual clock on until `transfer` is done, which completes what comes before it; raises
        nothing.
        """
        if not isinstance(transfer, _MockTransfer) or transfer._engine is not self:
            raise ValueError(f"{transfer!r} is not a transfer of this engine; pass one that it returned")
        self._run_until_done(transfer, None)

    def run_all(self) -> None:
        """Move the virtual clock on until nothing is under way."""
        while self._complete_next(None):
            pass

    def _run_until_done(self, transfer: _MockTransfer, limit_seconds: float | None) -> bool:
        while not transfer.done():
            if self._complete_next(limit_seconds):
                continue
            with self._lock:
                if transfer.unfinished:
                    if limit_seconds is not None:
                        self._now_seconds = max(self._now_seconds, limit_seconds)
                        return False
                    continue  # it was started by another thread since; go on
            # All its parts are done: another thread is completing it at this moment.
            transfer._is_done.wait()
        return True

    def _complete_next(self, limit_seconds: float | None) -> bool:
        """Complete the part of a transfer that ends next, if not after the limit; return whether there was one."""
        with self._lock:
            for lane in self._lanes.values():
                self._start_next(lane)
            busy = [(lane.current_end_seconds, kind, lane) for (_, kind), lane in self._lanes.items() if lane.current]
            if not busy:
                return False
            # Of those that end at the same moment reads come first.
            end_seconds, _, lane = min(busy, key=lambda item: item[:2])
            if limit_seconds is not None and end_seconds > limit_seconds:
                return False
            part = lane.current
            assert part is not None
            transfer = part.transfer
            self._now_seconds = max(self._now_seconds, end_seconds)
            lane.current, lane.free_at_seconds = None, end_seconds
            error = self._move(part)
            transfer.failure = transfer.failure or error
            transfer.unfinished.remove(part.extent)
            if transfer.unfinished:
                return True
            self._counters[transfer.kind].end(self._now_seconds, 0 if transfer.failure else transfer.num_bytes)
            ended_seconds = self._now_seconds
        # Outside of the lock: callbacks may take locks of their own, whose holders may be waiting for ours.
        transfer.mark_done(transfer.failure, ended_seconds)
        return True

    def _start_next(self, lane: _Lane) -> None:
        if lane.current is not None or not lane.waiting:
            return
        if callable(self._order):
            index = self._order(tuple(part.transfer for part in lane.waiting))
        else:
            index = 0 if self._order == "fifo" else -1
        part = lane.current = lane.waiting.pop(index)
        start_seconds = max(lane.free_at_seconds, part.transfer.submitted_seconds)
        transfer = part.transfer
        transfer.mark_started(min(start_seconds, transfer.started_seconds) if transfer.is_started else start_seconds)
        transfer.is_started = True
        lane.current_end_seconds = start_seconds + self._latency_seconds + part.extent.num_bytes / lane.bytes_per_second

    def _move(self, part: _Part) -> OSError | None:
        """Move the bytes; return the error if the transfer is to fail."""
        extent, kind, fault = part.extent, part.transfer.kind, part.fault
        begin, wanted_bytes = extent.offset_bytes, extent.num_bytes
        detail = ""
        if fault is not None and fault.error is not None:
            return _with_place(fault.error, kind, extent)
        if fault is not None:
            wanted_bytes, detail = fault.short_bytes, f"short {kind}: only {fault.short_bytes} bytes"
        if kind == "read":
            data = self.files.get(extent.path)
            if data is None:
                return io_error(errno.ENOENT, kind, extent.path, begin, extent.num_bytes)
            found = data[begin : begin + wanted_bytes]
            part.array.data[: len(found)] = found
            if len(found) < wanted_bytes:
                detail = f"short read: only {len(found)} bytes, the file ends at {len(data)}"
        else:
            data = self.files.setdefault(extent.path, bytearray())
            data.extend(bytes(max(0, begin + wanted_bytes - len(data))))
            data[begin : begin + wanted_bytes] = part.array[:wanted_bytes].tobytes()
        if detail:
            return io_error(errno.EIO, kind, extent.path, begin, extent.num_bytes, detail)
        self.transfers.append(f"{kind} {extent.path} {begin} {extent.num_bytes}")
        return None

    def sync(self, path: str) -> None:
        """Make the bytes of the writes that are done survive `lose_unsynced`."""
        with self._lock:
            self._check_open()
            fault = self._take_fault("sync", path)
            if fault is not None and fault.error is not None:
                raise OSError(fault.error.errno, f"{fault.error.strerror} (fdatasync)", path)
            if path not in self.files:
                raise OSError(errno.ENOENT, f"{os.strerror(errno.ENOENT)} (fdatasync)", path)
            self._durable[path] = bytes(self.files[path])
            self.transfers.append(f"sync {path}")

    def preallocate(self, path: str, num_bytes: int) -> None:
        """Give the file `path` at least `num_bytes` bytes, zeros where nothing was written."""
        with self._lock:
            self._check_open()
            data = self.files.setdefault(path, bytearray())
            data.extend(bytes(max(0, num_bytes - len(data))))

    def file_size(self, path: str) -> int:
        """Return how many bytes the file `path` has; FileNotFoundError when there is none."""
        with self._lock:
            if path not in self.files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return len(self.files[path])

    def forget(self, path: str) -> None:
        """Do nothing: no descriptors are kept."""

    def remove(self, path: str) -> None:
        """Drop the file `path`, and a real one of that name, by which a Store reserves it."""
        with self._lock:
            known = self.files.pop(path, None) is not None
            self._durable.pop(path, None)
            if not known:
                os.unlink(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def close(self) -> None:
        """Complete what is under way; later calls raise RuntimeError. Idempotent."""
        self.run_all()
        with self._lock:
            self._closed = True

    def __enter__(self) -> MockEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_place(error: OSError, kind: Kind, extent: Extent) -> OSError:
    return io_error(error.errno or errno.EIO, kind, extent.path, extent.offset_bytes, extent.num_bytes)
