"""Space on the store's drives for data that need not outlive the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from io_engine.durable import OWNER_ONLY
from io_engine.engine import Engine
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up
from io_engine.space import check_space, rooms
from io_engine.striping import Striper


class ScratchSpace:
    """Named extents in one growing file per directory; the caller locks. Not in any manifest, gone after
    `close`.
    """

    def __init__(self, directories: Sequence[str], bytes_per_second: Sequence[float], engine: Engine) -> None:
        self._directories = directories
        self._bytes_per_second = bytes_per_second
        self._paths = [os.path.join(directory, f"scratch-{i}.bin") for i, directory in enumerate(directories)]
        self._engine = engine
        self._end_bytes = [0] * len(directories)
        self._made: set[str] = set()
        self._extents: dict[str, Extent] = {}
        self._free: dict[int, list[Extent]] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all scratch files."""
        return sum(self._end_bytes)

    def extent(self, name: str, num_bytes: int) -> Extent:
        """Return the extent of that name, made if missing; another size gives another place, content
        undefined.
        """
        if num_bytes <= 0:
            raise ValueError(f"scratch {name!r}: num_bytes={num_bytes} is not positive; leave empty extents out")
        size_bytes = round_up(num_bytes, ALIGNMENT_BYTES)
        old = self._extents.get(name)
        if old is not None and old.num_bytes == size_bytes:
            return old
        free = self._free.get(size_bytes)
        new = free.pop() if free else self._grow(size_bytes)
        if old is not None:
            self.release(name)
        self._extents[name] = new
        return new

    def _grow(self, size_bytes: int) -> Extent:
        striper = Striper(self._bytes_per_second, rooms(self._directories), end_bytes=self._end_bytes)
        pieces = striper.place(size_bytes)
        grown = sorted({piece.directory for piece in pieces})
        added_bytes = {self._directories[i]: striper.end_bytes[i] - self._end_bytes[i] for i in grown}
        check_space(added_bytes, "more scratch space")
        for i in grown:
            path = self._paths[i]
            if path not in self._made:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, OWNER_ONLY))
                self._made.add(path)
            self._engine.preallocate(path, striper.end_bytes[i])
        self._end_bytes = striper.end_bytes
        return Extent.join(
            Extent(self._paths[piece.directory], piece.offset_bytes, piece.num_bytes) for piece in pieces
        )

    def release(self, name: str) -> None:
        """Let other names have the place of this one; KeyError if there is no such name."""
        extent = self._extents.pop(name)
        self._free.setdefault(extent.num_bytes, []).append(extent)

    def close(self) -> None:
        """Delete the files."""
        for path in self._made:
            with contextlib.suppress(FileNotFoundError):
                self._engine.remove(path)
        self._made.clear()
        self._extents.clear()
        self._free.clear()
        self._end_bytes = [0] * len(self._paths)
