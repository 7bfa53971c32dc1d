"""Data of the command line: files or a hub data set -> token rows in host memory -> padded batches.

Which rows step N trains on follows from (seed, N) alone, so a resumed run goes on where it stood with nothing
saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from fuyou.errors import ConfigError, DataError
from fuyou.recipe import DataSection
from fuyou.tokenizing import RowFormat, Tokenizer, choose_format, first_line, quoted, tokenise_row

if TYPE_CHECKING:
    import torch

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
            digest.update(array.tobytes())
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
    evaluation: TokenRows | None
    pad_id: int
    notes: tuple[str, ...]
    """What was cut, dropped or chosen, for people."""


def load_data(section: DataSection, tokenizer: Tokenizer, *, seed: int, vocab_size: int | None = None) -> DataSet:
    """Reads, tokenises and splits the rows of a recipe; blocks. `seed` chooses what is held out.

    `vocab_size` is the model's. Raises DataError for rows that cannot be used, ConfigError for options that
    do not go together with these rows.
    """
    notes: list[str] = []
    if section.file is not None:
        rows = _load_files(section.file, section.format)
        source = section.file if isinstance(section.file, str) else ", ".join(section.file)
    else:
        assert section.hub is not None
        rows, source = _load_hub(section, section.split), f"{section.hub} ({section.split})"
    row_format = choose_format(section, _columns(rows), tokenizer, source)
    notes.append(f"data {source}: {row_format.describe()}")
    train = _tokenise(rows, row_format, tokenizer, section.max_length, source, notes)
    evaluation: TokenRows | None = None
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
        if section.eval_file is not None:
            held_out = _load_files(section.eval_file, section.format)
        else:
            assert section.eval_split is not None
            held_out = _load_hub(section, section.eval_split)
        what = str(section.eval_file or section.eval_split)
        held_out_format = choose_format(section, _columns(held_out), tokenizer, what)
        evaluation = _tokenise(held_out, held_out_format, tokenizer, section.max_length, what, notes)
    if vocab_size is not None:
        _check_vocabulary([train, *([evaluation] if evaluation is not None else [])], vocab_size)
    held_out_text = f", {len(evaluation)} held out" if evaluation is not None else ""
    notes.append(f"{len(train)} rows with {len(train.tokens)} tokens{held_out_text}")
    return DataSet(train, evaluation, tokenizer.pad_id, tuple(notes))


_LOADERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet", "text": "text"}
_ENDINGS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def _load_files(files: str | Sequence[str], file_format: str | None) -> Any:
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
        return datasets.load_dataset(_LOADERS[formats.pop()], data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # parsers of several libraries, each with errors of its own
        raise DataError(f"data file {', '.join(map(str, paths))} cannot be read: {_root_cause(error)}") from None


def _format_by_ending(path: Path) -> str:
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigError(
            f"data file {str(path)!r}: its format cannot be told by its ending; give data.format: jsonl, "
            "json, csv, "
            "parquet or text"
        )
    return _ENDINGS[path.suffix.lower()]


def _load_hub(section: DataSection, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(section.hub, section.hub_config, split=split)
    except Exception as error:  # network, hub and parsers, each with errors of its own
        raise DataError(f"data set {section.hub!r}, split {split!r}, cannot be loaded: {_root_cause(error)}") from None


def _columns(rows: Any) -> list[str]:
    return list(rows.column_names)


def _tokenise(
    rows: Any, row_format: RowFormat, tokenizer: Tokenizer, max_length: int, source: str, notes: list[str]
) -> TokenRows:
    counts: Counter[str] = Counter()

    def usable() -> Iterator[tuple[list[int], list[bool]]]:
        for number, row in enumerate(rows):
            try:
                ids, learned = tokenise_row(row, row_format, tokenizer)
            except DataError as error:
                raise DataError(f"{source}, row {number + 1}: {error}") from None
            counts["rows"] += 1
            if len(ids) > max_length:
                counts["cut"] += 1
                ids, learned = ids[:max_length], learned[:max_length]
            if any(learned[1:]):
                yield ids, learned
            else:
                counts["dropped"] += 1

    packed = TokenRows.from_rows(usable())
    if not counts["rows"]:
        raise DataError(f"{source}: has no rows")
    if not len(packed):
        raise DataError(
            f"{source}: no tokens to learn: none of {counts['rows']} rows has a label token within "
            f"data.max_length={max_length} tokens. Rows are empty, or prompts fill the whole length"
        )
    if counts["cut"]:
        notes.append(f"{source}: {counts['cut']} of {counts['rows']} rows cut to data.max_length={max_length} tokens")
    if counts["dropped"]:
        notes.append(f"{source}: {counts['dropped']} of {counts['rows']} rows left out: no label tokens in them")
    return packed


def _check_vocabulary(parts: Sequence[TokenRows], vocab_size: int) -> None:
    largest = max(int(part.tokens.max()) for part in parts)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size}: they do not "
            "belong "
            "together. Name the model's own tokenizer with data.tokenizer"
        )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
