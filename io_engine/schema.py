"""What the bodies of a store's small files must be, checked before anything in them is used.

Their checksum says that they are whole, not that a friend wrote them: names could lead out of the store, ranges
overlap or lie outside of their files, numbers be absurd.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from io_engine.durable import Json
from io_engine.errors import StoreCorruptError
from io_engine.extents import ALIGNMENT_BYTES, round_up
from io_engine.layout import Layout

_MOST_BYTES = 1 << 62
_MOST_DIRECTORIES = 4096


def fields_of(body: Json, path: str, types: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object that have to be there; StoreCorruptError unless each is of its type."""
    if not isinstance(body, dict):
        raise _wrong(path, f"expected an object, found {type(body).__name__}")
    values = {}
    for name, kind in types.items():
        value = body.get(name)
        # True is an integer to Python, and none to JSON.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _wrong(path, f"field {name!r} is {str(value)[:40]!r}")
        values[name] = value
    return values


def check_index(value: int, count: int, path: str, what: str) -> None:
    """StoreCorruptError unless `value` is the number of one of `count` things."""
    if not 0 <= value < count:
        raise _wrong(path, f"{what} {value} of {count}")


def check_store_id(values: Mapping[str, Any], path: str) -> None:
    """StoreCorruptError unless index and count of a store-id.json go together."""
    if not 0 < values["count"] <= _MOST_DIRECTORIES:
        raise _wrong(path, f"a store of {values['count']} directories")
    check_index(values["index"], values["count"], path, "directory")


def checked_layout(body: Json, path: str, num_directories: int, kind: str) -> Layout:
    """Return the layout that a body describes, of files named `kind`-<n>.bin; StoreCorruptError if it cannot be one."""
    values = fields_of(
        body,
        path,
        {"version": int, "uuid": str, "generation": int, "files": list, "extents": dict, "description": dict},
    )
    rates = body.get("bytes_per_second")
    if rates is not None and (
        not isinstance(rates, list)
        or len(rates) != num_directories
        or not all(isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0 for rate in rates)
    ):
        raise _wrong(path, "bytes_per_second is no list of one rate for each directory")
    for file in values["files"]:
        known = fields_of(file, path, {"name": str, "directory": int, "num_bytes": int})
        # Nothing but a name of ours: it is joined to a directory, and must not lead out of it.
        if not re.fullmatch(rf"{kind}-\d{{1,18}}\.bin", known["name"], re.ASCII):
            raise _wrong(path, f"a file is named {known['name'][:80]!r}")
        check_index(known["directory"], num_directories, path, "directory")
        check_index(known["num_bytes"], _MOST_BYTES, path, "a file's size")
    used: dict[int, list[tuple[int, int]]] = {}
    for name, extent in values["extents"].items():
        _check_extent(name, extent, values, path, used)
    for ranges in used.values():
        ranges.sort()
        for (begin, size), (following, _) in itertools.pairwise(ranges):
            if begin + size > following:
                raise _wrong(path, f"two extents overlap at offset {following}")
    return Layout.from_json(body)


def _check_extent(
    name: str, extent: Json, layout: Mapping[str, Any], path: str, used: dict[int, list[tuple[int, int]]]
) -> None:
    values = fields_of(extent, path, {"num_bytes": int, "piece_bytes": int, "slots": list})
    check_index(values["num_bytes"] - 1, _MOST_BYTES, path, f"the size of {name!r}")
    check_index(values["piece_bytes"], _MOST_BYTES, path, f"the pieces of {name!r}")
    if len(values["slots"]) not in (1, 2):
        raise _wrong(path, f"extent {name!r} has {len(values['slots'])} slots")
    disk_bytes = round_up(values["num_bytes"], ALIGNMENT_BYTES)
    for slot in values["slots"]:
        if not isinstance(slot, list) or not slot:
            raise _wrong(path, f"a slot of {name!r} has no ranges")
        ranges = [[*slot, disk_bytes]] if layout["version"] == 1 else slot
        total_bytes = 0
        for part in ranges:
            if (
                not isinstance(part, list)
                or len(part) != 3
                or not all(isinstance(number, int) and not isinstance(number, bool) for number in part)
            ):
                raise _wrong(path, f"a range of {name!r} is {str(part)[:40]}")
            file_index, offset_bytes, num_bytes = part
            check_index(file_index, len(layout["files"]), path, "file")
            if num_bytes <= 0 or num_bytes % ALIGNMENT_BYTES or offset_bytes % ALIGNMENT_BYTES:
                raise _wrong(path, f"a range of {name!r} is not made of whole pages")
            end_bytes = layout["files"][file_index]["num_bytes"] - num_bytes + 1
            check_index(offset_bytes, max(0, end_bytes), path, f"the offset of {name!r}")
            used.setdefault(file_index, []).append((offset_bytes, num_bytes))
            total_bytes += num_bytes
        if total_bytes != disk_bytes:
            raise _wrong(path, f"a slot of {name!r} has {total_bytes} bytes, not {disk_bytes}")


def check_slots(slots: Mapping[str, Any], path: str, layout: Layout) -> None:
    """StoreCorruptError unless these are slots of extents in the layout."""
    for name, slot in slots.items():
        if name not in layout.extents or isinstance(slot, bool) or not isinstance(slot, int):
            raise _wrong(path, f"slot {str(slot)[:40]} of {name!r}")
        check_index(slot, len(layout.extents[name].slots), path, f"slot of {name!r}:")


def check_checksums(checksums: Mapping[str, Any], path: str, layout: Layout) -> None:
    """StoreCorruptError unless these are texts for extents in the layout."""
    for name, text in checksums.items():
        if name not in layout.extents or not isinstance(text, str):
            raise _wrong(path, f"checksum {str(text)[:40]!r} of {name!r}")


def _wrong(path: str, what: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"{path} is not what a store writes ({what}): it is damaged, or was made by others; restore it from a backup"
    )
