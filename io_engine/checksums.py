"""Checksums of extents: xxh3_64, whole or in pieces, so that pieces can be hashed while they are in the CPU's
cache, and each be checked when it is read.

`checksum(array)` = "xxh3:" + 16 hex digits, over all the bytes. `combine_checksums(digests)` = "xxh3-list:" + 16
hex digits for each of the consecutive pieces. Stores of earlier versions have "xxh3-pieces:" + 16 hex digits, over
the digests of the pieces as little-endian u64. The prefix says which one a stored text is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import xxhash

from io_engine.buffers import ByteArray

WHOLE_PREFIX = "xxh3:"
LIST_PREFIX = "xxh3-list:"
PIECES_PREFIX = "xxh3-pieces:"

_DIGITS = re.compile(r"([0-9a-f]{16})+")


def piece_digest(array: ByteArray) -> int:
    """Return xxh3_64 (seed 0) of the bytes of one piece, contiguous; blocks at about 25 GB/s.

    python-xxhash releases the GIL while it hashes large inputs, so worker threads hash side by side.
    """
    return xxhash.xxh3_64_intdigest(array.data)


def combine_checksums(digests: Sequence[int]) -> str:
    """Return the checksum of an extent from the `piece_digest`s of its consecutive pieces, in order."""
    return LIST_PREFIX + "".join(f"{digest:016x}" for digest in digests)


def listed_digests(stored: str) -> tuple[int, ...] | None:
    """Return the digests of an extent's pieces, where its checksum says them: None for the earlier form.

    A whole checksum is the digest of one piece. ValueError for a text that is no checksum.
    """
    prefix = stored[: stored.find(":") + 1]
    digits = stored[len(prefix) :]
    if prefix not in (WHOLE_PREFIX, LIST_PREFIX, PIECES_PREFIX) or not _DIGITS.fullmatch(digits):
        raise ValueError(f"{stored[:40]!r} is no checksum: expected {LIST_PREFIX!r} and 16 hex digits for each piece")
    if prefix != LIST_PREFIX and len(digits) != 16:
        raise ValueError(f"the checksum {stored[:40]!r} has {len(digits)} hex digits, not 16")
    if prefix == PIECES_PREFIX:
        return None
    return tuple(int(digits[at : at + 16], 16) for at in range(0, len(digits), 16))


def checksum(array: ByteArray) -> str:
    """Return the checksum of an extent whose bytes are all in `array`, contiguous."""
    return WHOLE_PREFIX + xxhash.xxh3_64_hexdigest(array.data)
