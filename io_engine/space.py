"""Free space, asked before anything is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

RESERVE_PERCENT = 1
"""Asked for beyond what is needed: metadata of the file system, and the small files of the commits to come.
"""


def free_bytes(directory: str) -> int:
    """Return how many bytes an ordinary user can still write to the directory's file system."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


@dataclass
class Room:
    """What still fits on a file system; directories on the same one share the object."""

    num_bytes: int


def rooms(directories: Sequence[str]) -> list[Room]:
    """Return what fits on the file system of each directory, the reserve left out."""
    of_device: dict[int, Room] = {}
    found: list[Room] = []
    for directory in directories:
        device = os.stat(directory).st_dev
        if device not in of_device:
            of_device[device] = Room(free_bytes(directory) * 100 // (100 + RESERVE_PERCENT))
        found.append(of_device[device])
    return found


def check_space(needed_bytes: Mapping[str, int], what: str) -> None:
    """Raise OSError(ENOSPC) unless each file system has room for what its directories need, and 1 % more."""
    per_device: dict[int, list[str]] = {}
    for directory in needed_bytes:
        per_device.setdefault(os.stat(directory).st_dev, []).append(directory)
    for directories in per_device.values():
        needed = sum(needed_bytes[directory] for directory in directories)
        wanted = needed + needed * RESERVE_PERCENT // 100
        free = free_bytes(directories[0])
        if wanted > free:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)} ({what} needs {needed} bytes and {RESERVE_PERCENT} % reserve, "
                f"{free} bytes are free, {wanted - free} are missing; nothing was written: free some space "
                "or use another drive)",
                ", ".join(directories),
            )


def total_free_bytes(directories: Iterable[str]) -> int:
    """Return the free bytes of all the directories' file systems, each counted once."""
    first_of_device = {os.stat(directory).st_dev: directory for directory in directories}
    return sum(free_bytes(directory) for directory in first_of_device.values())
