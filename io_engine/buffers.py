"""Host memory that direct I/O likes: huge pages, aligned, touched, and never more than a budget.

Why huge pages: the kernel splits a direct request wherever the memory is not physically contiguous; with 4
KiB pages the drive gets small requests and up to a third of its bandwidth, at five times the CPU time. Why
MADV_DONTFORK: a page under direct I/O that a fork marks copy-on-write may be copied away from under the
transfer, and DataLoader workers fork at any time. A forked child does not have this memory at all and must
not touch it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType

import numpy as np
import numpy.typing as npt

from io_engine.errors import BudgetError, EngineError
from io_engine.extents import ALIGNMENT_BYTES, round_up

ByteArray = npt.NDArray[np.uint8]

HUGE_PAGE_BYTES = 2 << 20
_SMALLEST_HUGE_BYTES = 1 << 20  # below this, rounding up to a huge page would waste more than it wins

# Module state, because only a fork hook can prevent the following: a forked child lacks the memory (DONTFORK)
# but has the Python objects; when it drops them, munmap would hit whatever the child has mapped at those
# addresses since.
_live_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_kept_in_child: list[list[mmap.mmap]] = []


def _keep_mappings_in_child() -> None:
    _kept_in_child.append(list(_live_mappings))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_mappings_in_child)


def size_class_bytes(num_bytes: int) -> int:
    """Return how much of a pool's budget a buffer of `num_bytes` takes.

    From 1 MiB on the next multiple of 2 MiB, below that the next power of two of 4096 bytes.
    """
    if num_bytes <= 0:
        raise ValueError(f"num_bytes={num_bytes} is not positive; a buffer holds at least one byte")
    if num_bytes >= _SMALLEST_HUGE_BYTES:
        return round_up(num_bytes, HUGE_PAGE_BYTES)
    return max(ALIGNMENT_BYTES, 1 << (num_bytes - 1).bit_length())


class _Mapping:
    """One private anonymous mapping, with the aligned part that buffers are cut from."""

    __slots__ = ("address", "memory", "num_bytes", "offset_bytes")

    def __init__(self, num_bytes: int, *, prefault: bool) -> None:
        huge = num_bytes >= HUGE_PAGE_BYTES
        alignment_bytes = HUGE_PAGE_BYTES if huge else ALIGNMENT_BYTES
        # The spare bytes for the alignment are address space only: nobody touches them, so they never become
        # memory.
        spare_bytes = alignment_bytes if alignment_bytes > mmap.PAGESIZE else 0
        self.memory = mmap.mmap(-1, num_bytes + spare_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _live_mappings.add(self.memory)
        start_address = _address_of(np.frombuffer(self.memory, np.uint8, 1))
        self.offset_bytes = round_up(start_address, alignment_bytes) - start_address
        self.address = start_address + self.offset_bytes
        self.num_bytes = num_bytes
        if hasattr(mmap, "MADV_DONTFORK"):
            self.memory.madvise(mmap.MADV_DONTFORK, self.offset_bytes, num_bytes)
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without transparent huge pages is slower, otherwise equal.
            with contextlib.suppress(OSError):
                self.memory.madvise(mmap.MADV_HUGEPAGE, self.offset_bytes, num_bytes)
        if prefault:
            self.view(num_bytes)[::ALIGNMENT_BYTES] = 0

    def view(self, num_bytes: int) -> ByteArray:
        return np.frombuffer(self.memory, np.uint8, num_bytes, self.offset_bytes)

    def close(self) -> None:
        # While somebody holds a view, the memory must live: it unmaps itself when the last view is collected.
        with contextlib.suppress(BufferError):
            self.memory.close()


def _address_of(array: npt.NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


class Buffer:
    """A piece of a pool's memory with one owner, who gives it back by `release()` or by leaving a `with`
    block.
    """

    __slots__ = ("_array", "_mapping", "_pool", "address", "num_bytes")

    def __init__(self, pool: BufferPool, mapping: _Mapping, num_bytes: int) -> None:
        self._pool = pool
        self._mapping: _Mapping | None = mapping
        self._array: ByteArray | None = mapping.view(num_bytes)
        self.num_bytes = num_bytes
        self.address = mapping.address

    @property
    def array(self) -> ByteArray:
        """The bytes: uint8, 1-D, writable, host memory. Valid until `release()`; content is whatever was
        there.
        """
        if self._array is None:
            raise RuntimeError(
                f"the buffer of {self.num_bytes} bytes is already released and may belong to another owner; "
                "acquire a new one"
            )
        return self._array

    def release(self) -> None:
        """Give the memory back to the pool: views of `array` are void from here on. A second call raises."""
        mapping, self._mapping, self._array = self._mapping, None, None
        if mapping is None:
            raise RuntimeError(
                f"the buffer of {self.num_bytes} bytes is released twice; its memory may have a new owner "
                "already, so release it once, where its last use ends"
            )
        self._pool._take_back(mapping)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mapping is not None:
            self.release()


class BufferPool:
    """Buffers of any size out of a fixed budget; freed ones are kept for the next owner of their size class.

    `register(address, num_bytes)` is called for each new mapping and `unregister(address)` before it is
    unmapped (cudaHostRegister and its opposite). `prefault` touches each page once, so that no transfer pays
    for page faults. Thread safe. Not usable in a forked child.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        name: str,
        register: Callable[[int, int], None] | None = None,
        unregister: Callable[[int], None] | None = None,
        prefault: bool = True,
    ) -> None:
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes={budget_bytes} of pool {name!r} is not positive; give it some memory")
        self.name = name
        self.budget_bytes = budget_bytes
        self._register = register
        self._unregister = unregister
        self._prefault = prefault
        self._changed = threading.Condition()
        self._free: list[_Mapping] = []  # oldest release first: that is the order of eviction
        self._free_bytes = 0
        self._mapped_bytes = 0  # includes mappings being made outside of the lock
        self._peak_bytes = 0
        self._num_out = 0
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget that buffers with an owner take."""
        with self._changed:
            return self._mapped_bytes - self._free_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of memory the pool holds, free buffers included; at most the budget."""
        return self._mapped_bytes

    @property
    def peak_bytes(self) -> int:
        """The largest `mapped_bytes` so far."""
        return self._peak_bytes

    def acquire(self, num_bytes: int, *, block: bool = True, timeout_seconds: float | None = None) -> Buffer:
        """Return a buffer of at least `num_bytes` bytes, 4096-aligned (2 MiB from 1 MiB on); the caller owns
        it.

        Its array has `num_bytes` rounded up to 4096 bytes. Waits until others release enough, at most
        `timeout_seconds`. BudgetError: it exceeds the whole budget, or `block=False` and it is not free now;
        TimeoutError: nobody released enough in time; OSError: the machine has no memory.
        """
        needed_bytes = size_class_bytes(num_bytes)
        if needed_bytes > self.budget_bytes:
            raise BudgetError(
                f"pool {self.name!r}: a buffer of {num_bytes} bytes takes {needed_bytes}, more than the "
                f"whole budget of {self.budget_bytes}; raise the budget or work in smaller pieces"
            )
        mapping = self._reserve(needed_bytes, num_bytes, block, timeout_seconds)
        if mapping is None:
            mapping = self._map(needed_bytes)
        return Buffer(self, mapping, round_up(num_bytes, ALIGNMENT_BYTES))

    def _reserve(
        self, needed_bytes: int, num_bytes: int, block: bool, timeout_seconds: float | None
    ) -> _Mapping | None:
        """Take a free mapping, or book room for a new one and return None."""
        deadline_seconds = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                if self._closed:
                    raise RuntimeError(f"pool {self.name!r} is closed; make a new one")
                for index in range(len(self._free) - 1, -1, -1):
                    if self._free[index].num_bytes == needed_bytes:  # the newest is the likeliest to be in a cache
                        mapping = self._free.pop(index)
                        self._free_bytes -= needed_bytes
                        self._num_out += 1
                        return mapping
                if self._mapped_bytes - self._free_bytes + needed_bytes <= self.budget_bytes:
                    while self._mapped_bytes + needed_bytes > self.budget_bytes:
                        self._evict(self._free[0])
                    self._mapped_bytes += needed_bytes
                    self._peak_bytes = max(self._peak_bytes, self._mapped_bytes)
                    self._num_out += 1
                    return None
                text = (
                    f"pool {self.name!r}: {num_bytes} bytes take {needed_bytes} of the budget of "
                    f"{self.budget_bytes}, of which {self._mapped_bytes - self._free_bytes} are in use by "
                    f"{self._num_out} buffers"
                )
                if not block:
                    raise BudgetError(f"{text}; release some first, or wait with block=True")
                left_seconds = None if deadline_seconds is None else deadline_seconds - time.monotonic()
                if left_seconds is not None and left_seconds <= 0:
                    raise TimeoutError(f"{text}; nobody released enough within {timeout_seconds} s")
                self._changed.wait(left_seconds)

    def _map(self, num_bytes: int) -> _Mapping:
        # Outside of the lock: touching or registering a big mapping takes long, and the room is already
        # booked.
        try:
            mapping = _Mapping(num_bytes, prefault=self._prefault)
            if self._register is not None:
                self._register(mapping.address, num_bytes)
        except BaseException:
            with self._changed:
                self._mapped_bytes -= num_bytes
                self._num_out -= 1
                self._changed.notify_all()
            raise
        return mapping

    def _evict(self, mapping: _Mapping) -> None:
        self._free.remove(mapping)
        self._free_bytes -= mapping.num_bytes
        self._mapped_bytes -= mapping.num_bytes
        self._unmap(mapping)

    def _unmap(self, mapping: _Mapping) -> None:
        if self._unregister is not None:
            self._unregister(mapping.address)
        mapping.close()

    def _take_back(self, mapping: _Mapping) -> None:
        with self._changed:
            self._num_out -= 1
            if self._closed:
                self._mapped_bytes -= mapping.num_bytes
                self._unmap(mapping)
            else:
                self._free.append(mapping)
                self._free_bytes += mapping.num_bytes
                self._shrink()
            self._changed.notify_all()

    def limit(self, budget_bytes: int) -> None:
        """Change the budget; what is free beyond it is unmapped at once, what is out beyond it when it comes back."""
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes={budget_bytes} of pool {self.name!r} is not positive; give it some memory")
        with self._changed:
            self.budget_bytes = budget_bytes
            self._shrink()
            self._changed.notify_all()

    def _shrink(self) -> None:
        while self._free and self._mapped_bytes > self.budget_bytes:
            self._evict(self._free[0])

    def trim(self) -> None:
        """Unmap every free buffer, so that `mapped_bytes` falls to `used_bytes`."""
        with self._changed:
            while self._free:
                self._evict(self._free[0])

    def close(self, *, force: bool = False) -> None:
        """Unmap everything; EngineError if buffers are out, unless `force` (then each is unmapped at its
        release).
        """
        with self._changed:
            if self._num_out and not force:
                raise EngineError(
                    f"pool {self.name!r} cannot close: {self._num_out} buffers "
                    f"({self._mapped_bytes - self._free_bytes} bytes) are not released; release them, or "
                    "force=True"
                )
            self._closed = True
            while self._free:
                self._evict(self._free[0])
            self._changed.notify_all()

    def __enter__(self) -> BufferPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(force=kind is not None)
