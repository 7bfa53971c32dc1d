"""Where each extent of a store lies: the data behind layout-<n>.json, and the placing of new ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from io_engine.durable import Json
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up
from io_engine.striping import BIG_BYTES, Piece, Striper

LAYOUT_VERSION = 2
"""Version 1 had slots in one piece: `[file, offset]`."""

Slot = tuple[tuple[int, int, int], ...]
"""The ranges of a slot in their order, each (index of the file, offset, number of bytes)."""


@dataclass(frozen=True)
class ExtentSpec:
    """A named extent to be made: `num_bytes` of content, rounded up to 4096 on disk, in `num_slots` slots (1
    or 2).

    `piece_bytes` is the length of the pieces that a checksum in pieces is made of; 0 means one piece.
    """

    name: str
    num_bytes: int
    num_slots: int = 1
    piece_bytes: int = 0

    def __post_init__(self) -> None:
        if self.num_bytes <= 0:
            raise ValueError(
                f"extent {self.name!r}: num_bytes={self.num_bytes} is not positive; leave empty extents out"
            )
        if self.num_slots not in (1, 2):
            raise ValueError(
                f"extent {self.name!r}: num_slots={self.num_slots}; use 1, or 2 to write beside what is read"
            )
        if self.piece_bytes < 0:
            raise ValueError(f"extent {self.name!r}: piece_bytes={self.piece_bytes} is negative; 0 means one piece")


@dataclass(frozen=True)
class DataFile:
    """A preallocated file of extents in the directory of that index."""

    name: str
    directory: int
    num_bytes: int


@dataclass(frozen=True)
class PlacedExtent:
    """An extent's sizes, and where its slots lie."""

    num_bytes: int
    piece_bytes: int
    slots: tuple[Slot, ...]

    @property
    def disk_bytes(self) -> int:
        """Bytes of one slot."""
        return round_up(self.num_bytes, ALIGNMENT_BYTES)


@dataclass(frozen=True)
class Layout:
    """All files and extents of a store; immutable, a new generation replaces it."""

    generation: int = 0
    files: tuple[DataFile, ...] = ()
    extents: Mapping[str, PlacedExtent] = field(default_factory=dict)
    bytes_per_second: tuple[float, ...] | None = None
    """Of each directory, by which the last allocation was spread; None: alike."""
    description: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self, store_uuid: str) -> Json:
        """Return the body of layout-<n>.json."""
        return {
            "format": "fuyou-store-layout",
            "version": LAYOUT_VERSION,
            "uuid": store_uuid,
            "generation": self.generation,
            "files": [
                {"name": file.name, "directory": file.directory, "num_bytes": file.num_bytes} for file in self.files
            ],
            "extents": {
                name: {
                    "num_bytes": extent.num_bytes,
                    "piece_bytes": extent.piece_bytes,
                    "slots": [[list(part) for part in slot] for slot in extent.slots],
                }
                for name, extent in self.extents.items()
            },
            "bytes_per_second": None if self.bytes_per_second is None else list(self.bytes_per_second),
            "description": dict(self.description),
        }

    @classmethod
    def from_json(cls, body: Json) -> Layout:
        """Return the layout that a body of version 1 or 2 describes."""
        rates = body.get("bytes_per_second")
        return cls(
            generation=body["generation"],
            files=tuple(DataFile(file["name"], file["directory"], file["num_bytes"]) for file in body["files"]),
            extents={name: _placed_from_json(extent, body["version"]) for name, extent in body["extents"].items()},
            bytes_per_second=None if rates is None else tuple(rates),
            description=body["description"],
        )

    def path(self, file_index: int, directories: Sequence[str]) -> str:
        """Return the path of a data file."""
        file = self.files[file_index]
        return os.path.join(directories[file.directory], file.name)

    def extent(self, name: str, slot: int, directories: Sequence[str]) -> Extent:
        """Return where a slot of an extent lies."""
        return Extent.join(
            Extent(self.path(file_index, directories), offset_bytes, num_bytes)
            for file_index, offset_bytes, num_bytes in self.extents[name].slots[slot]
        )


def _placed_from_json(body: Json, version: int) -> PlacedExtent:
    num_bytes, slots = body["num_bytes"], body["slots"]
    if version == 1:
        slots = [
            [[file_index, offset_bytes, round_up(num_bytes, ALIGNMENT_BYTES)]] for file_index, offset_bytes in slots
        ]
    return PlacedExtent(num_bytes, body["piece_bytes"], tuple(tuple((i, o, n) for i, o, n in slot) for slot in slots))


def extend_layout(
    old: Layout,
    specs: Iterable[ExtentSpec],
    second_slots_for: Iterable[str],
    striper: Striper,
    generation: int,
    description: Mapping[str, Json] | None,
    bytes_per_second: tuple[float, ...] | None = None,
) -> Layout:
    """Return `old` with new extents and second slots in new files, one per directory that gets any.

    `striper` says where, beginning with empty files. Big ones come first in a file: small ones between them would
    cost up to 2 MiB of gap each.
    """
    extents = dict(old.extents)
    wanted: list[tuple[str, int]] = []  # a name once per slot to place
    for name in second_slots_for:
        wanted.append((name, extents[name].disk_bytes))
    for spec in specs:
        extents[spec.name] = PlacedExtent(spec.num_bytes, spec.piece_bytes, ())
        wanted.extend([(spec.name, extents[spec.name].disk_bytes)] * spec.num_slots)
    placed: dict[str, list[tuple[Piece, ...]]] = {}
    for name, num_bytes in sorted(wanted, key=lambda item: item[1] < BIG_BYTES):
        placed.setdefault(name, []).append(striper.place(num_bytes))
    files = list(old.files)
    file_index_of: dict[int, int] = {}
    for directory, num_bytes in enumerate(striper.end_bytes):
        if num_bytes:
            file_index_of[directory] = len(files)
            files.append(DataFile(f"extents-{generation}.bin", directory, num_bytes))
    for name, places in placed.items():
        slots = tuple(
            tuple((file_index_of[piece.directory], piece.offset_bytes, piece.num_bytes) for piece in pieces)
            for pieces in places
        )
        before = extents[name]
        extents[name] = PlacedExtent(before.num_bytes, before.piece_bytes, before.slots + slots)
    return Layout(
        generation,
        tuple(files),
        extents,
        bytes_per_second,
        old.description if description is None else dict(description),
    )
