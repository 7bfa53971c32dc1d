"""Pattern data and buffers for the tests of io_engine."""

from __future__ import annotations

import numpy as np

from io_engine import BufferPool, ByteArray

PAGE = 4096


def pattern(num_bytes: int, seed: int) -> ByteArray:
    """Bytes in which every page differs from every other, so that swapped pages are seen."""
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def aligned(num_bytes: int, data: ByteArray | None = None) -> ByteArray:
    """A 4096-aligned array by plain numpy, independent of BufferPool."""
    raw = np.zeros(num_bytes + PAGE, np.uint8)
    skip = -raw.ctypes.data % PAGE
    array = raw[skip : skip + num_bytes]
    if data is not None:
        array[:] = data
    return array


def filled(pool: BufferPool, data: ByteArray) -> ByteArray:
    """A pool array holding `data`; the buffer goes when the pool is closed by force."""
    array = pool.acquire(data.size).array
    array[: data.size] = data
    return array
