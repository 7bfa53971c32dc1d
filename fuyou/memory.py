"""How much host memory this process takes, sampled."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time

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


def return_freed_memory() -> bool:
    """Have the C library give freed blocks of 1 MiB and more back at once; False where it is not glibc.

    Left alone, glibc raises this limit up to 32 MiB after the first such block is freed. A layer's temporaries then
    come from the heap, which fragments and only grows: with 24 layers of 7M parameters by 100 MiB, with more layers by
    more. The price, page faults for large temporaries, did not show in step times. Concerns the whole process, so it is
    called when a model is opened, not at import.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(mmap_threshold, LARGE_BLOCK_BYTES))
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
