"""Where each extent of a store lies: the data behind layout-<n>.json, and the placing of new ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from io_engine.durable import Json
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up

BIG_EXTENT_BYTES = 2 << 20
"""Extents of at least this size start at multiples of it, so that big requests are not split at odd places.
"""

FORMAT_VERSION = 1


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
    """An extent's sizes and its slots, each (index of the file, offset in bytes)."""

    num_bytes: int
    piece_bytes: int
    slots: tuple[tuple[int, int], ...]

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
    description: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self, store_uuid: str) -> Json:
        """Return the body of layout-<n>.json."""
        return {
            "format": "fuyou-store-layout",
            "version": FORMAT_VERSION,
            "uuid": store_uuid,
            "generation": self.generation,
            "files": [
                {"name": file.name, "directory": file.directory, "num_bytes": file.num_bytes} for file in self.files
            ],
            "extents": {
                name: {
                    "num_bytes": extent.num_bytes,
                    "piece_bytes": extent.piece_bytes,
                    "slots": list(extent.slots),
                }
                for name, extent in self.extents.items()
            },
            "description": dict(self.description),
        }

    @classmethod
    def from_json(cls, body: Json) -> Layout:
        """Return the layout that `to_json` described."""
        return cls(
            generation=body["generation"],
            files=tuple(DataFile(file["name"], file["directory"], file["num_bytes"]) for file in body["files"]),
            extents={
                name: PlacedExtent(
                    extent["num_bytes"],
                    extent["piece_bytes"],
                    tuple((index, offset) for index, offset in extent["slots"]),
                )
                for name, extent in body["extents"].items()
            },
            description=body["description"],
        )

    def path(self, file_index: int, directories: Sequence[str]) -> str:
        """Return the path of a data file."""
        file = self.files[file_index]
        return os.path.join(directories[file.directory], file.name)

    def extent(self, name: str, slot: int, directories: Sequence[str]) -> Extent:
        """Return where a slot of an extent lies."""
        placed = self.extents[name]
        file_index, offset_bytes = placed.slots[slot]
        return Extent(self.path(file_index, directories), offset_bytes, placed.disk_bytes)


def extend_layout(
    old: Layout,
    specs: Iterable[ExtentSpec],
    second_slots_for: Iterable[str],
    num_directories: int,
    generation: int,
    description: Mapping[str, Json] | None,
) -> Layout:
    """Return `old` with new extents and second slots in new files, one per directory that gets any.

    Each slot goes to the directory with the fewest bytes of this store so far. Big ones come first in a file:
    small ones between them would cost up to 2 MiB of gap each.
    """
    extents = dict(old.extents)
    wanted: list[tuple[str, int]] = []  # a name once per slot to place
    for name in second_slots_for:
        wanted.append((name, extents[name].disk_bytes))
    for spec in specs:
        extents[spec.name] = PlacedExtent(spec.num_bytes, spec.piece_bytes, ())
        wanted.extend([(spec.name, extents[spec.name].disk_bytes)] * spec.num_slots)
    filled_bytes = [sum(file.num_bytes for file in old.files if file.directory == i) for i in range(num_directories)]
    end_bytes = [0] * num_directories
    placed: dict[str, list[tuple[int, int]]] = {}  # name -> (directory, offset)
    for name, num_bytes in sorted(wanted, key=lambda item: item[1] < BIG_EXTENT_BYTES):
        directory = min(range(num_directories), key=lambda i: filled_bytes[i] + end_bytes[i])
        alignment_bytes = BIG_EXTENT_BYTES if num_bytes >= BIG_EXTENT_BYTES else ALIGNMENT_BYTES
        offset_bytes = round_up(end_bytes[directory], alignment_bytes)
        placed.setdefault(name, []).append((directory, offset_bytes))
        end_bytes[directory] = offset_bytes + num_bytes
    files = list(old.files)
    file_index_of: dict[int, int] = {}
    for directory, num_bytes in enumerate(end_bytes):
        if num_bytes:
            file_index_of[directory] = len(files)
            files.append(DataFile(f"extents-{generation}.bin", directory, num_bytes))
    for name, places in placed.items():
        slots = tuple((file_index_of[directory], offset) for directory, offset in places)
        before = extents[name]
        extents[name] = PlacedExtent(before.num_bytes, before.piece_bytes, before.slots + slots)
    return Layout(
        generation,
        tuple(files),
        extents,
        old.description if description is None else dict(description),
    )
