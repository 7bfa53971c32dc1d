"""A base: a store of frozen weights that several runs read and none writes.

A run on a base has a store of its own, for its adapters; its manifest says which base it reads (`state["base"]`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from fuyou.architecture import differences
from fuyou.config import OffloadConfig
from io_engine import Engine, Store, StoreError, StoreSnapshot
from optim import ShardLayout

SHARED = "shared"
"""Key in the state of a store that was made as a base: nothing in it may be trained."""


def recorded_base(state: Mapping[str, Any], directory: str | Path) -> dict[str, Any] | None:
    """Which base a store's run reads: `directories`, `uuid` and `checksum`. None: it holds its weights itself."""
    found = state.get("base")
    if found is None:
        return None
    if (
        not isinstance(found, Mapping)
        or not all(isinstance(found.get(field), str) for field in ("uuid", "checksum"))
        or not isinstance(found.get("directories"), list)
        or not all(isinstance(entry, str) and entry for entry in found["directories"])
        or not found["directories"]
    ):
        raise StoreError(
            f"{directory}: what its manifest says of the run's base is unusable ({str(found)[:80]}); it was made by another "
            "program, or by hand: restore it from a backup"
        )
    return dict(found)


def base_of_run(offload: OffloadConfig, found: StoreSnapshot | None, directory: Path) -> tuple[Path, ...] | None:
    """The directories of the base that a run reads: those asked for, else those that its store names; None for none.

    StoreError if the run holds its own weights, or if its base is not where it should be.
    """
    recorded = None
    if found is not None and found.state.get("filled"):
        recorded = recorded_base(found.state, directory)
        if recorded is None:
            if offload.base is None:
                return None
            raise StoreError(
                f"{directory} holds a run with weights of its own, and this one asks for the base {offload.base_directories[0]}: "
                "leave base out, or name another store for a run on that base"
            )
    directories = offload.base_directories or tuple(map(Path, recorded["directories"] if recorded else ()))
    if not directories:
        return None
    if recorded is not None and not Store.exists(directories):
        raise StoreError(
            f"the run in {directory} reads its weights from a base in {directories[0]}, and there is no store: put it back, or "
            "name its new place with base (which is then remembered)"
        )
    return directories


def check_base(
    found: StoreSnapshot,
    identity: Mapping[str, Any],
    layouts: Iterable[ShardLayout],
    config: Mapping[str, Any],
    model_class: str,
) -> None:
    """StoreError unless a filled store can be the base of runs of this model with these numerics."""
    place = found.directories[0]
    if "base" in found.state:
        raise StoreError(f"base={place} holds the adapters of a run that reads another base: name that one")
    if found.identity.get("fingerprint") != identity["fingerprint"]:
        raise StoreError(
            f"base={place} holds another model ({found.description.get('model', 'unknown')}, "
            f"{found.description.get('source', '')}), not this {model_class}"
            f"{differences(found.description, config, model_class)}: name this model's base, or a new directory, which is then "
            "filled"
        )
    for field in ("compute_dtype", "frozen_dtype", "moment_dtype"):
        # Stores made before there was a choice name none.
        have = found.identity.get(field, "bfloat16" if field == "frozen_dtype" else "float32")
        if have != identity[field]:
            raise StoreError(
                f"base={place} was made with {field}={have!r}, this run asks for {identity[field]!r}: ask for what the base has, "
                "or name another directory"
            )
    if any(layout.state_name in found.extents for layout in layouts):
        raise StoreError(
            f"base={place} holds a run that trains its weights, and would change under this one: export it, and begin with the "
            "exported folder and a base of its own"
        )


def open_base(
    directories: Sequence[Path], engine: Engine, layouts: Iterable[ShardLayout], found: StoreSnapshot | None
) -> tuple[Store, dict[str, Any]]:
    """A base, open for reading only, and what a run's manifest says of it; the caller closes it.

    StoreError if it is not the one with which the run that was `found` began.
    """
    base = Store.open(directories, engine=engine, read_only=True)
    try:
        record = _record(base, layouts)
        recorded = None if found is None else recorded_base(found.state, found.directories[0])
        if found is not None and recorded is not None:
            _check_unchanged(recorded, record, found.directories[0])
    except BaseException:
        base.close()
        raise
    return base, record


def _record(base: Store, layouts: Iterable[ShardLayout]) -> dict[str, Any]:
    """With a checksum of the checksums of all weights."""
    digest = xxhash.xxh3_64()
    checksums = base.checksums
    for name in sorted(layout.weight_name for layout in layouts):
        digest.update(f"{name} {checksums.get(name, '')}\n".encode())
    return {"directories": list(base.directories), "uuid": base.uuid, "checksum": f"xxh3:{digest.hexdigest()}"}


def _check_unchanged(recorded: Mapping[str, Any], record: Mapping[str, Any], directory: str) -> None:
    if recorded["uuid"] != record["uuid"]:
        what = f"is another store than the run in {directory} began with"
    elif recorded["checksum"] != record["checksum"]:
        what = f"has other weights than when the run in {directory} began"
    else:
        return
    raise StoreError(
        f"the base in {record['directories'][0]} {what}: its adapters belong to the former. Name that one with base, restore it "
        "from a backup, or begin a new run in another directory"
    )
