"""Rows that are read and tokenised as they are needed: data sets larger than memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from fuyou.data import TokenRows, check_usable, cut_notes, root_cause, shuffled
from fuyou.errors import DataError

Row = tuple[list[int], list[bool]]
"""Ids of a row, and which of them are learned."""


class RowStream:
    """The rows of a set, over and over, in windows: so many usable rows that follow each other, shuffled by (seed, number).

    What comes next follows from the set, the options and `position`, which is small and JSON: a run that saves it with
    each step goes on with the very next row. `open_rows` gives the set from its beginning (`datasets.IterableDataset`),
    `usable` tokenises rows and counts, `check` looks at each window's rows. `seed` None: no shuffling.
    """

    def __init__(
        self,
        open_rows: Callable[[], Any],
        usable: Callable[[Iterable[Mapping[str, Any]], Counter[str]], Iterator[Row]],
        check: Callable[[TokenRows], None],
        *,
        name: str,
        max_length: int,
        window_rows: int,
        seed: int | None,
        fingerprint: str,
    ) -> None:
        self._open_rows, self._usable, self._check = open_rows, usable, check
        self._name, self._max_length = name, max_length
        self._window_rows, self._seed = window_rows, seed
        self._fingerprint = fingerprint
        self.seek({"window": 0, "offset": 0, "begin": None})

    def fingerprint(self) -> str:
        """A digest of where rows come from and of what becomes of them; not of the rows."""
        return f"stream {xxhash.xxh3_64(self._fingerprint.encode()).hexdigest()}"

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on at an earlier `position`."""
        self._number, self._offset = int(position["window"]), int(position["offset"])
        self._begin: Any = position["begin"]
        self._after: Any = None
        self._rows: TokenRows | None = None
        self._order: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._set: Any = None
        self._iterator: Iterator[Mapping[str, Any]] | None = None

    @property
    def position(self) -> dict[str, Any]:
        """Where `take` goes on."""
        return {"window": self._number, "offset": self._offset, "begin": copy.deepcopy(self._begin)}

    def take(self, num_rows: int) -> tuple[TokenRows, list[str]]:
        """The next rows, and what people should know of windows that had to be read; blocks. DataError."""
        picked: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []
        notes: list[str] = []
        while len(picked) < num_rows:
            if self._rows is None:
                notes += self._read()
            assert self._rows is not None
            if self._offset == len(self._rows):  # also at a position at a window's end
                self._number, self._offset, self._begin = self._number + 1, 0, self._after
                notes += self._read()
            picked.append(self._rows.row(int(self._order[self._offset])))
            self._offset += 1
        return TokenRows.from_rows((ids.tolist(), learned.tolist()) for ids, learned in picked), notes

    def _read(self) -> list[str]:
        """Read the window that begins at `_begin`; it ends at the latest where the set does."""
        counts: Counter[str] = Counter()
        if self._begin is None or self._set is None:
            self._set = self._open_rows()
            if self._begin is not None:
                self._set.load_state_dict(copy.deepcopy(self._begin))
            self._iterator = reading(self._set, self._name)
        rows: list[Row] = []
        at_end = True
        assert self._iterator is not None
        for row in self._usable(self._iterator, counts):
            rows.append(row)
            if len(rows) == self._window_rows:
                at_end = False
                break
        self._after = None if at_end else self._set.state_dict()
        if not rows:
            if self._begin is None:
                check_usable(counts, self._name, self._max_length)
            # The window before has taken the last usable row: begin anew, as if it had ended there.
            self._begin = None
            return self._read()
        self._rows = TokenRows.from_rows(rows)
        self._check(self._rows)
        size = len(rows)
        self._order = np.arange(size) if self._seed is None else shuffled(size, self._seed, self._number)
        return cut_notes(counts, f"{self._name}, window {self._number}", self._max_length)


def reading(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    """The rows; DataError for what goes wrong on the way to one."""
    try:
        yield from rows
    except Exception as error:  # network, hub and parsers, each with errors of its own
        raise DataError(f"{name}: cannot be read further: {root_cause(error)}") from None
