"""The small files of a store: which ones there are, what they say, and reading them back after anything."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from io_engine.checksums import WHOLE_PREFIX
from io_engine.durable import Json, decode_checked, encode_checked, read_bytes
from io_engine.errors import StoreCorruptError, StoreError
from io_engine.layout import LAYOUT_VERSION, Layout
from io_engine.schema import check_checksums, check_slots, checked_layout, fields_of

MANIFEST_NAME = "manifest.json"
PREVIOUS_NAME = "manifest.previous.json"
DAMAGED_NAME = "manifest.damaged.json"
STORE_ID_NAME = "store-id.json"
LOCK_NAME = "lock"

NUMBERED_FILE = re.compile(r"(extents|scratch|checkpoint)-(\d+)\.bin|(layout|checkpoint)-(\d+)\.json")
"""Data, scratch, checkpoint and layout files, and their numbers."""

TEMPORARY_FILE = re.compile(r"(manifest|manifest\.previous|store-id|(layout|checkpoint)-\d+)\.json\.tmp")
"""What a crash may leave of the small files."""

FORMAT_VERSION = 1
"""Of the identities."""

MANIFEST_VERSION = 2
"""Version 1 had no checksums that list the digests of their pieces."""

NOTHING_COMMITTED = -1
"""The step of a store in which nothing was committed yet."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says: the one file whose replacement commits a step or a layout."""

    uuid: str
    identity: Mapping[str, Json]
    step: int = NOTHING_COMMITTED
    layout_name: str | None = None
    layout_checksum: str | None = None
    slots: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Json] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file's bytes; ValueError or TypeError if identity or state is not JSON."""
        return encode_checked(
            {
                "format": "fuyou-store",
                "version": MANIFEST_VERSION,
                "uuid": self.uuid,
                "identity": dict(self.identity),
                "step": self.step,
                "layout": None
                if self.layout_name is None
                else {"file": self.layout_name, "checksum": self.layout_checksum},
                "slots": dict(self.slots),
                "checksums": dict(self.checksums),
                "state": dict(self.state),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Manifest:
        """Return what a file's bytes say; StoreCorruptError if they are damaged, StoreError if of another
        format.
        """
        body = decode_checked(data, path)
        check_format(body, "fuyou-store", path, MANIFEST_VERSION)
        kinds = {"uuid": str, "identity": dict, "step": int, "slots": dict, "checksums": dict, "state": dict}
        values = fields_of(body, path, kinds)
        layout: dict[str, Any] = {"file": None, "checksum": None}
        if body.get("layout") is not None:
            layout = fields_of(body["layout"], path, {"file": str, "checksum": str})
        # It is joined to the directory, and must not lead out of it.
        wrong_name = layout["file"] is not None and not re.fullmatch(r"layout-[0-9]{1,18}\.json", layout["file"])
        if wrong_name or not NOTHING_COMMITTED <= values["step"] < 2**62:
            raise StoreCorruptError(f"{path} names no layout of a store, or no step; restore it from a backup")
        return cls(
            uuid=values["uuid"],
            identity=values["identity"],
            step=values["step"],
            layout_name=layout["file"],
            layout_checksum=layout["checksum"],
            slots=values["slots"],
            checksums=values["checksums"],
            state=values["state"],
        )


@dataclass(frozen=True)
class Committed:
    """One committed state of a store: the manifest, its bytes as on disk, and the layout it names."""

    manifest: Manifest
    manifest_bytes: bytes
    layout: Layout


@dataclass(frozen=True)
class StoreId:
    """What store-id.json says: which store, and which of its directories this is."""

    uuid: str
    index: int
    count: int

    def to_bytes(self) -> bytes:
        """Return the file's bytes."""
        return encode_checked(
            {
                "format": "fuyou-store-id",
                "version": FORMAT_VERSION,
                "uuid": self.uuid,
                "index": self.index,
                "count": self.count,
            }
        )


def check_format(body: Json, wanted_format: str, path: str, newest_version: int = FORMAT_VERSION) -> None:
    """Raise StoreError unless a file's body is of the wanted format, in a version that this code reads."""
    if not isinstance(body, dict) or body.get("format") != wanted_format:
        raise StoreError(f"{path} is not a file of format {wanted_format!r}; give the directory of a store")
    version = body.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= newest_version:
        known = "version 1" if newest_version == 1 else f"versions 1 to {newest_version}"
        raise StoreError(
            f"{path} has format version {str(version)[:40]}, this program reads {known}; "
            "use the version of the program that made it"
        )


def read_committed(directories: Sequence[str], manifest_name: str, uuid: str) -> Committed:
    """Return what a manifest in the first directory and its layout say; StoreCorruptError for damage,
    FileNotFoundError for no manifest.
    """
    directory = directories[0]
    path = os.path.join(directory, manifest_name)
    data = read_bytes(path)
    manifest = Manifest.from_bytes(data, path)
    if manifest.uuid != uuid:
        raise StoreCorruptError(
            f"{path} belongs to the store {manifest.uuid}, its directory to {uuid}; put the right manifest back"
        )
    if manifest.layout_name is None:
        check_slots(manifest.slots, path, Layout())
        check_checksums(manifest.checksums, path, Layout())
        return Committed(manifest, data, Layout())
    layout_path = os.path.join(directory, manifest.layout_name)
    try:
        layout_bytes = read_bytes(layout_path)
    except FileNotFoundError:
        raise StoreCorruptError(
            f"{layout_path} is missing, but {path} refers to it; restore it from a backup"
        ) from None
    body = decode_checked(layout_bytes, layout_path)
    check_format(body, "fuyou-store-layout", layout_path, LAYOUT_VERSION)
    if stored_checksum(layout_bytes) != manifest.layout_checksum:
        raise StoreCorruptError(
            f"{layout_path} is not the file that {path} refers to (checksum {manifest.layout_checksum}); "
            "restore it from a backup"
        )
    layout = checked_layout(body, layout_path, len(directories), "extents")
    check_slots(manifest.slots, path, layout)
    check_checksums(manifest.checksums, path, layout)
    return Committed(manifest, data, layout)


def stored_checksum(checked_bytes: bytes) -> str:
    """Return the checksum that a checked file carries of its own body, 'xxh3:...'."""
    start = checked_bytes.index(WHOLE_PREFIX.encode("ascii"))
    return checked_bytes[start : start + len(WHOLE_PREFIX) + 16].decode("ascii")


def read_newest(directories: Sequence[str], uuid: str) -> tuple[Committed, str | None]:
    """Return the newest readable committed state, and, if that is the previous one, a sentence saying why."""
    directory = directories[0]
    try:
        return read_committed(directories, MANIFEST_NAME, uuid), None
    except (StoreCorruptError, FileNotFoundError) as error:
        torn = error
    try:
        previous = read_committed(directories, PREVIOUS_NAME, uuid)
    except (StoreCorruptError, FileNotFoundError) as error:
        raise StoreCorruptError(
            f"no manifest in {directory} is usable: {torn}; and {error}. Restore {MANIFEST_NAME} from a "
            "backup, or delete the store's files and start anew"
        ) from None
    note = f"{MANIFEST_NAME} is not usable ({torn}); fell back to {PREVIOUS_NAME}, step {previous.manifest.step}"
    return previous, note
