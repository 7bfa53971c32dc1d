"""The default engine: a few threads, preadv and pwritev, O_DIRECT where the file system has it.

Direct I/O keeps the page cache out: through it, reads reach a fifth of the bandwidth at fifteen times the CPU
time, and the kernel would fill with copies the memory that the user has given to something else.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from types import TracebackType
from typing import Literal, NamedTuple

from io_engine.buffers import ByteArray
from io_engine.engine import Kind, Transfer, TransferCounters, check_array
from io_engine.errors import io_error
from io_engine.extents import ALIGNMENT_BYTES, Extent

_LARGEST_REQUEST_BYTES = 1 << 30  # preadv moves at most 2^31 - 4096 bytes


class _Job:
    """A transfer and how many of its requests have not ended."""

    __slots__ = ("error", "num_left", "started", "transfer")

    def __init__(self, transfer: Transfer, num_requests: int) -> None:
        self.transfer = transfer
        self.num_left = num_requests
        self.started = False
        self.error: BaseException | None = None


class _Request(NamedTuple):
    job: _Job
    begin_bytes: int
    end_bytes: int


class _File:
    """A cached descriptor; closed when forgotten and no request uses it."""

    __slots__ = ("descriptor", "direct", "forgotten", "num_users", "proven")

    def __init__(self, descriptor: int, direct: bool) -> None:
        self.descriptor = descriptor
        self.direct = direct
        self.proven = False
        self.forgotten = False
        self.num_users = 0


class PosixEngine:
    """`Engine` over ordinary files; see `io_engine.engine` for what it promises.

    A transfer is split into requests of `request_bytes` that `num_threads` threads work on. `direct`: True
    insists on O_DIRECT, False never uses it, "auto" uses it unless the file system refuses; `reason` says
    what happened. Unless `direct=False`, arrays must be aligned to 4096 bytes. Not usable in a forked child,
    where the threads do not exist.
    """

    def __init__(
        self,
        num_threads: int = 4,
        request_bytes: int = 16 << 20,
        direct: Literal["auto"] | bool = "auto",
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads} can move nothing; use at least 1")
        if not 0 < request_bytes <= _LARGEST_REQUEST_BYTES or request_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"request_bytes={request_bytes} is not a multiple of {ALIGNMENT_BYTES} up to "
                f"{_LARGEST_REQUEST_BYTES}; {16 << 20} suits most drives"
            )
        if direct is True and not hasattr(os, "O_DIRECT"):
            raise ValueError("direct=True, but this platform has no O_DIRECT; use direct='auto'")
        self._request_bytes = request_bytes
        self._direct = direct
        self._process_id = os.getpid()
        self._counters: dict[Kind, TransferCounters] = {
            "read": TransferCounters(),
            "write": TransferCounters(),
        }
        self._wake = threading.Condition()
        self._queues: dict[Kind, deque[_Request]] = {"read": deque(), "write": deque()}
        self._num_writing = 0
        self._last_kind: Kind = "write"
        self._closed = False
        self._files_lock = threading.Lock()
        self._files: dict[tuple[str, Kind], _File] = {}
        self._buffered_paths: set[str] = set()
        self._buffered_reasons: dict[str, str] = {}  # folder -> why its files are not opened with O_DIRECT
        # Daemons: a program that forgot close() must still be able to end; what it loses was never committed.
        self._threads = [
            threading.Thread(target=self._work, name=f"io_engine-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def reason(self) -> str:
        """Which path the bytes take and why, e.g. 'posix: O_DIRECT, 4 threads'."""
        threads = f"{len(self._threads)} threads"
        if self._direct is False:
            return f"posix: page cache (direct=False), {threads}"
        if not hasattr(os, "O_DIRECT"):
            return f"posix: page cache (this platform has no O_DIRECT), {threads}"
        with self._files_lock:
            reasons = [f"; page cache for {folder} ({why})" for folder, why in self._buffered_reasons.items()]
        return f"posix: O_DIRECT, {threads}{''.join(reasons)}"

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
        """Wall time during which at least one read was under way."""
        return self._counters["read"].seconds(time.perf_counter())

    @property
    def write_seconds(self) -> float:
        """Wall time during which at least one write was under way."""
        return self._counters["write"].seconds(time.perf_counter())

    def read(self, extent: Extent, array: ByteArray) -> Transfer:
        """Start to fill `array` from the file; see `Engine.read`."""
        return self._submit("read", extent, array)

    def write(self, extent: Extent, array: ByteArray) -> Transfer:
        """Start to write `array` to the file; see `Engine.write`."""
        return self._submit("write", extent, array)

    def _submit(self, kind: Kind, extent: Extent, array: ByteArray) -> Transfer:
        check_array(kind, extent, array, needs_alignment=self._direct is not False and hasattr(os, "O_DIRECT"))
        num_bytes, step_bytes = extent.num_bytes, self._request_bytes
        transfer = Transfer(kind, extent, array, time.perf_counter())
        job = _Job(transfer, -(-num_bytes // step_bytes))
        requests = [
            _Request(job, begin, min(begin + step_bytes, num_bytes)) for begin in range(0, num_bytes, step_bytes)
        ]
        with self._wake:
            self._check_usable()
            self._counters[kind].begin(transfer.submitted_seconds)
            self._queues[kind].extend(requests)
            self._wake.notify(len(requests))
        return transfer

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed; make a new one")
        if os.getpid() != self._process_id:
            raise RuntimeError(
                f"the engine belongs to process {self._process_id}, and its threads do not exist in this "
                "forked child; make a new engine here"
            )

    def _work(self) -> None:
        while True:
            request = self._next_request()
            if request is None:
                return
            self._run(request)
            del request  # an idle thread must not keep the last array alive

    def _next_request(self) -> _Request | None:
        reads, writes = self._queues["read"], self._queues["write"]
        with self._wake:
            while not reads and not writes:
                if self._closed:
                    return None
                self._wake.wait()
            # Reads first, since somebody waits for their data; but while nobody writes, every second request
            # may, so that writes go on under an endless stream of reads, and reads under an endless stream of
            # writes.
            choose_write = bool(writes) and (not reads or (self._num_writing == 0 and self._last_kind == "read"))
            kind: Kind = "write" if choose_write else "read"
            self._last_kind = kind
            self._num_writing += choose_write
            request = self._queues[kind].popleft()
            if not request.job.started:
                request.job.started = True
                request.job.transfer.mark_started(time.perf_counter())
            return request

    def _run(self, request: _Request) -> None:
        job = request.job
        transfer = job.transfer
        error: BaseException | None = None
        if job.error is None:  # after a failure the rest of the transfer is pointless
            try:
                self._move(transfer, request.begin_bytes, request.end_bytes)
            except BaseException as raised:  # whatever it is, the waiting thread must get it
                error = raised.with_traceback(None)
        with self._wake:
            self._num_writing -= transfer.kind == "write"
            job.error = job.error or error
            job.num_left -= 1
            ended = job.num_left == 0
        # The last request ends the transfer, failed or not: only then does no thread touch the array any
        # more.
        if ended:
            now_seconds = time.perf_counter()
            self._counters[transfer.kind].end(now_seconds, 0 if job.error else transfer.num_bytes)
            transfer.mark_done(job.error, now_seconds)

    def _move(self, transfer: Transfer, begin_bytes: int, end_bytes: int) -> None:
        kind, path = transfer.kind, transfer.extent.path
        offset_bytes, num_bytes = transfer.extent.offset_bytes + begin_bytes, end_bytes - begin_bytes
        view = transfer.array.data[begin_bytes:end_bytes]
        try:
            file = self._acquire_file(path, kind)
            try:
                _move_all(kind, file, view, path, offset_bytes)
                file.proven = True
                return
            except OSError as error:
                refused = error.errno == errno.EINVAL and file.direct and not file.proven and self._direct == "auto"
                if not refused:
                    raise
            finally:
                self._release_file(file)
            self._use_page_cache(path, "it refused the first O_DIRECT request: EINVAL")
            file = self._acquire_file(path, kind)
            try:
                _move_all(kind, file, view, path, offset_bytes)
            finally:
                self._release_file(file)
        except OSError as error:
            if error.filename is not None:  # it knows its place already
                raise
            raise io_error(error.errno or errno.EIO, kind, path, offset_bytes, num_bytes) from None

    def _acquire_file(self, path: str, kind: Kind) -> _File:
        with self._files_lock:
            file = self._files.get((path, kind))
            if file is None:
                file = self._files[path, kind] = self._open(path, kind)
            file.num_users += 1
            return file

    def _release_file(self, file: _File) -> None:
        with self._files_lock:
            file.num_users -= 1
            if file.forgotten and file.num_users == 0:
                os.close(file.descriptor)

    def _open(self, path: str, kind: Kind) -> _File:
        flags = os.O_CLOEXEC | (os.O_RDONLY if kind == "read" else os.O_RDWR | os.O_CREAT)
        if self._direct is not False and hasattr(os, "O_DIRECT") and path not in self._buffered_paths:
            try:
                return _File(_open_nameless(path, flags | os.O_DIRECT), direct=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            if self._direct is True:
                detail = "its file system has no O_DIRECT; use direct='auto', or another file system"
                raise io_error(errno.EINVAL, "opening", path, 0, 0, detail)
            self._buffered_paths.add(path)
            self._buffered_reasons[os.path.dirname(path)] = "its file system refuses O_DIRECT: EINVAL at open"
        return _File(_open_nameless(path, flags), direct=False)

    def _use_page_cache(self, path: str, why: str) -> None:
        with self._files_lock:
            self._buffered_paths.add(path)
            self._buffered_reasons[os.path.dirname(path)] = why
        self.forget(path)

    def sync(self, path: str) -> None:
        """Block until every write to `path` that was done before this call survives a power loss."""
        self._check_usable()
        # The descriptor that wrote is the one to which the kernel reports a failed write-back.
        with self._files_lock:
            kind: Kind = "write" if (path, "write") in self._files else "read"
        try:
            file = self._acquire_file(path, kind)
            try:
                if hasattr(os, "fdatasync"):
                    os.fdatasync(file.descriptor)
                else:
                    os.fsync(file.descriptor)
            finally:
                self._release_file(file)
        except OSError as error:
            raise OSError(error.errno, f"{os.strerror(error.errno or errno.EIO)} (fdatasync)", path) from None

    def preallocate(self, path: str, num_bytes: int) -> None:
        """Create `path` if missing and reserve its first `num_bytes` bytes; ENOSPC if they are not there."""
        self._check_usable()
        descriptor = os.open(path, os.O_CLOEXEC | os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                os.posix_fallocate(descriptor, 0, num_bytes)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (
                    errno.EOPNOTSUPP,
                    errno.EINVAL,
                    errno.ENOSYS,
                ):
                    raise io_error(error.errno or errno.EIO, "preallocation", path, 0, num_bytes) from None
                if os.fstat(descriptor).st_size < num_bytes:
                    os.ftruncate(descriptor, num_bytes)
        finally:
            os.close(descriptor)

    def file_size(self, path: str) -> int:
        """Return how many bytes the file `path` has; FileNotFoundError when there is none."""
        return os.stat(path).st_size

    def forget(self, path: str) -> None:
        """Close the cached descriptors of `path`; call it before others remove or replace the file."""
        with self._files_lock:
            kinds: tuple[Kind, ...] = ("read", "write")
            for kind in kinds:
                file = self._files.pop((path, kind), None)
                if file is not None:
                    file.forgotten = True
                    if file.num_users == 0:
                        os.close(file.descriptor)

    def remove(self, path: str) -> None:
        """Forget `path` and delete the file; FileNotFoundError when there is none."""
        self.forget(path)
        os.unlink(path)

    def close(self) -> None:
        """Wait for what is under way, end the threads, close the descriptors. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if os.getpid() == self._process_id:
            for thread in self._threads:
                thread.join()
        with self._files_lock:
            paths = {path for path, _ in self._files}
        for path in paths:
            self.forget(path)

    def __enter__(self) -> PosixEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_nameless(path: str, flags: int) -> int:
    """Open a file; the error has no filename yet, so that the transfer adds its offset and length to it."""
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror) from None


def _move_all(kind: Kind, file: _File, view: memoryview, path: str, offset_bytes: int) -> None:
    """Move all of `view`, continuing after partial calls; OSError when the file ends or the drive fails."""
    done_bytes = 0
    while done_bytes < len(view):
        rest = [view[done_bytes:]]
        if kind == "read":
            moved_bytes = os.preadv(file.descriptor, rest, offset_bytes + done_bytes)
        else:
            moved_bytes = os.pwritev(file.descriptor, rest, offset_bytes + done_bytes)
        advance_bytes = moved_bytes
        if file.direct and done_bytes + moved_bytes < len(view):
            # O_DIRECT must go on at an aligned offset: what lies beyond the last one is moved again.
            advance_bytes = moved_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if advance_bytes == 0:
            detail = f"short {kind}: only {done_bytes + moved_bytes} bytes"
            if kind == "read":
                detail += f", the file ends at {os.fstat(file.descriptor).st_size}"
            raise io_error(errno.EIO, kind, path, offset_bytes, len(view), detail)
        done_bytes += advance_bytes
