"""What each file in a store's directories is for, in words."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from io_engine.checkpoints import Checkpoint
from io_engine.manifest import (
    DAMAGED_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    NUMBERED_FILE,
    PREVIOUS_NAME,
    STORE_ID_NAME,
    TEMPORARY_FILE,
    Committed,
)

LEFTOVER = "; nothing needs it, the next opening removes it"


@dataclass(frozen=True)
class StoreFile:
    """A file in one of a store's directories."""

    path: str
    num_bytes: int
    purpose: str


def list_files(
    directories: Sequence[str],
    committed: Committed,
    checkpoints: Iterable[Checkpoint],
    unreadable_checkpoints: Collection[int],
) -> tuple[StoreFile, ...]:
    """Return every file in the store's directories, in their order and by name; OSError from listing them.

    What it says of the next opening is what `Store.open` does.
    """
    kept: dict[int, Checkpoint | None] = dict.fromkeys(unreadable_checkpoints)
    kept |= {checkpoint.number: checkpoint for checkpoint in checkpoints}
    found = []
    for index, directory in enumerate(directories):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            try:
                num_bytes = entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # a run is going on in here
                continue
            found.append(StoreFile(entry.path, num_bytes, _purpose(index, entry.name, committed, kept)))
    return tuple(found)


def _purpose(directory: int, name: str, committed: Committed, kept: Mapping[int, Checkpoint | None]) -> str:
    manifest = committed.manifest
    purposes = {STORE_ID_NAME: "says which store this is, and which of its directories"}
    if directory == 0:
        purposes |= {
            LOCK_NAME: "the lock: one process at a time writes to the store",
            MANIFEST_NAME: f"says what is committed (step {manifest.step}); replacing it is the commit",
            PREVIOUS_NAME: f"the manifest before; taken if {MANIFEST_NAME} is damaged",
            DAMAGED_NAME: "a manifest that could not be read, set aside; may be deleted by hand",
        }
    if name in purposes:
        return purposes[name]
    if TEMPORARY_FILE.fullmatch(name):
        return f"a small file that was being written{LEFTOVER}"
    match = NUMBERED_FILE.fullmatch(name)
    if match is None:
        return "none of the store's: never touched"
    kind, number = match[1] or match[3], int(match[2] or match[4])
    if kind == "scratch":
        return (
            "data that need not outlive the process, such as spilled gradients; the next opening removes what is left"
        )
    if kind == "checkpoint":
        if number not in kept:
            return f"of a checkpoint that was not finished, or was being removed{LEFTOVER}"
        checkpoint = kept[number]
        if checkpoint is None:
            return "of a checkpoint that cannot be read; left alone, since it may be worth saving"
        part = "says what is in" if name.endswith(".json") else "the data of"
        return f"{part} checkpoint {checkpoint.name}, step {checkpoint.step}"
    if kind == "layout":
        if name == manifest.layout_name:
            return "says where the extents lie, and the model's config"
        return "a layout that the manifest does not name; the previous one may, else the next opening removes it"
    for file_index, file in enumerate(committed.layout.files):
        if (file.directory, file.name) == (directory, name):
            inside = [
                extent
                for extent, placed in committed.layout.extents.items()
                if any(part[0] == file_index for slot in placed.slots for part in slot)
            ]
            kinds = sorted({extent.rpartition("/")[2] for extent in inside})
            return f"holds slots of {len(inside)} extent{'s' * (len(inside) != 1)} ({', '.join(kinds)})"
    return f"of an allocation that did not end{LEFTOVER}"
