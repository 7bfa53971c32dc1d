"""The lock that makes a store belong to one process, or to several that only read it.

A POSIX record lock (lockf): the kernel drops it when its process dies, and, unlike flock, forked children do
not hold it, so that the orphaned DataLoader workers of a killed run do not lock its store. A record lock does
not stop its own process from opening the store twice, and closing *any* descriptor of the file drops it:
hence the registry below, asked before the file is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import threading

from io_engine.durable import OWNER_ONLY
from io_engine.errors import StoreLockedError


@dataclasses.dataclass
class _Held:
    """A lock that this process has, whoever in it asked for it."""

    process_id: int
    """In a forked child the inherited entries do not count."""
    descriptor: int
    num_readers: int
    """0: for writing."""


# Module state, because record locks belong to the process as a whole.
_held_by_process: dict[tuple[int, int], _Held] = {}
_registry_lock = threading.Lock()


class StoreLock:
    """The lock file `path`, made if missing, held from construction until `release()`. Never blocks.

    With `shared`, others may hold it shared, too, in this process and in others; the file is not written to.
    StoreLockedError if it cannot be had.
    """

    def __init__(self, path: str, *, shared: bool = False) -> None:
        self._path, self._shared = path, shared
        access = os.O_RDONLY if shared else os.O_RDWR
        with _registry_lock:
            while True:
                if self._join_or_refuse():
                    return
                self._descriptor = os.open(path, access | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, OWNER_ONLY)
                try:
                    self._lock()
                    status = os.fstat(self._descriptor)
                    self._key = (status.st_dev, status.st_ino)
                    # Whoever deleted a store in between deleted this file too, and a lock on a nameless file
                    # is none.
                    with contextlib.suppress(FileNotFoundError):
                        current = os.stat(path)
                        if (current.st_dev, current.st_ino) == self._key:
                            break
                except BaseException:
                    os.close(self._descriptor)
                    raise
                os.close(self._descriptor)
            _held_by_process[self._key] = _Held(os.getpid(), self._descriptor, int(shared))

    def _join_or_refuse(self) -> bool:
        """Whether this process has the lock shared already, and shares it with this one too."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return False
        key = (status.st_dev, status.st_ino)
        held = _held_by_process.get(key)
        if held is None or held.process_id != os.getpid():
            return False
        if self._shared and held.num_readers:
            held.num_readers += 1
            self._key, self._descriptor = key, held.descriptor
            return True
        raise StoreLockedError(
            f"the store in {os.path.dirname(self._path)} is already open in this process ({os.getpid()}); close it first "
            "(store.close()), or use the one that is open"
        )

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._descriptor, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(
                    error.errno,
                    f"{error.strerror} (locking; the file system must support POSIX locks)",
                    self._path,
                ) from None
            if not self._shared and self._can_be_shared():
                raise StoreLockedError(
                    f"the store in {os.path.dirname(self._path)} is the base of a run that is under way, so "
                    "nobody may change it; wait for that run to end, or use another directory"
                ) from None
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise StoreLockedError(
                f"the store in {os.path.dirname(self._path)} is in use by {who}; a store belongs to one process at a time, so "
                "wait for it to end, or end it, or use another directory"
            ) from None
        if self._shared:
            return
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode("ascii"), 0)

    def _can_be_shared(self) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # goes when the descriptor is closed
        except OSError:
            return False
        return True

    def release(self, *, remove: bool = False) -> None:
        """Let others have it; `remove` deletes the lock file while it is still held, so that no one locks it
        between.
        """
        with _registry_lock:
            held = _held_by_process.get(self._key)
            if held is not None and held.process_id == os.getpid():
                held.num_readers -= 1
                if held.num_readers > 0:
                    return
                del _held_by_process[self._key]
                if remove:
                    os.unlink(self._path)
            os.close(self._descriptor)
