"""Several texts in one row, none of which sees another."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fuyou.data import IGNORED_LABEL, TokenRows
from fuyou.errors import ConfigError

if TYPE_CHECKING:
    import torch

LARGEST_DIFFERENCE = {"bfloat16": 3e-2, "float32": 1e-5}
"""Of logits, relative to the largest, that a change of the other text in a row may make: rounding, no more."""


@dataclasses.dataclass(frozen=True)
class Packs:
    """Which rows lie together: pack i has the rows members[starts[i] : starts[i + 1]]."""

    members: npt.NDArray[np.int64]  # (num_rows,)
    starts: npt.NDArray[np.int64]  # (num_packs + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, pack: int) -> npt.NDArray[np.int64]:
        """Numbers of the pack's rows, a view."""
        return self.members[int(self.starts[pack]) : int(self.starts[pack + 1])]


def pack_rows(rows: TokenRows, length: int) -> Packs:
    """Lay whole rows, none longer than `length`, into packs of at most `length` tokens; the same for equal rows.

    Best fit decreasing: at most 11/9 of the fewest possible packs, and one (D. S. Johnson, 1973).
    """
    lengths = np.diff(rows.starts)
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of with_room, ascending
    for row in np.argsort(-lengths, kind="stable").tolist():
        needed = int(lengths[row])
        place = bisect.bisect_left(rooms, needed)
        if place < len(rooms):
            room = rooms[place]
            pack = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, pack = length, len(packs)
            packs.append([])
        packs[pack].append(row)
        left = room - needed
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(pack)
    members = np.fromiter((row for pack in packs for row in pack), np.int64, count=len(rows))
    return Packs(members, np.cumsum([0, *map(len, packs)], dtype=np.int64))


def collate_packs(
    rows: TokenRows, packs: Packs, indices: Sequence[int] | npt.NDArray[np.int64], pad_id: int
) -> dict[str, torch.Tensor]:
    """Packs as one batch: input_ids, position_ids and labels, int64 in host memory, (packs, length of the longest).

    Positions begin at 0 with each text, padding included, by which transformers keeps texts apart (there must be no
    attention mask then); a text's first token is no label, since the one before it belongs to another.
    """
    import torch

    picked = [[rows.row(int(row)) for row in packs.rows_of(int(index))] for index in indices]
    shape = (len(picked), max(sum(len(ids) for ids, _ in texts) for texts in picked))
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED_LABEL, np.int64)
    for i, texts in enumerate(picked):
        begin = 0
        for ids, learned in texts:
            end = begin + len(ids)
            input_ids[i, begin:end] = ids
            position_ids[i, begin:end] = np.arange(len(ids))
            labels[i, begin + 1 : end] = np.where(learned[1:], ids[1:], IGNORED_LABEL)
            begin = end
        position_ids[i, begin:] = np.arange(shape[1] - begin)
    arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_texts_apart(model: Any, rows: TokenRows, packs: Packs, pad_id: int) -> None:
    """ConfigError if this model lets a text see the one before it in its row; one forward pass over two rows, blocks.

    Tried, not looked up: whether positions keep texts apart is up to each architecture's masks and layers. Leaves the
    model in evaluation mode.
    """
    import torch

    pack = next((i for i in range(len(packs)) if len(packs.rows_of(i)) > 1), None)
    if pack is None:
        return
    batch = collate_packs(rows, packs, [pack, pack], pad_id)
    first = len(rows.row(int(packs.rows_of(pack)[0]))[0])
    end = first + len(rows.row(int(packs.rows_of(pack)[1]))[0])
    input_ids = batch["input_ids"][:, :end].clone()
    input_ids[1, :first] = (input_ids[1, :first] + 1) % (int(input_ids.max()) + 1)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids, position_ids=batch["position_ids"][:, :end], use_cache=False).logits
    except TypeError as error:
        raise ConfigError(f"data.packing: this model takes no position_ids ({error}), {_REMEDY}") from None
    alone, beside_another = logits[0, first:].double(), logits[1, first:].double()
    tolerance = LARGEST_DIFFERENCE["float32" if logits.dtype == torch.float32 else "bfloat16"]
    if float((alone - beside_another).abs().max()) > tolerance * float(alone.abs().max()):
        raise ConfigError(f"data.packing: in this model a text sees those before it in its row, {_REMEDY}")


_REMEDY = "so packed texts would learn from each other: leave data.packing off"
