"""Which directory gets which bytes: in proportion to the drives' bandwidth, as long as each has room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from io_engine.extents import ALIGNMENT_BYTES, round_up
from io_engine.space import Room

BIG_BYTES = 2 << 20
"""Ranges of at least this size start at multiples of it, so that big requests are not split at odd places."""

STRIPE_BYTES = 16 << 20
"""What goes to one directory before another has its turn; as long as a request that reaches a drive's full rate."""


@dataclass(frozen=True)
class Piece:
    """A range of the file of one directory, numbered as the store numbers its directories."""

    directory: int
    offset_bytes: int
    num_bytes: int


class Striper:
    """Places ranges in one file per directory, each behind what was placed before.

    `bytes_per_second` weighs the directories; `rooms` says what fits, and changes with what is placed. `end_bytes` are
    the present ends of the files; between directories that are equally loaded the one with fewer `other_bytes`, in
    proportion, comes first. Pure arithmetic: nothing is written. Not thread safe.
    """

    def __init__(
        self,
        bytes_per_second: Sequence[float],
        rooms: Sequence[Room],
        *,
        end_bytes: Sequence[int] | None = None,
        other_bytes: Sequence[int] | None = None,
    ) -> None:
        self._rates = bytes_per_second
        self._rooms = rooms
        self._other_bytes = other_bytes or [0] * len(rooms)
        self.end_bytes = list(end_bytes or [0] * len(rooms))
        """Where each directory's file ends now."""

    def place(self, num_bytes: int) -> tuple[Piece, ...]:
        """Return where the next `num_bytes` (a multiple of 4096) go, in order; at most 24 MiB stay in one piece."""
        pieces: list[Piece] = []
        for size_bytes in _stripes(num_bytes):
            directory = self._next_directory(size_bytes)
            alignment_bytes = BIG_BYTES if size_bytes >= BIG_BYTES else ALIGNMENT_BYTES
            begin_bytes = round_up(self.end_bytes[directory], alignment_bytes)
            self._rooms[directory].num_bytes -= begin_bytes + size_bytes - self.end_bytes[directory]
            self.end_bytes[directory] = begin_bytes + size_bytes
            last = pieces[-1] if pieces else None
            if last is not None and last.directory == directory and last.offset_bytes + last.num_bytes == begin_bytes:
                pieces[-1] = Piece(directory, last.offset_bytes, last.num_bytes + size_bytes)
            else:
                pieces.append(Piece(directory, begin_bytes, size_bytes))
        return tuple(pieces)

    def _next_directory(self, size_bytes: int) -> int:
        # Where it would be done first if all drives worked at once; a full one only if all are full, so that the
        # check of the space says how much is missing.
        def key(i: int) -> tuple[bool, float, float]:
            full = self._rooms[i].num_bytes < size_bytes + BIG_BYTES
            return full, (self.end_bytes[i] + size_bytes) / self._rates[i], self._other_bytes[i] / self._rates[i]

        return min(range(len(self._rooms)), key=key)


def _stripes(num_bytes: int) -> Iterable[int]:
    """Cut into stripes, of which the last is half a stripe to one and a half: no request is tiny."""
    num_stripes = max(1, (num_bytes + STRIPE_BYTES // 2) // STRIPE_BYTES)
    yield from [STRIPE_BYTES] * (num_stripes - 1)
    yield num_bytes - STRIPE_BYTES * (num_stripes - 1)


def check_rates(bytes_per_second: Sequence[float] | None, num_directories: int) -> tuple[float, ...] | None:
    """Return the rates as a tuple; ValueError unless there is a positive one for each directory."""
    if bytes_per_second is None:
        return None
    rates = tuple(float(rate) for rate in bytes_per_second)
    if len(rates) != num_directories or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(
            f"directory_bytes_per_second={list(rates)} must be one positive number for each of the {num_directories} "
            "directories, in their order; pass what probe_directory measured, or None to treat them alike"
        )
    return rates
