"""Which engine to use, and why: said in words, never silently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from io_engine.engine import Engine
from io_engine.errors import EngineError
from io_engine.kvikio_engine import KvikioEngine
from io_engine.posix_engine import PosixEngine
from io_engine.probe import probe_directory

IoChoice = Literal["auto", "posix", "kvikio"]

BETTER_BY = 1.05
"""kvikio must be this much faster to be chosen: two measurements of the same path differ by less."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine, which the caller closes, and why it was chosen."""

    engine: Engine
    reason: str


def choose_engine(
    io: IoChoice, directories: Sequence[str | Path], *, num_threads: int = 4, probe_bytes: int = 128 << 20
) -> EngineChoice:
    """Return a new engine for `directories` (which exist) with `num_threads` threads for each.

    "posix" and "kvikio" are as asked; "auto" takes kvikio if it is usable and, measured with `probe_bytes` in each
    directory (blocks for seconds then), faster than system calls. ValueError for another `io`; EngineError if kvikio
    is asked for and missing, with what to install; OSError from the measurement.
    """
    if io == "posix":
        return EngineChoice(PosixEngine(num_threads), "posix: asked for")
    if io == "kvikio":
        return EngineChoice(KvikioEngine(), "kvikio: asked for")
    if io != "auto":
        raise ValueError(f"io={io!r} is no engine; use 'auto', 'posix' or 'kvikio'")
    posix = PosixEngine(num_threads)
    try:
        kvikio = KvikioEngine()
    except EngineError as error:
        return EngineChoice(posix, f"posix: {error}")
    try:
        rates = {engine: _mixed_rate(engine, directories, probe_bytes) for engine in (posix, kvikio)}
    except BaseException:
        posix.close()
        kvikio.close()
        raise
    kvikio_is_better = rates[kvikio] > BETTER_BY * rates[posix]
    chosen, other = (kvikio, posix) if kvikio_is_better else (posix, kvikio)
    other.close()
    name = "kvikio" if kvikio_is_better else "posix"
    figures = f"{rates[kvikio] / 1e9:.2f} GB/s by kvikio, {rates[posix] / 1e9:.2f} by system calls"
    return EngineChoice(chosen, f"{name}: measured, reading and writing at once, {figures}")


def _mixed_rate(engine: Engine, directories: Sequence[str | Path], probe_bytes: int) -> float:
    return sum(
        probe_directory(directory, num_bytes=probe_bytes, engine=engine).mixed_bytes_per_second
        for directory in directories
    )
