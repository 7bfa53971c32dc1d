"""Checksums of extents: xxh3_64, whole or in pieces, so that pieces can be hashed while they are in the CPU's
cache.

`checksum(array)` = "xxh3:" + 16 hex digits, over all the bytes. `combine_checksums(digests)` = "xxh3-pieces:"
+ 16 hex digits, over the digests of consecutive pieces as little-endian u64. The prefix says which one a
stored text is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from io_engine.buffers import ByteArray

WHOLE_PREFIX = "xxh3:"
PIECES_PREFIX = "xxh3-pieces:"


def piece_digest(array: ByteArray) -> int:
    """Return xxh3_64 (seed 0) of the bytes of one piece, contiguous; blocks at about 25 GB/s.

    python-xxhash releases the GIL while it hashes large inputs, so worker threads hash side by side.
    """
    return xxhash.xxh3_64_intdigest(array.data)


def combine_checksums(digests: Sequence[int]) -> str:
    """Return the checksum of an extent from the `piece_digest`s of its consecutive pieces, in order."""
    return PIECES_PREFIX + xxhash.xxh3_64_hexdigest(np.asarray(digests, dtype="<u8").tobytes())


def checksum(array: ByteArray) -> str:
    """Return the checksum of an extent whose bytes are all in `array`, contiguous."""
    return WHOLE_PREFIX + xxhash.xxh3_64_hexdigest(array.data)
