"""What a user decides about offloading: one frozen dataclass, checked at construction."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fuyou.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(value: str | int, field: str = "size") -> int:
    """Bytes from ``"768MiB"``, ``"22 GB"`` or a plain number; ConfigError names `field` otherwise."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ConfigError(f"{field}={value!r}: expected bytes as a number or text such as '22GiB'")
    if isinstance(value, int):
        num_bytes = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"{field}={value!r}: expected a number and a unit, such as '768MiB' or '22GB'")
        num_bytes = int(float(match[1]) * _UNITS[match[2].lower()])
    if num_bytes <= 0:
        raise ConfigError(f"{field}={value!r}: must be above zero")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """A size for people: ``"1.50 GiB"``."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def counted(number: int, noun: str) -> str:
    """A number of things for people: ``"1 row"``, ``"2 rows"``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def check_place(option: str, path: str | os.PathLike[str], *parts: str) -> None:
    """ConfigError if no folder can be made at `path`, or as one of its `parts`: what is there, or above it, is none."""
    given = Path(path).expanduser()
    for folder in (given, *(given / part for part in parts)):
        # Of all above it, the lowest that there is; a link that leads nowhere is in the way, too.
        place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), None)
        if place is not None and not place.is_dir():
            raise ConfigError(f"{option}={os.fspath(path)}: {place} is no folder: move it, or name another path")


def _choice(field: str, value: object, supported: Sequence[object], later: Mapping[object, str]) -> None:
    if value in supported:
        return
    if value in later:
        raise ConfigError(f"{field}={value!r} is not supported by this version: {later[value]}")
    raise ConfigError(f"{field}={value!r}: choose one of {', '.join(repr(s) for s in supported)}")


@dataclasses.dataclass(frozen=True)
class OffloadConfig:
    """Where a model lives and how much memory it may take."""

    store: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    """Directory of the store, or one per drive. Made if missing."""
    base: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    """Directory (or one per drive) of a base: a store of frozen weights that several runs read, at the same time too, and
    none writes. Filled if missing. This run's own store then holds its adapters alone. None: the store holds all weights."""
    device: str | None = None
    """Where blocks are computed: "cuda", "cuda:0", "cpu". None: cuda if there is one."""
    gpu_memory: str | int | None = None
    """Promise: peak memory on the device. None: what is free now, less a margin."""
    host_memory: str | int | None = None
    """Promise: memory of fuyou's own buffers (the block in compute comes on top). None: measured, with a margin."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of weights and activations in compute; the master is float32 in both cases."""
    moment_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Data type of Adam's moments on the drive: 26, 18 or 14 bytes of traffic a parameter and step with bfloat16 compute.
    Less than float32 is rounded stochastically; docs/benchmarks.md shows what it costs. Fixed when a run is created."""
    frozen_dtype: Literal["bfloat16", "int8", "nf4"] = "bfloat16"
    """How decoder layers that are frozen when a store is made are stored: as they are computed with, or quantised (extra
    `quantised`). Those cannot be trained in this store. Fixed when a run is created."""
    micro_batch_size: int | None = None
    """Rows computed at once. None: the whole batch as it is given, or as large a part of a new run's first batch as finds
    room in the memory that is free. Fixed when a run is created."""
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at once in a training pass with labels, which bounds the memory of long sequences and large
    vocabularies. None: all of a micro-batch's. Fixed when a run is created; sums are rounded otherwise than without."""
    durability: Literal["step", "checkpoint"] | None = None
    """"step": every optimizer step is committed to the drive. "checkpoint": the drive gets one step in
    `commit_every_steps`, and every step on which a flush, a save, an evaluation, an export or the run's end falls; all that
    is trained stays in host memory, and a crash costs the steps since. None: planned."""
    commit_every_steps: int | None = None
    """With durability="checkpoint", steps from commit to commit. None: 20."""
    resume: str | int = "auto"
    """"auto": continue a run found in the store, else begin one. "never": the store must be new. "must": it must hold a
    run. A number: it must stand at that committed step."""
    io: Literal["auto", "posix", "kvikio"] = "auto"
    """What moves bytes to and from the drive: system calls, kvikio, or whichever is measured faster when a model is opened."""
    plan: Any = None
    """A Plan, or its JSON, to be followed instead of the planned one. None: planned."""
    blocks: str | None = None
    """Module path of the list of decoder layers, where it is not found by itself ("model.layers")."""

    def __post_init__(self) -> None:
        for field in ("store", "base"):
            if not self._listed(field) and (field == "store" or self.base is not None):
                raise ConfigError(f"{field}=[]: name at least one directory")
        if set(self.store_directories) & set(self.base_directories):
            raise ConfigError(
                f"base={self.base!r}: a run's own store and its base are two stores, name two directories"
            )
        for field in ("gpu_memory", "host_memory"):
            if getattr(self, field) is not None:
                parse_bytes(getattr(self, field), field)
        _choice("compute_dtype", self.compute_dtype, ("bfloat16", "float32"), {"float16": "use bfloat16"})
        _choice("moment_dtype", self.moment_dtype, ("float32", "bfloat16", "int8"), {})
        _choice("frozen_dtype", self.frozen_dtype, ("bfloat16", "int8", "nf4"), {})
        _choice("durability", self.durability, (None, "step", "checkpoint"), {})
        for field in ("commit_every_steps", "micro_batch_size", "loss_chunk_tokens"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{field}={value!r}: expected a whole number above zero")
        if self.commit_every_steps is not None and self.durability == "step":
            raise ConfigError(
                f'commit_every_steps={self.commit_every_steps} conflicts with durability="step", which commits every step: '
                'leave one of them out, or choose durability="checkpoint"'
            )
        _choice("io", self.io, ("auto", "posix", "kvikio"), {})
        if isinstance(self.resume, bool) or not (
            self.resume in ("auto", "never", "must") or (isinstance(self.resume, int) and self.resume >= 0)
        ):
            raise ConfigError(f'resume={self.resume!r}: choose "auto", "never", "must" or the number of a step')
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", str(self.device)):
            raise ConfigError(f'device={self.device!r}: choose "cpu", "cuda" or "cuda:N"')

    def _listed(self, field: str) -> list[Any]:
        value = getattr(self, field)
        if value is None and field == "base":
            return []
        listed = [value] if isinstance(value, str | os.PathLike) else value
        if not isinstance(listed, Sequence) or not all(isinstance(d, str | os.PathLike) and str(d) for d in listed):
            raise ConfigError(f"{field}={value!r}: expected a directory, or a list of directories")
        return list(listed)

    @property
    def store_directories(self) -> tuple[Path, ...]:
        """The store's directories, absolute."""
        return tuple(Path(directory).expanduser().absolute() for directory in self._listed("store"))

    @property
    def base_directories(self) -> tuple[Path, ...]:
        """The base's, likewise; empty for none."""
        return tuple(Path(directory).expanduser().absolute() for directory in self._listed("base"))
