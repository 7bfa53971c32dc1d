"""The directories of a store: which store each belongs to, and whether a new one may be made in it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from io_engine.durable import decode_checked, read_bytes, sync_directory
from io_engine.errors import StoreError
from io_engine.manifest import LOCK_NAME, MANIFEST_NAME, PREVIOUS_NAME, STORE_ID_NAME, StoreId, check_format
from io_engine.schema import check_store_id, fields_of


def absolute_directories(directories: Sequence[str | Path] | str | Path) -> tuple[str, ...]:
    """Return the directories as absolute paths; ValueError for none or one named twice."""
    given = [directories] if isinstance(directories, (str, Path)) else list(directories)
    paths = tuple(os.path.abspath(os.path.expanduser(path)) for path in given)
    if not paths:
        raise ValueError("a store needs at least one directory, and none is given; name one per drive")
    if len({os.path.realpath(path) for path in paths}) != len(paths):
        raise ValueError(f"a directory is named twice in {', '.join(paths)}; name each drive's directory once")
    return paths


def has_manifest(first_directory: str) -> bool:
    """Return whether a directory is the first of a store: it has an identity and a manifest, even damaged."""
    return os.path.isfile(os.path.join(first_directory, STORE_ID_NAME)) and any(
        os.path.isfile(os.path.join(first_directory, name)) for name in (MANIFEST_NAME, PREVIOUS_NAME)
    )


def read_store_id(directory: str) -> StoreId | None:
    """Return the directory's identity, None if it has none; StoreCorruptError if it is damaged."""
    path = os.path.join(directory, STORE_ID_NAME)
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    body = decode_checked(data, path)
    check_format(body, "fuyou-store-id", path)
    values = fields_of(body, path, {"uuid": str, "index": int, "count": int})
    check_store_id(values, path)
    return StoreId(values["uuid"], values["index"], values["count"])


def check_store_ids(directories: Sequence[str]) -> str:
    """Return the uuid of the store in exactly these directories, in this order; else StoreError says why."""
    first = read_store_id(directories[0])
    if first is None:
        raise StoreError(
            f"there is no store in {directories[0]} (no {STORE_ID_NAME}); check the path, or create a store there"
        )
    found: dict[int, str] = {}
    for directory in directories:
        store_id = read_store_id(directory)
        if store_id is None:
            raise StoreError(
                f"{directory} has no {STORE_ID_NAME}, so it is not a part of the store {first.uuid}; is its "
                "drive mounted?"
            )
        if store_id.uuid != first.uuid:
            raise StoreError(
                f"{directory} belongs to the store {store_id.uuid}, {directories[0]} to {first.uuid}; "
                "give the directories of one store"
            )
        found[store_id.index] = directory
    if len(directories) != first.count or sorted(found) != list(range(first.count)):
        missing = [str(index) for index in range(first.count) if index not in found]
        raise StoreError(
            f"the store {first.uuid} has {first.count} directories, {len(directories)} are given, and number "
            f"{', '.join(missing) or 'none'} is missing; give all of them"
        )
    in_order = tuple(found[index] for index in range(first.count))
    if in_order != tuple(directories):
        raise StoreError(f"the directories of the store are in another order; give them as {', '.join(in_order)}")
    return first.uuid


def make_directory(path: str) -> None:
    """Make a directory and its parents, and their entries durable."""
    missing: list[str] = []
    parent = path
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    try:
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process, just now; below it shows if it is one
                os.mkdir(directory, 0o700)  # what lies in a store is nobody else's
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:
        text = f"{os.strerror(errno.ENOTDIR)} (a store needs one; use another path)"
        raise OSError(errno.ENOTDIR, text, path) from error
    for made in missing:
        sync_directory(os.path.dirname(made))


def refuse_foreign_files(directory: str, first_directory: str) -> None:
    """Raise StoreError unless a store can be made here: empty, or left by a creation that did not end."""
    names = sorted(name for name in os.listdir(directory) if name != "lost+found")
    if directory == first_directory and LOCK_NAME in names:
        names.remove(LOCK_NAME)
    if not names:
        return
    own = {STORE_ID_NAME, f"{STORE_ID_NAME}.tmp"}
    if directory == first_directory:
        own.add(f"{MANIFEST_NAME}.tmp")
    if set(names) <= own and not has_manifest(first_directory):
        mine, first = _try_store_id(directory), _try_store_id(first_directory)
        # An identity other than that of the unfinished first directory may be a part of another store.
        of_unfinished = mine is not None and first is not None and first.index == 0 and mine.uuid == first.uuid
        if of_unfinished or STORE_ID_NAME not in names:
            return
    if STORE_ID_NAME in names:
        raise StoreError(
            f"{directory} holds a store already ({', '.join(names[:5])}); open it, delete it with "
            "Store.delete(), or use another directory"
        )
    raise StoreError(
        f"{directory} is not empty: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; a store is "
        "made only in an empty directory and never deletes files of others, so give a new one"
    )


def _try_store_id(directory: str) -> StoreId | None:
    with contextlib.suppress(StoreError):
        return read_store_id(directory)
    return None
