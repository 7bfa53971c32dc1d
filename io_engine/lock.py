"""The lock that makes a store belong to one process.

A POSIX record lock (lockf): the kernel drops it when its process dies, and, unlike flock, forked children do
not hold it, so that the orphaned DataLoader workers of a killed run do not lock its store. A record lock does
not stop its own process from opening the store twice, and closing *any* descriptor of the file drops it:
hence the registry below, asked before the file is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading

from io_engine.durable import OWNER_ONLY
from io_engine.errors import StoreLockedError

# Module state, because record locks belong to the process as a whole. The value is the process that locked:
# in a forked child the inherited entries do not count.
_held_by_process: dict[tuple[int, int], int] = {}
_registry_lock = threading.Lock()


class StoreLock:
    """The lock file `path`, made if missing, held from construction until `release()`. Never blocks."""

    def __init__(self, path: str) -> None:
        self._path = path
        with _registry_lock:
            while True:
                self._refuse_if_held_here()
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, OWNER_ONLY)
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
            _held_by_process[self._key] = os.getpid()

    def _refuse_if_held_here(self) -> None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return
        if _held_by_process.get((status.st_dev, status.st_ino)) == os.getpid():
            raise StoreLockedError(
                f"the store of {self._path} is already open in this process ({os.getpid()}); close it first "
                "(store.close()), or use the one that is open"
            )

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(
                    error.errno,
                    f"{error.strerror} (locking; the file system must support POSIX locks)",
                    self._path,
                ) from None
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise StoreLockedError(
                f"the store of {self._path} is in use by {who}; a store belongs to one process at a time, so "
                "wait for it to end, or end it, or use another directory"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode("ascii"), 0)

    def release(self, *, remove: bool = False) -> None:
        """Let others have it; `remove` deletes the lock file while it is still held, so that no one locks it
        between.
        """
        with _registry_lock:
            if _held_by_process.get(self._key) == os.getpid():
                del _held_by_process[self._key]
                if remove:
                    os.unlink(self._path)
            os.close(self._descriptor)
