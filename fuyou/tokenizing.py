"""From a row of columns to token ids, and which of them are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash

from fuyou.errors import ConfigError, DataError
from fuyou.recipe import DataSection


class Tokenizer(Protocol):
    """What this module needs of a tokenizer."""

    eos_id: int | None
    pad_id: int
    has_chat_template: bool

    def encode(self, text: str, *, start_of_text: bool) -> list[int]:
        """Ids of `text`; with the tokenizer's own beginning of a text (BOS, if it uses one) where asked."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool) -> str:
        """Messages in the chat template; `answer_follows` ends with the head of the assistant's turn."""
        ...

    def fingerprint(self) -> str:
        """A digest of all that the ids depend on."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8, vocabulary 256: for trials with random weights only."""

    eos_id: int | None = None
    pad_id = 0
    has_chat_template = False

    def encode(self, text: str, *, start_of_text: bool) -> list[int]:
        """Ids of `text`: its bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these bytes; what is no UTF-8 as U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool) -> str:
        """Always DataError: bytes have no chat template."""
        raise DataError("data.tokenizer=bytes has no chat template: use text or prompt and completion columns")

    def fingerprint(self) -> str:
        """Always the same."""
        return "bytes"


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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool) -> str:
        """Messages in the tokenizer's chat template; DataError if the template refuses them."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_follows
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise DataError(f"the tokenizer's chat template refuses it: {error}") from None
        return text

    def fingerprint(self) -> str:
        """A digest of class, vocabulary and rules, special tokens and template, and of the library's version."""
        import transformers

        tokenizer = self.tokenizer
        rules = getattr(tokenizer, "backend_tokenizer", None)
        parts = [
            type(tokenizer).__name__,
            rules.to_str() if rules is not None else str(sorted(tokenizer.get_vocab().items())),
            str(tokenizer.chat_template),
            str(sorted(tokenizer.special_tokens_map.items())),
            str([self.eos_id, self.pad_id]),
            transformers.__version__,
        ]
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(f"{len(part)} {part}".encode())
        return f"xxh3:{digest.hexdigest()}"


def load_tokenizer(name: str, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or hub name, or "bytes"; DataError if there is none."""
    if name == "bytes":
        return ByteTokenizer()
    import transformers

    try:
        return HuggingFaceTokenizer(
            transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"no tokenizer can be loaded from {name!r}: {first_line(error)}. Name another one with data.tokenizer"
        ) from None


def save_tokenizer(name: str, folder: Path) -> str | None:
    """Save the tokenizer of a folder, or of a hub name that is on this machine already, to `folder`; returns `name`.

    None if there is none: a model with random weights has none, and what a store names may be gone.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # files of many authors fail in many ways
        return None
    tokenizer.save_pretrained(folder)
    return name


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


def choose_format(section: DataSection, columns: Sequence[str], tokenizer: Tokenizer, source: str) -> RowFormat:
    """Which columns are used and how; DataError names the columns there are if those wanted are missing."""
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
            f"{source}: no column named messages, prompt and completion, or text; found: {quoted(columns)}. "
            "Name yours "
            "with data.messages_field, data.prompt_field and data.completion_field, or data.text_field"
        )
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(f"{source}: no column {quoted(missing)}; found: {quoted(columns)}")
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


def tokenise_row(row: Mapping[str, Any], row_format: RowFormat, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
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
            [*_messages(row, prompt, role="user"), *_messages(row, completion, role="assistant")],
            row_format,
            tokenizer,
        )
    return _plain(_text(row, prompt), _text(row, completion), row_format, tokenizer)


def _plain(prompt: str, completion: str, row_format: RowFormat, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
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
                "in this chat template an answer's place cannot be told (earlier turns change when later "
                "ones are "
                "added); set data.completion_only_loss: false"
            )
        for part, is_learned in ((text[done : len(before)], False), (text[len(before) : len(after)], True)):
            part_ids = tokenizer.encode(part, start_of_text=False) if part else []
            ids += part_ids
            learned += [is_learned] * len(part_ids)
        done = len(after)
    return ids, learned


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)  # streamed rows may lack it
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r}: expected text, found {type(value).__name__} {_short(value)}")
    return value


def _messages(row: Mapping[str, Any], column: str, role: str | None = None) -> list[Mapping[str, Any]]:
    value = row.get(column)
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    if value is None:
        return []
    if not isinstance(value, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in value
    ):
        raise DataError(f"column {column!r}: expected a list of {{role, content}}, found {_short(value)}")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def quoted(names: Sequence[str]) -> str:
    """Names in quotes, for messages."""
    return ", ".join(repr(name) for name in names) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
