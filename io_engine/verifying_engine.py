"""What a store has committed is checked when it is first read: what the drive has changed since never arrives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from io_engine.buffers import ByteArray
from io_engine.checksums import listed_digests, piece_digest
from io_engine.engine import Engine, Transfer
from io_engine.errors import StoreCorruptError
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up
from io_engine.store import Store


@dataclass(frozen=True)
class _Piece:
    """A piece of an extent, and what it must hash to."""

    name: str
    whole: Extent
    begin_bytes: int
    num_bytes: int
    digest: int

    @property
    def disk_bytes(self) -> int:
        return round_up(self.num_bytes, ALIGNMENT_BYTES)


_Place = tuple[str, int]
"""Path and offset of a piece's first byte."""
_Found = tuple[_Place, int, _Piece]
"""A piece in a transfer, and the byte of the transfer at which it begins."""


class VerifyingEngine:
    """Another engine, through which the first read of each piece that `store` has committed by now is checked.

    The reads must begin where pieces do; other reads pass unchecked, and so do pieces of which the manifest has only a
    checksum of all together (stores of earlier versions). A read whose bytes are not those committed fails:
    `Transfer.wait` raises StoreCorruptError with extent, file, offset and the way out. Pieces are hashed in the I/O
    threads, at some 25 GB/s. Costs nothing any more when everything was read once. Everything else, `close`
    included, is the other engine's. StoreCorruptError if the manifest has a checksum that is none.
    """

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine, self._store = engine, store
        # By where it begins.
        self._pieces: dict[_Place, _Piece] = {}
        for name, stored in store.checksums.items():
            for piece in _pieces(store, name, stored):
                first = piece.whole.sub(piece.begin_bytes, piece.disk_bytes)
                self._pieces[first.path, first.offset_bytes] = piece
        # What was found right, or is written over, goes.
        self._unread = set(self._pieces)

    def read(self, extent: Extent, array: ByteArray) -> Transfer:
        """See `Engine.read`."""
        pieces = list(self._pieces_in(extent))
        inner = self._engine.read(extent, array)
        return _CheckedRead(inner, self, pieces) if pieces else inner

    def write(self, extent: Extent, array: ByteArray) -> Transfer:
        """See `Engine.write`."""
        self._unread.difference_update(place for place, _, _ in self._pieces_in(extent))
        return self._engine.write(extent, array)

    def _pieces_in(self, extent: Extent) -> Iterator[_Found]:
        """Pieces that were not read yet, of those that follow each other from the extent's beginning on."""
        begin_bytes = 0
        while self._unread and begin_bytes < extent.num_bytes:
            first = extent.sub(begin_bytes, ALIGNMENT_BYTES)
            place = (first.path, first.offset_bytes)
            piece = self._pieces.get(place)
            if piece is None or begin_bytes + piece.disk_bytes > extent.num_bytes:
                return
            if place in self._unread:
                yield place, begin_bytes, piece
            begin_bytes += piece.disk_bytes

    def check(self, pieces: list[_Found], array: ByteArray) -> None:
        """For reads that have ended well: StoreCorruptError for the first piece that is not as committed."""
        for place, begin_bytes, piece in pieces:
            if piece_digest(array[begin_bytes : begin_bytes + piece.num_bytes]) != piece.digest:
                raise self._store.damaged(piece.name, piece.whole, piece.begin_bytes, piece.num_bytes)
            self._unread.discard(place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _CheckedRead(Transfer):
    """A read that is done when its bytes were checked."""

    def __init__(self, inner: Transfer, engine: VerifyingEngine, pieces: list[_Found]) -> None:
        super().__init__(inner.kind, inner.extent, inner.array, inner.submitted_seconds)
        self.unfinished = inner.unfinished
        self._inner, self._checker, self._pieces = inner, engine, pieces
        inner.add_done_callback(self._arrived)

    def _arrived(self, inner: Transfer) -> None:
        error = inner.error
        if error is None:
            try:
                self._checker.check(self._pieces, inner.array)
            except BaseException as found:  # whatever it is, the waiting thread must get it
                error = found.with_traceback(None)
        self.mark_started(inner.started_seconds)
        self.mark_done(error, inner.ended_seconds)

    def wait(self, timeout_seconds: float | None = None) -> None:
        self._inner.wait(timeout_seconds)  # which, with engines in virtual time, is what brings it about
        super().wait(timeout_seconds)


def _pieces(store: Store, name: str, stored: str) -> Iterator[_Piece]:
    spec, whole = store.spec(name), store.extent(name)
    try:
        digests = listed_digests(stored)
    except ValueError as error:
        raise StoreCorruptError(f"extent {name!r}: {error}. {store.way_out()}") from None
    if digests is None:
        return
    piece_bytes = spec.num_bytes if len(digests) == 1 else spec.piece_bytes
    if piece_bytes == 0 or len(digests) != -(-spec.num_bytes // piece_bytes):
        raise StoreCorruptError(f"extent {name!r}: its checksum has {len(digests)} pieces. {store.way_out()}")
    if len(digests) > 1 and piece_bytes % ALIGNMENT_BYTES:
        return
    for number, digest in enumerate(digests):
        begin_bytes = number * piece_bytes
        yield _Piece(name, whole, begin_bytes, min(piece_bytes, spec.num_bytes - begin_bytes), digest)
