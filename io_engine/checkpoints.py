"""Checkpoints: named copies of everything that a store has committed, in files of their own."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from io_engine.buffers import BufferPool
from io_engine.durable import (
    OWNER_ONLY,
    Json,
    decode_checked,
    encode_checked,
    read_bytes,
    replace_durably,
    sync_directory,
)
from io_engine.engine import Engine
from io_engine.errors import StoreCorruptError, StoreError
from io_engine.extents import Extent
from io_engine.files import clone_range
from io_engine.layout import DataFile, Layout, PlacedExtent
from io_engine.manifest import Committed, check_format
from io_engine.schema import check_checksums, checked_layout, fields_of
from io_engine.space import check_space
from io_engine.verify import CHUNK_BYTES, copy_extent

CHECKPOINT_FILE = re.compile(r"checkpoint-(\d+)\.json")
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: what was committed then, and where its copy lies."""

    name: str
    number: int
    """Of its files; later checkpoints have larger ones."""
    step: int
    created_seconds: float
    """Since the epoch."""
    layout: Layout = field(repr=False)
    """Of its own files, one slot an extent."""
    checksums: Mapping[str, str] = field(repr=False)
    state: Mapping[str, Json] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of its files; where the file system shares blocks, it takes them only as training goes on."""
        return sum(file.num_bytes for file in self.layout.files)

    def to_bytes(self, uuid: str) -> bytes:
        """Return the bytes of checkpoint-<number>.json."""
        return encode_checked(
            {
                "format": "fuyou-store-checkpoint",
                "version": CHECKPOINT_VERSION,
                "uuid": uuid,
                "name": self.name,
                "number": self.number,
                "step": self.step,
                "created_seconds": self.created_seconds,
                "layout": self.layout.to_json(uuid),
                "checksums": dict(self.checksums),
                "state": dict(self.state),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, path: str, uuid: str, num_directories: int) -> Checkpoint:
        """Return what a file's bytes say; StoreCorruptError, or StoreError if they are of another format or store."""
        body = decode_checked(data, path)
        check_format(body, "fuyou-store-checkpoint", path, CHECKPOINT_VERSION)
        values = fields_of(
            body,
            path,
            {"uuid": str, "name": str, "number": int, "step": int, "created_seconds": (int, float)}
            | {"layout": dict, "checksums": dict, "state": dict},
        )
        if values["uuid"] != uuid or not CHECKPOINT_NAME.fullmatch(values["name"]) or values["step"] < -1:
            raise StoreCorruptError(f"{path} is no checkpoint of the store {uuid}; move it away")
        layout = checked_layout(values["layout"], path, num_directories, "checkpoint")
        check_checksums(values["checksums"], path, layout)
        return cls(
            values["name"],
            values["number"],
            values["step"],
            values["created_seconds"],
            layout,
            values["checksums"],
            values["state"],
        )


def read_checkpoints(directories: Sequence[str], uuid: str) -> tuple[list[Checkpoint], dict[int, str]]:
    """Return a store's checkpoints, the oldest first, and, by number, a sentence for each that cannot be read.

    Of two with one name the later counts: the earlier one was about to be removed.
    """
    found: dict[str, Checkpoint] = {}
    problems: dict[int, str] = {}
    matches = [match for match in map(CHECKPOINT_FILE.fullmatch, os.listdir(directories[0])) if match is not None]
    for number in sorted(int(match[1]) for match in matches):
        path = checkpoint_path(directories[0], number)
        try:
            checkpoint = Checkpoint.from_bytes(read_bytes(path), path, uuid, len(directories))
        except (OSError, StoreError) as error:
            problems[number] = f"the checkpoint of {os.path.basename(path)} is not usable ({error})"
            continue
        if checkpoint.number != number:
            problems[number] = f"{os.path.basename(path)} calls itself number {checkpoint.number}; rename it back"
            continue
        found.pop(checkpoint.name, None)
        found[checkpoint.name] = checkpoint
    return list(found.values()), problems


def checkpoint_layout(layout: Layout, slots: Mapping[str, int], number: int) -> Layout:
    """Return where a copy of the active slots goes: each range into the file of its own directory."""
    end_bytes: dict[int, int] = {}
    index_of = {directory: i for i, directory in enumerate(sorted({file.directory for file in layout.files}))}
    extents: dict[str, PlacedExtent] = {}
    for name, placed in layout.extents.items():
        ranges = []
        for file_index, _, num_bytes in placed.slots[slots.get(name, 0)]:
            directory = layout.files[file_index].directory
            ranges.append((index_of[directory], end_bytes.get(directory, 0), num_bytes))
            end_bytes[directory] = end_bytes.get(directory, 0) + num_bytes
        extents[name] = PlacedExtent(placed.num_bytes, placed.piece_bytes, (tuple(ranges),))
    files = tuple(
        DataFile(f"checkpoint-{number}.bin", directory, end_bytes.get(directory, 0)) for directory in index_of
    )
    return Layout(number, files, extents, layout.bytes_per_second, layout.description)


def make_checkpoint(
    committed: Committed,
    name: str,
    number: int,
    directories: Sequence[str],
    engine: Engine,
    damaged: Callable[[str, Extent, int, int], StoreCorruptError],
) -> Checkpoint:
    """Copy the active slots and make the copy durable; blocks. On any failure nothing of it is left.

    Shares blocks (FICLONERANGE) in directories whose file system does that; elsewhere the engine copies, and checks
    what it copies. OSError(ENOSPC) before anything is written; for data that are not as committed the error that
    `damaged` makes of the extent's name, its place, and the offset and length of the piece.
    """
    manifest, source = committed.manifest, committed.layout
    layout = checkpoint_layout(source, manifest.slots, number)
    needed_bytes = {directories[file.directory]: file.num_bytes for file in layout.files}
    check_space(needed_bytes, f"the checkpoint {name!r}")
    checkpoint = Checkpoint(name, number, manifest.step, time.time(), layout, manifest.checksums, manifest.state)
    made: list[str] = []
    try:
        for index in range(len(layout.files)):
            path = layout.path(index, directories)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, OWNER_ONLY))
            made.append(path)
        with BufferPool(2 * CHUNK_BYTES, name="checkpoint") as pool:
            shared: dict[str, bool] = {}
            for extent_name, placed in layout.extents.items():
                slot = manifest.slots.get(extent_name, 0)
                old, new = source.extent(extent_name, slot, directories), layout.extent(extent_name, 0, directories)
                if _share(old, new, shared):
                    continue
                stored = manifest.checksums.get(extent_name)
                damage = copy_extent(engine, old, new, placed.num_bytes, placed.piece_bytes, stored, pool)
                if damage:
                    raise damaged(extent_name, old, *damage[0])
        for path in made:
            engine.sync(path)
            engine.forget(path)
            sync_directory(os.path.dirname(path))
        # Last: a checkpoint is what has this file.
        made.append(checkpoint_path(directories[0], number))
        replace_durably(made[-1], checkpoint.to_bytes(manifest.uuid))
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                engine.remove(path)
        raise
    return checkpoint


def checkpoint_path(directory: str, number: int) -> str:
    """Return the path of the file that makes a checkpoint."""
    return os.path.join(directory, f"checkpoint-{number}.json")


def delete_checkpoint(checkpoint: Checkpoint, directories: Sequence[str], engine: Engine) -> None:
    """Remove a checkpoint's files; blocks. What a crash leaves of them is removed at the next opening."""
    os.unlink(checkpoint_path(directories[0], checkpoint.number))
    sync_directory(directories[0])  # before its data: a checkpoint that is listed must be whole
    for index in range(len(checkpoint.layout.files)):
        with contextlib.suppress(FileNotFoundError):
            engine.remove(checkpoint.layout.path(index, directories))


def _share(source: Extent, target: Extent, shared: dict[str, bool]) -> bool:
    """Let the target have the source's blocks; False if a file system cannot, which `shared` remembers by path."""
    begin_bytes = 0
    for segment in source.segments:
        place = target.sub(begin_bytes, segment.num_bytes).segments
        begin_bytes += segment.num_bytes
        for part, from_bytes in zip(place, _starts(place, segment.offset_bytes), strict=True):
            if not shared.get(part.path, True):
                return False
            shared[part.path] = clone_range(segment.path, from_bytes, part.path, part.offset_bytes, part.num_bytes)
            if not shared[part.path]:
                return False
    return True


def _starts(parts: Sequence[Extent], begin_bytes: int) -> list[int]:
    starts = []
    for part in parts:
        starts.append(begin_bytes)
        begin_bytes += part.num_bytes
    return starts
