"""The files of one directory: descriptors kept open, O_DIRECT where it works, a request moved whole or refused."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from typing import Any, Literal

from io_engine.durable import OWNER_ONLY
from io_engine.engine import Kind
from io_engine.errors import io_error
from io_engine.extents import ALIGNMENT_BYTES

Direct = Literal["auto"] | bool
HAS_DIRECT = hasattr(os, "O_DIRECT")


class OpenFile:
    """A cached descriptor; closed when forgotten and no request uses it. `handle` is a library's, beside it."""

    __slots__ = ("descriptor", "direct", "forgotten", "handle", "num_users", "proven")

    def __init__(self, descriptor: int, direct: bool, handle: Any = None) -> None:
        self.descriptor = descriptor
        self.direct = direct
        self.handle = handle
        self.proven = False
        self.forgotten = False
        self.num_users = 0


class Files:
    """Reads and writes of the files in one directory; thread safe. `direct` as in `PosixEngine`."""

    def __init__(self, direct: Direct) -> None:
        self._direct = direct
        self._lock = threading.Lock()
        self._open_files: dict[tuple[str, Kind], OpenFile] = {}
        self._buffered_paths: set[str] = set()
        self.buffered_reason: str | None = None
        """Why some file here is not opened with O_DIRECT; None while all are."""

    def move(self, kind: Kind, path: str, offset_bytes: int, view: Any) -> None:
        """Read or write all of `view` (one byte an element); blocks. OSError with path, offset and length."""
        try:
            if self._try_move(kind, path, offset_bytes, view):
                return
            self._use_page_cache(path, "it refused the first O_DIRECT request: EINVAL")
            self._try_move(kind, path, offset_bytes, view)
        except OSError as error:
            if error.filename is not None:  # it knows its place already
                raise
            detail = "too many open files: raise the limit with ulimit -n" if error.errno == errno.EMFILE else ""
            raise io_error(error.errno or errno.EIO, kind, path, offset_bytes, len(view), detail) from None

    def _try_move(self, kind: Kind, path: str, offset_bytes: int, view: Any) -> bool:
        """Return whether it was moved; False: the file system took O_DIRECT at open, but not at the first request."""
        file = self._acquire(path, kind)
        try:
            self._move_all(kind, file, view, path, offset_bytes)
            file.proven = True
        except OSError as error:
            if error.errno == errno.EINVAL and file.direct and not file.proven and self._direct == "auto":
                return False
            raise
        finally:
            self._release(file)
        return True

    def _acquire(self, path: str, kind: Kind) -> OpenFile:
        with self._lock:
            file = self._open_files.get((path, kind))
            if file is None:
                file = self._open_files[path, kind] = self._open(path, kind)
            file.num_users += 1
            return file

    def _release(self, file: OpenFile) -> None:
        with self._lock:
            file.num_users -= 1
            if file.forgotten and file.num_users == 0:
                self._close(file)

    def _open(self, path: str, kind: Kind) -> OpenFile:
        flags = os.O_CLOEXEC | (os.O_RDONLY if kind == "read" else os.O_RDWR | os.O_CREAT)
        if self._direct is not False and HAS_DIRECT and path not in self._buffered_paths:
            try:
                return OpenFile(open_nameless(path, flags | os.O_DIRECT), direct=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            if self._direct is True:
                detail = "its file system has no O_DIRECT; use direct='auto', or another file system"
                raise io_error(errno.EINVAL, "opening", path, 0, 0, detail)
            self._buffered_paths.add(path)
            self.buffered_reason = "its file system refuses O_DIRECT: EINVAL at open"
        return OpenFile(open_nameless(path, flags), direct=False)

    def _close(self, file: OpenFile) -> None:
        os.close(file.descriptor)

    def _move_all(self, kind: Kind, file: OpenFile, view: Any, path: str, offset_bytes: int) -> None:
        """Move all of `view`, continuing after partial calls; OSError when the file ends or the drive fails."""
        done_bytes = 0
        while done_bytes < len(view):
            rest = [view[done_bytes:]]
            if kind == "read":
                moved_bytes = os.preadv(file.descriptor, rest, offset_bytes + done_bytes)
            else:
                moved_bytes = os.pwritev(file.descriptor, rest, offset_bytes + done_bytes)
            advance_bytes = moved_bytes
            if file.direct and done_bytes + moved_bytes < len(view):
                # O_DIRECT must go on at an aligned offset: what lies beyond the last one is moved again.
                advance_bytes = moved_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
            if advance_bytes == 0:
                raise short_error(kind, file, path, offset_bytes, len(view), done_bytes + moved_bytes)
            done_bytes += advance_bytes

    def _use_page_cache(self, path: str, why: str) -> None:
        with self._lock:
            self._buffered_paths.add(path)
            self.buffered_reason = why
        self.forget(path)

    def sync(self, path: str) -> None:
        """Block until every write to `path` that was done before this call survives a power loss.

        OSError(ESTALE) if others put another file in its place, so that what was written would vanish.
        """
        # The descriptor that wrote is the one to which the kernel reports a failed write-back.
        with self._lock:
            kind: Kind = "write" if (path, "write") in self._open_files else "read"
        try:
            file = self._acquire(path, kind)
            try:
                if hasattr(os, "fdatasync"):
                    os.fdatasync(file.descriptor)
                else:
                    os.fsync(file.descriptor)
                ours, named = os.fstat(file.descriptor), os.stat(path)
            finally:
                self._release(file)
        except OSError as error:
            raise OSError(error.errno, f"{os.strerror(error.errno or errno.EIO)} (fdatasync)", path) from None
        if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino):
            text = "the file was replaced by another process, and what was written to it is lost; do not touch it"
            raise OSError(errno.ESTALE, f"{os.strerror(errno.ESTALE)} ({text})", path)

    def forget(self, path: str) -> None:
        """Close the descriptors of `path`, those in use when their requests have ended."""
        with self._lock:
            kinds: tuple[Kind, ...] = ("read", "write")
            for kind in kinds:
                file = self._open_files.pop((path, kind), None)
                if file is not None:
                    file.forgotten = True
                    if file.num_users == 0:
                        self._close(file)

    def close(self) -> None:
        """Forget all files."""
        with self._lock:
            paths = {path for path, _ in self._open_files}
        for path in paths:
            self.forget(path)


def preallocate(path: str, num_bytes: int) -> None:
    """Create `path` if missing and reserve its first `num_bytes` bytes; blocks. ENOSPC if they are not there."""
    descriptor = os.open(path, os.O_CLOEXEC | os.O_RDWR | os.O_CREAT, OWNER_ONLY)
    try:
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (
                errno.EOPNOTSUPP,
                errno.EINVAL,
                errno.ENOSYS,
            ):
                raise io_error(error.errno or errno.EIO, "preallocation", path, 0, num_bytes) from None
            if os.fstat(descriptor).st_size < num_bytes:
                os.ftruncate(descriptor, num_bytes)
    finally:
        os.close(descriptor)


_FICLONERANGE = 0x4020940D
"""_IOW(0x94, 13, struct file_clone_range), from linux/fs.h."""


def clone_range(
    source_path: str, source_offset_bytes: int, target_path: str, target_offset_bytes: int, num_bytes: int
) -> bool:
    """Let a range of an existing file share the blocks of another one's, until either is written; blocks.

    Returns False, with nothing changed, where the file system cannot (ext4, or two file systems).
    """
    source = os.open(source_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(target_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = struct.pack("=qQQQ", source, source_offset_bytes, num_bytes, target_offset_bytes)
            fcntl.ioctl(target, _FICLONERANGE, request)
        finally:
            os.close(target)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
            return False
        raise OSError(error.errno, f"{os.strerror(error.errno or errno.EIO)} (FICLONERANGE)", target_path) from None
    finally:
        os.close(source)
    return True


def short_error(kind: Kind, file: OpenFile, path: str, offset_bytes: int, num_bytes: int, moved_bytes: int) -> OSError:
    """Build the error of a transfer of which only `moved_bytes` could be moved."""
    detail = f"short {kind}: only {moved_bytes} bytes"
    if kind == "read":
        detail += f", the file ends at {os.fstat(file.descriptor).st_size}"
    return io_error(errno.EIO, kind, path, offset_bytes, num_bytes, detail)


def open_nameless(path: str, flags: int) -> int:
    """Open a file; the error has no filename yet, so that the transfer adds its offset and length to it."""
    try:
        return os.open(path, flags, OWNER_ONLY)
    except OSError as error:
        raise OSError(error.errno, error.strerror) from None
