"""Folders for as long as their process works with them: what a killed process left is removed by the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from io_engine import StoreError
from io_engine.lock import StoreLock

PREFIX = "fuyou-temporary-"
_OWNER, _CONTENTS = "owner", "contents"


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new, empty folder below `parent`, deleted at the end with all that is in it; OSError if it cannot be made.

    First removes those in `parent` whose processes are dead.
    """
    remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, folder)
        # Locked before it has its name: a file of that name which nobody has locked is a dead process's.
        lock = StoreLock(str(folder / f"{_OWNER}.new"))
        stack.callback(lock.release)
        os.rename(folder / f"{_OWNER}.new", folder / _OWNER)
        stack.callback(_remove, folder)  # while it is locked, so that nobody else begins with it
        contents = folder / _CONTENTS
        contents.mkdir()
        yield contents


def remove_abandoned(parent: Path) -> None:
    """Delete the folders that `temporary_folder` has made in `parent` and whose processes are dead; what cannot be stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, StoreError):  # not ours to delete, or in use, or somebody else deletes it
            if not _is_ours(folder):
                continue
            lock = StoreLock(str(folder / _OWNER))  # the kernel dropped its owner's when that died
            try:
                _remove(folder)
            finally:
                lock.release()


def _is_ours(folder: Path) -> bool:
    """Whether it is whole as we make it, so that nobody has put anything of theirs beside what we did."""
    owner = folder / _OWNER
    if folder.is_symlink() or owner.is_symlink() or not owner.is_file():
        return False
    return {path.name for path in folder.iterdir()} <= {_OWNER, _CONTENTS}


def _remove(folder: Path) -> None:
    # Its mark last: a removal that is cut short is taken up by the next process.
    shutil.rmtree(folder / _CONTENTS, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
