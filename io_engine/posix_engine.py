"""The default engine: a few threads for each directory, preadv and pwritev, O_DIRECT where the file system has it.

Direct I/O keeps the page cache out: through it, reads reach a fifth of the bandwidth at fifteen times the CPU
time, and the kernel would fill with copies the memory that the user has given to something else.
"""

from __future__ import annotations

from io_engine.buffers import ByteArray
from io_engine.engine import Kind, check_array
from io_engine.extents import Extent
from io_engine.files import HAS_DIRECT, Direct, Files
from io_engine.queued_engine import QueuedEngine


class PosixEngine(QueuedEngine):
    """`Engine` over ordinary files; see `io_engine.engine` for what it promises.

    Each directory has a queue of its own, with `num_threads` threads that begin with its first transfer, and a
    transfer is cut into a request for each of them, of 4 MiB at least and of `request_bytes` at most. `direct`:
    True insists on O_DIRECT, False never uses it, "auto" uses it unless the file system refuses; `reason` says what
    happened. Unless `direct=False`, arrays must be aligned to 4096 bytes. Not usable in a forked child, where the
    threads do not exist.
    """

    def __init__(self, num_threads: int = 4, request_bytes: int = 32 << 20, direct: Direct = "auto") -> None:
        super().__init__(num_threads, request_bytes)
        if direct is True and not HAS_DIRECT:
            raise ValueError("direct=True, but this platform has no O_DIRECT; use direct='auto'")
        self._direct: Direct = direct

    @property
    def reason(self) -> str:
        """Which path the bytes take and why, e.g. 'posix: O_DIRECT, 4 threads'."""
        threads = self._threads_text()
        if self._direct is False:
            return f"posix: page cache (direct=False), {threads}"
        if not HAS_DIRECT:
            return f"posix: page cache (this platform has no O_DIRECT), {threads}"
        with self._lock:
            reasons = {folder: lane.files.buffered_reason for folder, lane in self._lanes.items()}
        text = "".join(f"; page cache for {folder} ({why})" for folder, why in reasons.items() if why)
        return f"posix: O_DIRECT, {threads}{text}"

    def _make_files(self) -> Files:
        return Files(self._direct)

    def _check_array(self, kind: Kind, extent: Extent, array: ByteArray) -> None:
        check_array(kind, extent, array, needs_alignment=self._direct is not False and HAS_DIRECT)

    def _view(self, array: ByteArray, begin_bytes: int, num_bytes: int) -> memoryview:
        return array.data[begin_bytes : begin_bytes + num_bytes]
