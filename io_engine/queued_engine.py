"""What engines over real files share: a queue and threads for each directory, requests, counters, errors, close."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from io_engine.buffers import ByteArray
from io_engine.engine import Kind, Transfer, TransferCounters
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up
from io_engine.files import Files, preallocate
from io_engine.request_queue import Job, Request, RequestQueue

_LARGEST_REQUEST_BYTES = 1 << 30  # preadv moves at most 2^31 - 4096 bytes
_LEAST_REQUEST_BYTES = 4 << 20  # less costs the interpreter more than the drive gains

QueuedEngineType = TypeVar("QueuedEngineType", bound="QueuedEngine")


class _Lane(NamedTuple):
    """One directory: its files, and the queue of its requests."""

    files: Files
    queue: RequestQueue


class QueuedEngine(ABC):
    """An `Engine` whose transfers are split into requests of `request_bytes` at most, each done by a thread of its directory's
    queue through that directory's `Files`. Not usable in a forked child, where the threads do not exist.
    """

    def __init__(self, num_threads: int, request_bytes: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads} can move nothing; use at least 1")
        if not 0 < request_bytes <= _LARGEST_REQUEST_BYTES or request_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"request_bytes={request_bytes} is not a multiple of {ALIGNMENT_BYTES} up to "
                f"{_LARGEST_REQUEST_BYTES}; {32 << 20} suits most drives"
            )
        self.request_bytes = request_bytes
        self._num_threads = num_threads
        self._process_id = os.getpid()
        self._counters: dict[Kind, TransferCounters] = {
            "read": TransferCounters(),
            "write": TransferCounters(),
        }
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._closed = False
        self._jobs_lock = threading.Lock()

    @property
    @abstractmethod
    def reason(self) -> str:
        """Which path the bytes take and why."""

    @abstractmethod
    def _make_files(self) -> Files:
        """Return what opens and moves the files of one more directory."""

    @abstractmethod
    def _check_array(self, kind: Kind, extent: Extent, array: Any) -> None:
        """Raise ValueError unless `array` can be the memory of a transfer of `extent`."""

    @abstractmethod
    def _view(self, array: Any, begin_bytes: int, num_bytes: int) -> Any:
        """Return a part of a transfer's array, as the `Files` want it."""

    def _threads_text(self) -> str:
        with self._lock:
            num_directories = len(self._lanes)
        text = f"{self._num_threads} thread{'s' * (self._num_threads != 1)}"
        return f"{text} for each of {num_directories} directories" if num_directories > 1 else text

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
        self._check_usable()
        self._check_array(kind, extent, array)
        transfer = Transfer(kind, extent, array, time.perf_counter())
        job = Job(transfer)
        requests: dict[str, list[Request]] = {}
        transfer.unfinished = []
        begin_bytes = 0
        for segment in extent.segments:
            most_bytes = self._request_bytes_of(segment.num_bytes)
            for offset_bytes in range(0, segment.num_bytes, most_bytes):
                part = segment.sub(offset_bytes, min(most_bytes, segment.num_bytes - offset_bytes))
                requests.setdefault(os.path.dirname(segment.path), []).append(Request(job, part, begin_bytes))
                transfer.unfinished.append(part)
                begin_bytes += part.num_bytes
        with self._lock:
            self._check_usable()
            lanes = {folder: self._lane(folder) for folder in requests}
            for lane in lanes.values():
                lane.queue.start()  # all of them first: a transfer is not begun by halves
            self._counters[kind].begin(transfer.submitted_seconds)
            for folder, lane in lanes.items():
                lane.queue.put(requests[folder])
        return transfer

    def _request_bytes_of(self, num_bytes: int) -> int:
        """All threads work on a transfer, so that of several the first asked for is the first to end, not all of them late."""
        share = round_up(-(-num_bytes // self._num_threads), ALIGNMENT_BYTES)
        return min(self.request_bytes, max(_LEAST_REQUEST_BYTES, share))

    def _lane(self, folder: str) -> _Lane:
        lane = self._lanes.get(folder)
        if lane is None:
            queue = RequestQueue(f"io_engine-{len(self._lanes)}", self._num_threads, self._run)
            lane = self._lanes[folder] = _Lane(self._make_files(), queue)
        return lane

    def _check_usable(self) -> None:
        if os.getpid() != self._process_id:
            raise RuntimeError(
                f"the engine belongs to process {self._process_id}, and its threads do not exist in this "
                "forked child; make a new engine here"
            )
        if self._closed:
            raise RuntimeError("the engine is closed; make a new one")

    def _run(self, request: Request) -> None:
        """Do one request, in a thread of its directory's queue."""
        job, extent = request.job, request.extent
        transfer = job.transfer
        with self._jobs_lock:
            if not job.started:
                job.started = True
                transfer.mark_started(time.perf_counter())
        error: BaseException | None = None
        if job.error is None:  # after a failure the rest of the transfer is pointless
            try:
                view = self._view(transfer.array, request.begin_bytes, extent.num_bytes)
                files = self._lanes[os.path.dirname(extent.path)].files
                files.move(transfer.kind, extent.path, extent.offset_bytes, view)
            except BaseException as raised:  # whatever it is, the waiting thread must get it
                error = raised.with_traceback(None)
        with self._jobs_lock:
            job.error = job.error or error
            transfer.unfinished.remove(extent)
            ended = not transfer.unfinished
        # The last request ends the transfer, failed or not: only then does no thread touch the array any
        # more.
        if ended:
            now_seconds = time.perf_counter()
            self._counters[transfer.kind].end(now_seconds, 0 if job.error else transfer.num_bytes)
            transfer.mark_done(job.error, now_seconds)

    def sync(self, path: str) -> None:
        """Block until every write to `path` that was done before this call survives a power loss.

        OSError(ESTALE) if another process has put another file in its place.
        """
        self._files(path).sync(path)

    def _files(self, path: str) -> Files:
        self._check_usable()
        with self._lock:
            return self._lane(os.path.dirname(path)).files

    def preallocate(self, path: str, num_bytes: int) -> None:
        """Create `path` if missing and reserve its first `num_bytes` bytes; ENOSPC if they are not there."""
        self._check_usable()
        preallocate(path, num_bytes)

    def file_size(self, path: str) -> int:
        """Return how many bytes the file `path` has; FileNotFoundError when there is none."""
        return os.stat(path).st_size

    def forget(self, path: str) -> None:
        """Close the cached descriptors of `path`; call it before others remove or replace the file."""
        with self._lock:
            lane = self._lanes.get(os.path.dirname(path))
        if lane is not None:
            lane.files.forget(path)

    def remove(self, path: str) -> None:
        """Forget `path` and delete the file; FileNotFoundError when there is none."""
        self.forget(path)
        os.unlink(path)

    def close(self) -> None:
        """Wait for what is under way, end the threads, close the descriptors. Idempotent."""
        if os.getpid() != self._process_id:
            return  # a forked child: neither threads nor descriptors are its own, and a lock may be held for ever
        with self._lock:
            self._closed = True
            lanes = list(self._lanes.values())
        for lane in lanes:
            lane.queue.close()
        for lane in lanes:
            lane.queue.join()
            lane.files.close()

    def __enter__(self: QueuedEngineType) -> QueuedEngineType:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
