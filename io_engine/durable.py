"""Small JSON files that are either wholly on the drive or not at all, and that know when they are damaged.

A file is one line: `{"checksum":"xxh3:<16 hex digits>","body":<body>}` and a line feed. The checksum covers
exactly the bytes of <body>, which start at byte 43 and end 2 bytes before the end of the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import Any

import xxhash

from io_engine.checksums import WHOLE_PREFIX
from io_engine.errors import StoreCorruptError

Json = Any
"""What the json module writes: dict, list, str, int, float, bool, None."""

_HEAD = b'{"checksum":"' + WHOLE_PREFIX.encode("ascii")
_MIDDLE = b'","body":'
_TAIL = b"}\n"
_BODY_OFFSET = len(_HEAD) + 16 + len(_MIDDLE)

TEMPORARY_SUFFIX = ".tmp"

OWNER_ONLY = 0o600
"""Permissions of every file that a store makes: weights and data of the run are nobody else's."""

LARGEST_BYTES = 64 << 20
"""Of a small file: a hundred times that of a model of 100 billion parameters."""


def encode_checked(body: Json) -> bytes:
    """Return the bytes of a checked file; ValueError or TypeError for what JSON cannot say, such as NaN."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("utf-8")
    return _HEAD + xxhash.xxh3_64_hexdigest(text).encode("ascii") + _MIDDLE + text + _TAIL


def decode_checked(data: bytes, path: str) -> Json:
    """Return the body of a checked file's bytes; StoreCorruptError says what is wrong with them."""
    if not data.startswith(_HEAD) or not data.endswith(_TAIL) or len(data) < _BODY_OFFSET + len(_TAIL):
        raise StoreCorruptError(f"{path} is torn or not a store's file ({len(data)} bytes); restore it from a backup")
    text = data[_BODY_OFFSET : -len(_TAIL)]
    stored = data[len(_HEAD) : len(_HEAD) + 16].decode("ascii", "replace")
    actual = xxhash.xxh3_64_hexdigest(text)
    if stored != actual:
        raise StoreCorruptError(
            f"{path} is damaged: its checksum says {stored}, its bytes give {actual}; restore it from a backup"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(f"{path} holds no JSON ({error}): it was made by others; use a backup") from None


def read_bytes(path: str) -> bytes:
    """Return all bytes of a small file; StoreCorruptError for what is too large, or no file."""
    # O_NONBLOCK: opening a pipe that somebody put there would block for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_BYTES:
            raise StoreCorruptError(f"{path} is no file of a store ({status.st_size} bytes); restore it from a backup")
        return file.read()


def sync_directory(path: str) -> None:
    """Block until the entries of the directory survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync directories (EINVAL) and order renames themselves.
        if error.errno != errno.EINVAL:
            raise OSError(error.errno, f"{error.strerror} (fsync of a directory)", path) from None
    finally:
        os.close(descriptor)


def write_synced(path: str, data: bytes) -> None:
    """Write a file whose bytes, though not yet its name, survive a power loss; OSError carries the path."""
    # O_NOFOLLOW: a link that somebody put there must not lead the write out of the store.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, OWNER_ONLY)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (writing {len(data)} bytes)", path) from None
    finally:
        os.close(descriptor)


def replace_durably(path: str, data: bytes) -> None:
    """Make `path` hold `data`: after a crash at any point it is the old file or the new one, whole."""
    temporary = path + TEMPORARY_SUFFIX
    write_synced(temporary, data)  # before the rename: else a crash could leave the new name on missing bytes
    os.replace(temporary, path)
    sync_directory(os.path.dirname(path))


def keep_previous(path: str, previous: str, data: bytes) -> None:
    """Make `previous` another name of the file `path`, whose bytes are `data`, atomically.

    A hard link costs no data and no sync; where the file system has none, the bytes are written again.
    """
    temporary = previous + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        os.link(path, temporary)
    except OSError as error:
        if error.errno not in (
            errno.EPERM,
            errno.EOPNOTSUPP,
            errno.EMLINK,
            errno.ENOSYS,
            errno.EXDEV,
            errno.EACCES,
        ):
            raise
        write_synced(temporary, data)
    os.replace(temporary, previous)
    # A rename between two names of one file does nothing and leaves both: drop the one that is left.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
