"""Data of the command line: files or a hub data set -> token rows in host memory -> padded batches.

Which rows step N trains on follows from (seed, N) alone, so a resumed run goes on where it stood with nothing
saved. (Rows that are read as they are needed have a position: `fuyou.row_stream`.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from fuyou.config import counted
from fuyou.errors import ConfigError, DataError
from fuyou.recipe import DataSection
from fuyou.tokenizing import RowFormat, Tokenizer, choose_format, first_line, quoted, tokenise_row

if TYPE_CHECKING:
    import torch

    from fuyou.row_stream import RowStream

IGNORED_LABEL = -100
"""Label of a token that is not learned, as in transformers."""


# ------------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Tokenised rows, one after the other, in host memory."""

    tokens: npt.NDArray[np.int32]  # (num_tokens,)
    learned: npt.NDArray[np.bool_]  # (num_tokens,) whether the token is a label
    starts: npt.NDArray[np.int64]  # (num_rows + 1,) row i is tokens[starts[i] : starts[i + 1]]

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> TokenRows:
        """Packs (ids, learned) pairs."""
        tokens: list[npt.NDArray[np.int32]] = []
        learned: list[npt.NDArray[np.bool_]] = []
        starts = [0]
        for ids, flags in rows:
            tokens.append(np.asarray(ids, np.int32))
            learned.append(np.asarray(flags, np.bool_))
            starts.append(starts[-1] + len(ids))
        return cls(
            np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
            np.concatenate(learned) if learned else np.zeros(0, np.bool_),
            np.asarray(starts, np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Views of one row: its ids, and which of them are learned."""
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.tokens[span], self.learned[span]

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> TokenRows:
        """A copy of some rows, in this order."""
        return TokenRows.from_rows(
            (ids.tolist(), flags.tolist()) for ids, flags in (self.row(int(index)) for index in indices)
        )

    def fingerprint(self) -> str:
        """A digest of all rows: equal for equal data."""
        digest = xxhash.xxh3_64()
        for array in (self.tokens, self.learned, self.starts):
            digest.update(array.data)
        return f"xxh3:{digest.hexdigest()}"


def collate(rows: TokenRows, indices: Sequence[int] | npt.NDArray[np.int64], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows as one batch, padded right.

    input_ids, attention_mask and labels: int64 in host memory, (rows, length of the longest).
    """
    import torch

    picked = [rows.row(int(index)) for index in indices]
    shape = (len(picked), max(len(ids) for ids, _ in picked))
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED_LABEL, np.int64)
    for i, (ids, learned) in enumerate(picked):
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = np.where(learned, ids, IGNORED_LABEL)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def num_label_tokens(labels: torch.Tensor) -> int:
    """Tokens of a batch that count in its loss: the first of a row predicts nothing."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


# ------------------------------------------------------------------------------------------------------ order


def shuffled(num_rows: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(num_rows) that depends on the key alone, never on a library's version."""
    state = np.zeros(num_rows, np.uint64)
    for part in (*key, None):
        state += np.arange(num_rows, dtype=np.uint64) if part is None else np.uint64(part % 2**64)
        state = _splitmix64(state)
    return np.argsort(state, kind="stable").astype(np.int64)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which rows each step trains on. An epoch's last incomplete batch is filled from the next epoch."""

    num_rows: int
    rows_per_step: int
    seed: int
    shuffle: bool = True

    def batch_for_step(self, step: int) -> npt.NDArray[np.int64]:
        """Row numbers, (rows_per_step,), of the step after `step` steps have been taken."""
        position = step * self.rows_per_step
        parts, missing = [], self.rows_per_step
        while missing:
            epoch, offset = divmod(position, self.num_rows)
            part = self._epoch(epoch)[offset : offset + missing]
            parts.append(part)
            position += len(part)
            missing -= len(part)
        return np.concatenate(parts)

    def steps_for_epochs(self, num_epochs: float) -> int:
        """Steps after which every row was seen `num_epochs` times."""
        return max(1, math.ceil(num_epochs * self.num_rows / self.rows_per_step - 1e-9))

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return shuffled(self.num_rows, self.seed, epoch) if self.shuffle else np.arange(self.num_rows, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- loading


@dataclasses.dataclass(frozen=True)
class DataSet:
    """All rows of a run."""

    train: TokenRows
    """Empty where rows are streamed."""
    stream: RowStream | None
    """The rows to train on, if they are read as they are needed."""
    evaluation: TokenRows | None
    pad_id: int
    notes: tuple[str, ...]
    """What was cut, dropped or chosen, for people."""


def load_data(
    section: DataSection,
    tokenizer: Tokenizer,
    *,
    seed: int,
    vocab_size: int | None = None,
    keep: Path | None = None,
) -> DataSet:
    """Reads, tokenises and splits the rows of a recipe; blocks. `seed` chooses what is held out.

    `vocab_size` is the model's. In the folder `keep` tokenised rows are left, and found again by a later call for the
    same rows, tokenizer and options; what is of others there goes. Raises DataError for rows that cannot be used,
    ConfigError for options that do not go together with these rows, OSError.
    """
    loading = _Loading(section, tokenizer, keep, vocab_size)
    train, evaluation, stream = TokenRows.from_rows(()), None, None
    if section.streaming:
        stream = _open_stream(loading, seed)
    else:
        train = loading.rows(section.file, section.split)
    if section.eval_fraction is not None:
        num_held_out = max(1, round(section.eval_fraction * len(train)))
        if num_held_out >= len(train):
            raise DataError(
                f"data.eval_fraction={section.eval_fraction} of {len(train)} usable rows leaves none to "
                "train on: "
                "use more rows or a smaller fraction"
            )
        # -1 keeps this draw apart from the order of any epoch.
        order = shuffled(len(train), seed, -1)
        evaluation = train.take(np.sort(order[:num_held_out]))
        train = train.take(np.sort(order[num_held_out:]))
    elif section.eval_file is not None or section.eval_split is not None:
        evaluation = loading.rows(section.eval_file, section.eval_split)
    loading.forget_others()
    if stream is None:
        held_out_text = f", {len(evaluation)} held out" if evaluation is not None else ""
        loading.notes.append(f"{counted(len(train), 'row')} with {len(train.tokens)} tokens{held_out_text}")
    return DataSet(train, stream, evaluation, tokenizer.pad_id, tuple(loading.notes))


class _Loading:
    """One call of `load_data`."""

    def __init__(self, section: DataSection, tokenizer: Tokenizer, keep: Path | None, vocab_size: int | None) -> None:
        self.section, self.tokenizer, self.vocab_size = section, tokenizer, vocab_size
        self.notes: list[str] = []
        self._keep = keep
        self._used: set[str] = set()

    def source(
        self, files: str | Sequence[str] | None, split: str | None, *, streaming: bool = False
    ) -> tuple[Any, str]:
        """The rows of files, or else of a split of the hub's data set, and what to call them."""
        if files is not None:
            name = files if isinstance(files, str) else ", ".join(files)
            return _load_files(files, self.section.format, streaming), name
        assert split is not None
        return _load_hub(self.section, split, streaming), f"{self.section.hub} ({split})"

    def rows(self, files: str | Sequence[str] | None, split: str | None) -> TokenRows:
        """All of them, tokenised, or as they were kept."""
        rows, name = self.source(files, split)
        row_format = self.choose_format(list(rows.column_names), name)
        counts: Counter[str] = Counter()
        digest = xxhash.xxh3_64()
        for part in (
            "rows 1",
            rows._fingerprint,
            repr(row_format),
            self.tokenizer.fingerprint(),
            self.section.max_length,
        ):
            digest.update(f"{part}\n".encode())
        kept = None if self._keep is None else self._keep / digest.hexdigest()
        packed = None if kept is None else read_rows(kept, counts)
        if packed is not None:
            self.notes.append(f"{name}: tokenised before, taken from {kept}")
        else:
            usable = usable_rows(rows, row_format, self.tokenizer, self.section.max_length, name, counts)
            packed = TokenRows.from_rows(usable)
            check_usable(counts, name, self.section.max_length)
            if kept is not None:
                write_rows(kept, packed, counts)
        if kept is not None:
            self._used.add(kept.name)
        self.notes += cut_notes(counts, name, self.section.max_length)
        self.check_vocabulary(packed)
        return packed

    def choose_format(self, columns: Sequence[str], name: str) -> RowFormat:
        """How these rows become tokens; told once."""
        row_format = choose_format(self.section, columns, self.tokenizer, name)
        self.notes.append(f"data {name}: {row_format.describe()}")
        return row_format

    def check_vocabulary(self, rows: TokenRows) -> None:
        """DataError for a token that the model does not have."""
        largest = int(rows.tokens.max())
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise DataError(
                f"the tokenizer gives token {largest}, but the model's vocabulary has {self.vocab_size}: they do not "
                "belong together. Name the model's own tokenizer with data.tokenizer"
            )

    def forget_others(self) -> None:
        """Delete kept rows that this call has not used."""
        for folder in self._keep.iterdir() if self._keep is not None and self._keep.is_dir() else ():
            if _KEPT_NAME.fullmatch(folder.name) and folder.name not in self._used:
                shutil.rmtree(folder, ignore_errors=True)


def _open_stream(loading: _Loading, seed: int) -> RowStream:
    from fuyou.row_stream import RowStream, reading

    section = loading.section
    first, name = loading.source(section.file, section.split, streaming=True)
    row = next(reading(first, name), None)
    if row is None:
        raise DataError(f"{name}: has no rows")
    row_format = loading.choose_format(list(row), name)

    def usable(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[tuple[list[int], list[bool]]]:
        return usable_rows(rows, row_format, loading.tokenizer, section.max_length, name, counts)

    window = section.shuffle_window
    return RowStream(
        lambda: loading.source(section.file, section.split, streaming=True)[0],
        usable,
        loading.check_vocabulary,
        name=name,
        max_length=section.max_length,
        window_rows=window,
        seed=seed if section.shuffle else None,
        fingerprint=f"{name}, {row_format!r}, {loading.tokenizer.fingerprint()}, {section.max_length}, {window}",
    )


_KEPT_NAME = re.compile(r"[0-9a-f]{16}(\.partial)?")
_ARRAYS = ("tokens", "learned", "starts")


def write_rows(folder: Path, rows: TokenRows, counts: Mapping[str, int]) -> None:
    """Leave tokenised rows in a new folder, which appears whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in _ARRAYS:
        np.save(partial / f"{name}.npy", getattr(rows, name))
    (partial / "rows.json").write_text(json.dumps({"fingerprint": rows.fingerprint(), "counts": dict(counts)}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_rows(folder: Path, counts: Counter[str]) -> TokenRows | None:
    """Rows that `write_rows` left, as files mapped into memory, and what was counted; None if they are not as written."""
    try:
        described = json.loads((folder / "rows.json").read_text())
        rows = TokenRows(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
        if rows.fingerprint() != described["fingerprint"]:
            return None
        counts.update(described["counts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rows


_LOADERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet", "text": "text"}
_ENDINGS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def sample_lengths(section: DataSection, tokenizer: Tokenizer, num_rows: int) -> npt.NDArray[np.int64]:
    """Tokens of each usable row among so many of the data's files, evenly spread, or the first ones where rows are streamed;
    DataError and ConfigError as `load_data`."""
    loading = _Loading(section, tokenizer, None, None)
    rows, name = loading.source(section.file, section.split, streaming=section.streaming)
    if section.streaming:
        picked = list(rows.take(num_rows))
        columns = list(picked[0]) if picked else []
    else:
        picked, columns = rows.select(range(0, len(rows), max(1, len(rows) // num_rows))), list(rows.column_names)
    counts: Counter[str] = Counter()
    usable = usable_rows(picked, loading.choose_format(columns, name), tokenizer, section.max_length, name, counts)
    found = TokenRows.from_rows(usable)
    check_usable(counts, name, section.max_length)
    return np.diff(found.starts)


def _load_files(files: str | Sequence[str], file_format: str | None, streaming: bool) -> Any:
    import datasets

    paths = [Path(name).expanduser() for name in ([files] if isinstance(files, str) else files)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"data file {str(path)!r}: {'is no file' if path.exists() else 'does not exist'}")
        if path.stat().st_size == 0:
            raise DataError(f"data file {str(path)!r} is empty")
    formats = {file_format or _format_by_ending(path) for path in paths}
    if len(formats) > 1:
        raise ConfigError(f"data files of several formats ({quoted(sorted(formats))}): use files of one format")
    try:
        return datasets.load_dataset(
            _LOADERS[formats.pop()], data_files=[str(path) for path in paths], split="train", streaming=streaming
        )
    except Exception as error:  # parsers of several libraries, each with errors of its own
        raise DataError(f"data file {', '.join(map(str, paths))} cannot be read: {root_cause(error)}") from None


def _format_by_ending(path: Path) -> str:
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigError(
            f"data file {str(path)!r}: its format cannot be told by its ending; give data.format: jsonl, "
            "json, csv, "
            "parquet or text"
        )
    return _ENDINGS[path.suffix.lower()]


def _load_hub(section: DataSection, split: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(section.hub, section.hub_config, split=split, streaming=streaming)
    except Exception as error:  # network, hub and parsers, each with errors of its own
        raise DataError(f"data set {section.hub!r}, split {split!r}, cannot be loaded: {root_cause(error)}") from None


def usable_rows(
    rows: Iterable[Mapping[str, Any]],
    row_format: RowFormat,
    tokenizer: Tokenizer,
    max_length: int,
    source: str,
    counts: Counter[str],
) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokenises rows as they are asked for, cut to `max_length`; those without a label token are left out and counted."""
    for row in rows:
        counts["rows"] += 1
        try:
            ids, learned = tokenise_row(row, row_format, tokenizer)
        except DataError as error:
            raise DataError(f"{source}, row {counts['rows']}: {error}") from None
        if len(ids) > max_length:
            counts["cut"] += 1
            ids, learned = ids[:max_length], learned[:max_length]
        if any(learned[1:]):
            yield ids, learned
        else:
            counts["dropped"] += 1


def check_usable(counts: Mapping[str, int], source: str, max_length: int) -> None:
    """DataError if there are none, or all were left out."""
    if not counts["rows"]:
        raise DataError(f"{source}: has no rows")
    if counts["rows"] == counts["dropped"]:
        raise DataError(
            f"{source}: no tokens to learn: none of {counts['rows']} rows has a label token within "
            f"data.max_length={max_length} tokens. Rows are empty, or prompts fill the whole length"
        )


def cut_notes(counts: Mapping[str, int], source: str, max_length: int) -> list[str]:
    """How many rows were cut or left out, for people."""
    notes = []
    if counts["cut"]:
        notes.append(f"{source}: {counts['cut']} of {counts['rows']} rows cut to data.max_length={max_length} tokens")
    if counts["dropped"]:
        notes.append(f"{source}: {counts['dropped']} of {counts['rows']} rows left out: no label tokens in them")
    return notes


def root_cause(error: BaseException) -> str:
    """What a library's error goes back to, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
