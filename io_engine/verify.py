"""Reading extents back and comparing them with their checksums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import xxhash

from io_engine.buffers import Buffer, BufferPool, ByteArray
from io_engine.checksums import PIECES_PREFIX, WHOLE_PREFIX, combine_checksums
from io_engine.engine import Engine, Transfer
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up

CHUNK_BYTES = 8 << 20
"""Bytes of one read; two are under way or being hashed at a time."""


def checksum_on_disk(
    engine: Engine, extent: Extent, num_bytes: int, piece_bytes: int, stored: str, pool: BufferPool
) -> str:
    """Return the checksum of the first `num_bytes` of an extent, of the sort that `stored` is.

    Blocks; takes two buffers of `CHUNK_BYTES` from the pool. ValueError for an unknown sort, OSError from the
    drive.
    """
    if stored.startswith(WHOLE_PREFIX):
        whole = xxhash.xxh3_64()
        for part in read_parts(engine, extent, num_bytes, pool):
            whole.update(part.data)
        return WHOLE_PREFIX + whole.hexdigest()
    if not stored.startswith(PIECES_PREFIX):
        raise ValueError(f"the checksum {stored!r} starts with neither {WHOLE_PREFIX!r} nor {PIECES_PREFIX!r}")
    digests: list[int] = []
    piece, left_bytes = xxhash.xxh3_64(), piece_bytes or num_bytes
    for part in read_parts(engine, extent, num_bytes, pool):
        while part.size:
            head, part = part[:left_bytes], part[left_bytes:]
            piece.update(head.data)
            left_bytes -= head.size
            if left_bytes == 0:
                digests.append(piece.intdigest())
                piece, left_bytes = xxhash.xxh3_64(), piece_bytes or num_bytes
    if left_bytes != (piece_bytes or num_bytes):
        digests.append(piece.intdigest())
    return combine_checksums(digests)


def read_parts(engine: Engine, extent: Extent, num_bytes: int, pool: BufferPool) -> Iterator[ByteArray]:
    """Yield the first `num_bytes` of an extent, part after part; a part is valid until the next is asked for.

    The next part is read while the caller works on this one.
    """
    buffers: list[Buffer] = []
    under_way: list[Transfer] = []
    chunk_bytes = min(CHUNK_BYTES, extent.num_bytes)

    def start(begin_bytes: int) -> None:
        size_bytes = min(chunk_bytes, round_up(num_bytes - begin_bytes, ALIGNMENT_BYTES))
        array = buffers[begin_bytes // chunk_bytes % len(buffers)].array[:size_bytes]
        under_way.append(engine.read(extent.sub(begin_bytes, size_bytes), array))

    try:
        for _ in range(2 if num_bytes > chunk_bytes else 1):
            buffers.append(pool.acquire(chunk_bytes))
        start(0)
        for begin_bytes in range(0, num_bytes, chunk_bytes):
            transfer = under_way[0]
            transfer.wait()
            under_way.pop(0)
            if begin_bytes + chunk_bytes < num_bytes:
                # Into the other buffer: the caller has asked for this part, so it is done with the one
                # before.
                start(begin_bytes + chunk_bytes)
            yield transfer.array[: min(transfer.num_bytes, num_bytes - begin_bytes)]
    finally:
        finish(under_way)
        for buffer in buffers:
            buffer.release()


def finish(transfers: list[Transfer]) -> list[BaseException]:
    """Wait for all of them, whatever becomes of them, and return their errors: then their arrays are free."""
    errors: list[BaseException] = []
    for transfer in transfers:
        try:
            transfer.wait()
        except Exception as error:
            errors.append(error)
    return errors


def write_zeros(engine: Engine, sizes: Mapping[str, int]) -> None:
    """Write zeros over the first so many bytes (a multiple of 4096) of each file and sync it; blocks. OSError as it comes.

    Blocks of a file that were never written cost half the write speed the first time; this pays for it at
    creation. The files progress in proportion to their sizes, so that drives that got their share work all the time.
    """
    chunks = [
        (begin_bytes / num_bytes, Extent(path, begin_bytes, min(CHUNK_BYTES, num_bytes - begin_bytes)))
        for path, num_bytes in sizes.items()
        for begin_bytes in range(0, num_bytes, CHUNK_BYTES)
    ]
    if not chunks:
        return
    chunks.sort(key=lambda item: item[0])
    largest_bytes = max(extent.num_bytes for _, extent in chunks)
    with BufferPool(round_up(largest_bytes, CHUNK_BYTES), name="zeros") as pool, pool.acquire(largest_bytes) as buffer:
        zeros = buffer.array
        zeros.fill(np.uint8(0))
        under_way: list[Transfer] = []
        try:
            for _, extent in chunks:
                if len(under_way) == 4 * len(sizes):
                    under_way.pop(0).wait()
                under_way.append(engine.write(extent, zeros[: extent.num_bytes]))
            while under_way:
                under_way.pop(0).wait()
        finally:
            finish(under_way)
    for path in sizes:
        engine.sync(path)
