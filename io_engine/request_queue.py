"""The requests to one directory and the threads that work on them: a slow drive holds up no other one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from io_engine.engine import Kind, Transfer
from io_engine.extents import Extent


class Job:
    """A transfer under way, cut into requests."""

    __slots__ = ("error", "started", "transfer")

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.started = False
        self.error: BaseException | None = None


class Request(NamedTuple):
    """What one thread does in one go: an extent in one piece, and where its bytes begin in the job's array."""

    job: Job
    extent: Extent
    begin_bytes: int


class RequestQueue:
    """Runs requests in `num_threads` threads, made at the first `start`; reads before writes, but neither starves."""

    def __init__(self, name: str, num_threads: int, run: Callable[[Request], None]) -> None:
        self._name = name
        self._num_threads = num_threads
        self._run = run
        self._changed = threading.Condition()
        self._waiting: dict[Kind, deque[Request]] = {"read": deque(), "write": deque()}
        self._num_writing = 0
        self._last_kind: Kind = "write"
        self._closed = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Make the threads if there are none. RuntimeError if the system gives none."""
        with self._changed:
            while len(self._threads) < self._num_threads:
                # Daemons: a program that forgot close() must still be able to end; what it loses was never committed.
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                thread.start()
                self._threads.append(thread)

    def put(self, requests: Sequence[Request]) -> None:
        """Hand over requests of one transfer; `start` comes before, `close` does not."""
        with self._changed:
            self._waiting[requests[0].job.transfer.kind].extend(requests)
            self._changed.notify(len(requests))

    def close(self) -> None:
        """Let the threads end when nothing waits any more; does not block."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Block until the threads have ended, which they do after `close`."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            request = self._next()
            if request is None:
                return
            kind = request.job.transfer.kind
            self._run(request)
            del request  # an idle thread must not keep the last array alive
            if kind == "write":
                with self._changed:
                    self._num_writing -= 1

    def _next(self) -> Request | None:
        reads, writes = self._waiting["read"], self._waiting["write"]
        with self._changed:
            while not reads and not writes:
                if self._closed:
                    return None
                self._changed.wait()
            # Reads first, since somebody waits for their data; but while nobody writes, every second request
            # may, so that writes go on under an endless stream of reads, and reads under an endless stream of
            # writes.
            choose_write = bool(writes) and (not reads or (self._num_writing == 0 and self._last_kind == "read"))
            kind: Kind = "write" if choose_write else "read"
            self._last_kind = kind
            self._num_writing += choose_write
            return self._waiting[kind].popleft()
