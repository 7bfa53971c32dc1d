"""Data of the command line: files or a hub data set -> token rows in host memory -> padded batches in a fixed order.

Which rows step N trains on follows from (seed, N) alone, so a resumed run goes on where it stood with nothing saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from fuyou.errors import ConfigError, DataError
from fuyou.recipe import DataSection

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""Label of a token that is not learned, as in transformers."""


# ------------------------------------------------------------------------------------------------------ tokenizers


class Tokenizer(Protocol):
    """What this module needs of a tokenizer."""

    eos_id: int | None
    pad_id: int
    has_chat_template: bool

    def encode(self, text: str, *, start_of_text: bool) -> list[int]:
        """Ids of `text`; with the tokenizer's own beginning of a text (BOS, if it uses one) where asked."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool) -> str:
        """Messages in the chat template; `answer_follows` ends with the head of the assistant's turn."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8, vocabulary 256: for trials with random weights only."""

    eos_id: int | None = None
    pad_id = 0
    has_chat_template = False

    def encode(self, text: str, *, start_of_text: bool) -> list[int]:
        """Ids of `text`: its bytes."""
        return list(text.encode("utf-8"))

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool) -> str:
        """Always DataError: bytes have no chat template."""
        raise DataError("data.tokenizer=bytes has no chat template: use text or prompt and completion columns")


class HuggingFaceTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        # Padding is masked and never learned, so any id within the vocabulary serves.
        self.pad_id: int = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.has_chat_template = bool(tokenizer.chat_template)

    def encode(self, text: str, *, start_of_text: bool) -> list[int]:
        """Ids of `text`, never cut."""
        encoded = self.tokenizer(text, add_special_tokens=start_of_text, verbose=False)
        return list(encoded["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool) -> str:
        """Messages in the tokenizer's chat template; DataError if the template refuses them."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_follows
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise DataError(f"the tokenizer's chat template refuses it: {error}") from None
        return text


def load_tokenizer(name: str, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or hub name, or "bytes"; DataError if there is none."""
    if name == "bytes":
        return ByteTokenizer()
    import transformers

    try:
        return HuggingFaceTokenizer(transformers.AutoTokenizer.from_pretrained(name, revision=revision))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"no tokenizer can be loaded from {name!r}: {_first_line(error)}. Name another one with data.tokenizer"
        ) from None


# ------------------------------------------------------------------------------------------------------------ rows


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
            digest.update(np.ascontiguousarray(array).view(np.uint8))
        return f"xxh3:{digest.hexdigest()}"


def collate(rows: TokenRows, indices: Sequence[int] | npt.NDArray[np.int64], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows as one batch of int64 tensors (num_rows, longest row): input_ids, attention_mask, labels; padded right."""
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


# ----------------------------------------------------------------------------------------------------------- order


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


# --------------------------------------------------------------------------------------------------------- loading


@dataclasses.dataclass(frozen=True)
class DataSet:
    """All rows of a run."""

    train: TokenRows
    evaluation: TokenRows | None
    pad_id: int
    notes: tuple[str, ...]
    """What was cut, dropped or chosen, for people."""


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How a row becomes tokens: which columns, wrapped how, learned where."""

    kind: str
    """"messages", "pair" or "text"."""
    columns: tuple[str, ...]
    chat_template: bool
    completion_only_loss: bool

    def describe(self) -> str:
        """For people: which columns are used and what is learned."""
        wrapped = "in the chat template" if self.chat_template else "as plain text"
        learned = "only the answers are learned" if self.completion_only_loss else "every token is learned"
        return f"columns {', '.join(self.columns)}, {wrapped}; {learned}"


def load_data(section: DataSection, tokenizer: Tokenizer, *, seed: int, vocab_size: int | None = None) -> DataSet:
    """Reads, tokenises and splits the rows of a recipe; blocks. `seed` chooses what is held out.

    `vocab_size` is the model's. Raises DataError for rows that cannot be used, ConfigError for options that do not
    go together with these rows.
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
                f"data.eval_fraction={section.eval_fraction} of {len(train)} usable rows leaves none to train on: "
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


def choose_format(
    section: DataSection, columns: Sequence[str], tokenizer: Tokenizer, source: str
) -> RowFormat:
    """Which columns are used and how; DataError names the columns there are if the wanted ones are missing."""
    names: tuple[str, ...]
    if section.messages_field is not None:
        kind, names = "messages", (section.messages_field,)
    elif section.text_field is not None:
        kind, names = "text", (section.text_field,)
    elif section.prompt_field is not None or section.completion_field is not None:
        kind, names = "pair", (section.prompt_field or "prompt", section.completion_field or "completion")
    elif "messages" in columns:
        kind, names = "messages", ("messages",)
    elif "prompt" in columns and "completion" in columns:
        kind, names = "pair", ("prompt", "completion")
    elif "text" in columns:
        kind, names = "text", ("text",)
    else:
        raise DataError(
            f"{source}: no column named messages, prompt and completion, or text; found: {_list(columns)}. Name yours "
            "with data.messages_field, data.prompt_field and data.completion_field, or data.text_field"
        )
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(f"{source}: no column {_list(missing)}; found: {_list(columns)}")
    if kind == "messages" and (section.chat_template is False or not tokenizer.has_chat_template):
        why = "data.chat_template is false" if section.chat_template is False else "the tokenizer has none"
        raise ConfigError(
            f"{source}: chat rows need a chat template, but {why}. Use the tokenizer of a chat model "
            "(data.tokenizer), or prompt and completion columns"
        )
    if section.chat_template and not tokenizer.has_chat_template:
        raise ConfigError("data.chat_template: true, but the tokenizer has none: leave the key out or name another one")
    if kind == "text" and section.completion_only_loss:
        raise ConfigError(f"data.completion_only_loss: true needs answers; the rows of {source} are plain text")
    return RowFormat(
        kind=kind,
        columns=names,
        chat_template=kind != "text" and section.chat_template is not False and tokenizer.has_chat_template,
        completion_only_loss=(
            section.completion_only_loss if section.completion_only_loss is not None else kind == "pair"
        ),
    )


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
        raise ConfigError(f"data files of several formats ({_list(sorted(formats))}): use files of one format")
    try:
        return datasets.load_dataset(
            _LOADERS[formats.pop()], data_files=[str(path) for path in paths], split="train"
        )
    except Exception as error:  # parsers of several libraries, each with errors of its own
        raise DataError(f"data file {', '.join(map(str, paths))} cannot be read: {_root_cause(error)}") from None


def _format_by_ending(path: Path) -> str:
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigError(
            f"data file {str(path)!r}: its format cannot be told by its ending; give data.format: jsonl, json, csv, "
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


def tokenise_row(
    row: Mapping[str, Any], row_format: RowFormat, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Ids of one row and which are learned; DataError says what is wrong with its columns.

    Prompt and answer are tokenised apart, as they are when the model is asked.
    """
    if row_format.kind == "text":
        return _plain("", _text(row, row_format.columns[0]), row_format, tokenizer)
    if row_format.kind == "messages":
        return _chat(_messages(row, row_format.columns[0]), row_format, tokenizer)
    prompt, completion = row_format.columns
    if row_format.chat_template:
        return _chat(
            [*_messages(row, prompt, role="user"), *_messages(row, completion, role="assistant")], row_format, tokenizer
        )
    return _plain(_text(row, prompt), _text(row, completion), row_format, tokenizer)


def _plain(
    prompt: str, completion: str, row_format: RowFormat, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    head = tokenizer.encode(prompt, start_of_text=True) if prompt else []
    tail = tokenizer.encode(completion, start_of_text=not prompt) if completion else []
    if tail and tokenizer.eos_id is not None and tail[-1] != tokenizer.eos_id:
        tail.append(tokenizer.eos_id)
    return head + tail, [not row_format.completion_only_loss] * len(head) + [True] * len(tail)


def _chat(
    messages: Sequence[Mapping[str, Any]], row_format: RowFormat, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    if not messages:
        return [], []
    text = tokenizer.chat(messages, answer_follows=False)
    if not row_format.completion_only_loss:
        ids = tokenizer.encode(text, start_of_text=False)  # the template writes BOS itself
        return ids, [True] * len(ids)
    ids, learned, done = [], [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.chat(messages[:i], answer_follows=True) if i else ""
        after = text if i + 1 == len(messages) else tokenizer.chat(messages[: i + 1], answer_follows=False)
        if not (text.startswith(before) and text.startswith(after) and done <= len(before) <= len(after)):
            raise DataError(
                "in this chat template an answer's place cannot be told (earlier turns change when later ones are "
                "added); set data.completion_only_loss: false"
            )
        for part, is_learned in ((text[done : len(before)], False), (text[len(before) : len(after)], True)):
            part_ids = tokenizer.encode(part, start_of_text=False) if part else []
            ids += part_ids
            learned += [is_learned] * len(part_ids)
        done = len(after)
    return ids, learned


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r}: expected text, found {type(value).__name__} {_short(value)}")
    return value


def _messages(row: Mapping[str, Any], column: str, role: str | None = None) -> list[Mapping[str, Any]]:
    value = row[column]
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    if value is None:
        return []
    if not isinstance(value, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in value
    ):
        raise DataError(f"column {column!r}: expected a list of {{role, content}}, found {_short(value)}")
    return value


def _check_vocabulary(parts: Sequence[TokenRows], vocab_size: int) -> None:
    largest = max(int(part.tokens.max()) for part in parts)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size}: they do not belong "
            "together. Name the model's own tokenizer with data.tokenizer"
        )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
