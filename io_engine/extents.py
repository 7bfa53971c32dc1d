"""Where bytes lie: a path, an offset and a length that direct I/O accepts, or several of them in a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

ALIGNMENT_BYTES = 4096
"""Offsets, lengths and memory addresses of direct I/O are multiples of this; no drive asks for more."""


def round_up(num: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `num`."""
    return -(-num // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Extent:
    """`num_bytes` bytes of the file `path` from `offset_bytes` on; both are multiples of 4096.

    A striped extent (made by `join`) is several such ranges, one behind the other: its `path` and `offset_bytes` are
    those of the first, its `num_bytes` the sum.
    """

    path: str
    offset_bytes: int
    num_bytes: int
    parts: tuple[Extent, ...] = ()
    """The ranges of a striped extent, none of them striped itself; empty if it lies in one piece."""

    def __post_init__(self) -> None:
        if self.offset_bytes < 0 or self.offset_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"offset_bytes={self.offset_bytes} is not a multiple of {ALIGNMENT_BYTES}, which direct I/O "
                f"needs; start at {max(self.offset_bytes, 0) // ALIGNMENT_BYTES * ALIGNMENT_BYTES}"
            )
        if self.num_bytes <= 0 or self.num_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"num_bytes={self.num_bytes} is not a positive multiple of {ALIGNMENT_BYTES}, which direct "
                f"I/O needs; use round_up(num_bytes, {ALIGNMENT_BYTES}) = "
                f"{max(round_up(self.num_bytes, ALIGNMENT_BYTES), 4096)}"
            )

    @classmethod
    def join(cls, parts: Iterable[Extent]) -> Extent:
        """Return the extents one behind the other as one; neighbours that touch in their file become one part."""
        joined: list[Extent] = []
        for part in (segment for given in parts for segment in given.segments):
            last = joined[-1] if joined else None
            if last is not None and last.path == part.path and last.offset_bytes + last.num_bytes == part.offset_bytes:
                joined[-1] = replace(last, num_bytes=last.num_bytes + part.num_bytes)
            else:
                joined.append(part)
        if not joined:
            raise ValueError("an extent is made of at least one part, and none is given")
        if len(joined) == 1:
            return joined[0]
        return cls(joined[0].path, joined[0].offset_bytes, sum(part.num_bytes for part in joined), tuple(joined))

    @property
    def segments(self) -> tuple[Extent, ...]:
        """The ranges in one piece that it is made of, in order: at least one."""
        return self.parts or (self,)

    def sub(self, offset_bytes: int, num_bytes: int) -> Extent:
        """Return the part that starts `offset_bytes` after this extent's start; ValueError when it sticks
        out.
        """
        if offset_bytes < 0 or offset_bytes + num_bytes > self.num_bytes:
            raise ValueError(
                f"bytes {offset_bytes} to {offset_bytes + num_bytes} lie outside the extent of "
                f"{self.num_bytes} bytes at offset {self.offset_bytes} of {self.path}; ask for a part within "
                "it"
            )
        if not self.parts or num_bytes <= 0:  # the latter is refused in its own words
            return Extent(self.path, self.offset_bytes + offset_bytes, num_bytes)
        found: list[Extent] = []
        begin_bytes, end_bytes = offset_bytes, offset_bytes + num_bytes  # relative to the next part
        for part in self.parts:
            first, last = max(begin_bytes, 0), min(end_bytes, part.num_bytes)
            if first < last:
                found.append(Extent(part.path, part.offset_bytes + first, last - first))
            begin_bytes, end_bytes = begin_bytes - part.num_bytes, end_bytes - part.num_bytes
        return Extent.join(found)
