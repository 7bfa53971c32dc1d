"""Where bytes lie: a path, an offset and a length that direct I/O accepts."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT_BYTES = 4096
"""Offsets, lengths and memory addresses of direct I/O are multiples of this; no drive asks for more."""


def round_up(num: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `num`."""
    return -(-num // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Extent:
    """`num_bytes` bytes of the file `path` from `offset_bytes` on; both are multiples of 4096."""

    path: str
    offset_bytes: int
    num_bytes: int

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
        return Extent(self.path, self.offset_bytes + offset_bytes, num_bytes)
