"""How much host memory this process takes, sampled."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process (RssAnon), without mapped files; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # a quarter of the time that "status" takes
            _size, resident, shared = file.read().split()[:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE_BYTES


LARGE_BLOCK_BYTES = 2**20
"""From this size on, what torch frees goes back to the system at once."""
_KEPT_BLOCK_BYTES = 32 * 2**20
"""The most that glibc takes for it."""
_KEPT_TOP_BYTES = 2**30
_USUAL_TOP_BYTES = 128 * 2**10
"""glibc's own: free memory at the heap's end from which on it is given back."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def bound_process_memory() -> None:
    """What a process does that opens a model, and whoever measures what it will cost there: the two below."""
    return_freed_memory()
    bound_kernel_caches()


def return_freed_memory() -> bool:
    """Have the C library give freed blocks of 1 MiB and more back at once; False where it is not glibc.

    Left alone, glibc raises this limit up to 32 MiB after the first such block is freed. A layer's temporaries then
    come from the heap, which fragments and only grows: with 24 layers of 7M parameters by 100 MiB, with more layers by
    more. Concerns the whole process, so it is called when a model is opened, not at import.
    """
    return _set(_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def bound_kernel_caches() -> None:
    """Have torch keep 128 of the kernels that it makes for shapes on the CPU, each with its memory, instead of 1,024.

    Sequences whose length varies bring some 30 new ones a step where bfloat16 is computed by oneDNN: 10 MB a step, beside any
    budget. Both are read from the environment when they are first needed; what the user has set there stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


class FreedMemory:
    """Lets the process keep what torch frees while there is room for it: memory that is mapped anew costs page faults.

    Half of the kernel's time of a step on a CPU without it. Where `limit_bytes` is None, or without glibc, nothing is kept.
    """

    def __init__(self) -> None:
        self.limit_bytes: int | None = None
        """Anonymous memory of the process above which everything freed goes back."""

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, freed blocks stay in the heap until `return_excess` finds too much of them."""
        if self.limit_bytes is None or not _set(_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES):
            yield
            return
        try:
            _set(_TRIM_THRESHOLD, _KEPT_TOP_BYTES)
            yield
        finally:
            _set(_TRIM_THRESHOLD, _USUAL_TOP_BYTES)
            return_freed_memory()
            self.return_excess()

    def return_excess(self) -> None:
        """Give all that is free back if the process is above the limit; called when a block's temporaries are free."""
        if self.limit_bytes is not None and anonymous_bytes() > self.limit_bytes:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)


def _set(parameter: int, value: int) -> bool:
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    return False


class MemoryMeter:
    """Peak of anonymous memory above what the process had when the meter was made, sampled 50 times a second."""

    PERIOD_SECONDS = 0.02

    def __init__(self) -> None:
        self.start_bytes = anonymous_bytes()
        self._peak = self.start_bytes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fuyou-memory", daemon=True)
        self._thread.start()

    def take_peak(self) -> int:
        """Peak bytes above the start since the last call."""
        now = anonymous_bytes()
        peak, self._peak = max(self._peak, now), now
        return max(0, peak - self.start_bytes)

    def close(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._peak = max(self._peak, anonymous_bytes())
            time.sleep(self.PERIOD_SECONDS)
