"""Reading extents back: compared with their checksums, or copied; and writing zeros."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import xxhash

from io_engine.buffers import Buffer, BufferPool, ByteArray
from io_engine.checksums import PIECES_PREFIX, listed_digests
from io_engine.engine import Engine, Transfer
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up

CHUNK_BYTES = 8 << 20
"""Bytes of one read; two are under way or being hashed at a time."""


def find_damage(
    engine: Engine, extent: Extent, num_bytes: int, piece_bytes: int, stored: str, pool: BufferPool
) -> list[tuple[int, int]]:
    """Return where the first `num_bytes` of an extent differ from their checksum: (offset, length) of each piece.

    Blocks; takes two buffers of `CHUNK_BYTES` from the pool. ValueError for what is no checksum of this extent,
    OSError from the drive.
    """
    comparison = _Comparison(num_bytes, piece_bytes, stored)
    for part in read_parts(engine, extent, num_bytes, pool):
        comparison.add(part)
    return comparison.damage()


def copy_extent(
    engine: Engine,
    source: Extent,
    target: Extent,
    num_bytes: int,
    piece_bytes: int,
    stored: str | None,
    pool: BufferPool,
) -> list[tuple[int, int]]:
    """Copy an extent of `num_bytes` of content to one of the same length; arguments, result and errors as `find_damage`.

    What is damaged is copied too: do not use the copy then. `stored` None: nothing is compared.
    """
    comparison = None if stored is None else _Comparison(num_bytes, piece_bytes, stored)
    begin_bytes = 0
    for part in read_parts(engine, source, source.num_bytes, pool):
        transfer = engine.write(target.sub(begin_bytes, part.size), part)
        try:
            if comparison is not None:
                comparison.add(part[: max(0, num_bytes - begin_bytes)])
        finally:
            transfer.wait()  # before the next part is read into this memory
        begin_bytes += part.size
    return [] if comparison is None else comparison.damage()


class _Comparison:
    """The bytes of an extent against its checksum, as they come."""

    def __init__(self, num_bytes: int, piece_bytes: int, stored: str) -> None:
        self._num_bytes, self._stored = num_bytes, stored
        self._digests = listed_digests(stored)
        # A whole checksum has one piece, whatever the pieces of the extent's others are.
        one_piece = piece_bytes == 0 or (self._digests is not None and len(self._digests) == 1)
        self._piece_bytes = num_bytes if one_piece else piece_bytes
        num_pieces = -(-num_bytes // self._piece_bytes)
        if self._digests is not None and len(self._digests) != num_pieces:
            raise ValueError(f"the checksum has {len(self._digests)} pieces, the extent {num_pieces}")
        self._piece, self._left_bytes, self._num_done = xxhash.xxh3_64(), self._piece_bytes, 0
        self._combined = xxhash.xxh3_64()
        self._damage: list[tuple[int, int]] = []

    def add(self, part: ByteArray) -> None:
        while part.size:
            head, part = part[: self._left_bytes], part[self._left_bytes :]
            self._piece.update(head.data)
            self._left_bytes -= head.size
            if self._left_bytes == 0:
                self._end_piece()

    def _end_piece(self) -> None:
        digest, begin_bytes = self._piece.intdigest(), self._num_done * self._piece_bytes
        self._combined.update(digest.to_bytes(8, "little"))
        if self._digests is not None and digest != self._digests[self._num_done]:
            self._damage.append((begin_bytes, min(self._piece_bytes, self._num_bytes - begin_bytes)))
        self._piece, self._left_bytes, self._num_done = xxhash.xxh3_64(), self._piece_bytes, self._num_done + 1

    def damage(self) -> list[tuple[int, int]]:
        if self._left_bytes != self._piece_bytes:
            self._end_piece()
        if self._digests is None and self._stored != PIECES_PREFIX + self._combined.hexdigest():
            return [(0, self._num_bytes)]
        return self._damage


def describe_damage(name: str, extent: Extent, begin_bytes: int, num_bytes: int, contents: Sequence[str] = ()) -> str:
    """Say which bytes differ: of which extent, where they lie, and what they are, if `contents` names that."""
    end_bytes = min(round_up(begin_bytes + num_bytes, ALIGNMENT_BYTES), extent.num_bytes)
    start_bytes = begin_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    places = extent.sub(start_bytes, end_bytes - start_bytes).segments
    where = ", ".join(f"{place.num_bytes} at offset {place.offset_bytes} of {place.path}" for place in places[:3])
    of = f", of {', '.join(contents[:4])}{' ...' if len(contents) > 4 else ''}," if contents else ""
    return (
        f"extent {name!r} is damaged: its bytes {begin_bytes} to {begin_bytes + num_bytes} ({where}"
        f"{' ...' if len(places) > 3 else ''}){of} are not those that were committed"
    )


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
    zero_extents(engine, [Extent(path, 0, num_bytes) for path, num_bytes in sizes.items() if num_bytes])
    for path in sizes:
        engine.sync(path)


def zero_extents(engine: Engine, extents: Iterable[Extent]) -> None:
    """Write zeros over extents, all of them progressing in proportion to their sizes; blocks. OSError as it comes."""
    segments = [segment for extent in extents for segment in extent.segments]
    chunks = [
        (begin_bytes / segment.num_bytes, segment.sub(begin_bytes, min(CHUNK_BYTES, segment.num_bytes - begin_bytes)))
        for segment in segments
        for begin_bytes in range(0, segment.num_bytes, CHUNK_BYTES)
    ]
    if not chunks:
        return
    chunks.sort(key=lambda item: item[0])
    num_files = len({segment.path for segment in segments})
    largest_bytes = max(extent.num_bytes for _, extent in chunks)
    with BufferPool(round_up(largest_bytes, CHUNK_BYTES), name="zeros") as pool, pool.acquire(largest_bytes) as buffer:
        zeros = buffer.array
        zeros.fill(np.uint8(0))
        under_way: list[Transfer] = []
        try:
            for _, extent in chunks:
                if len(under_way) == 4 * num_files:
                    under_way.pop(0).wait()
                under_way.append(engine.write(extent, zeros[: extent.num_bytes]))
            while under_way:
                under_way.pop(0).wait()
        finally:
            finish(under_way)
