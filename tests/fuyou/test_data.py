"""Data: columns, tokens, labels, batches and their order, and what is said about rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fuyou.data import BatchOrder, TokenRows, collate, load_data, num_label_tokens, shuffled
from fuyou.errors import ConfigError, DataError
from fuyou.recipe import DataSection
from fuyou.tokenizing import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    choose_format,
    load_tokenizer,
    tokenise_row,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% if loop.last %}{{ m['content'] }}{% endif %} "
    "<|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *ROLES, "<|end|>", "a", "b", "c", "d"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` converts out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


def word_tokenizer(template: str | None = CHAT_TEMPLATE) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    fast = Fast(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    fast.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    made.chat_template = template
    return HuggingFaceTokenizer(made)


def section(**values: Any) -> DataSection:
    return DataSection.model_validate({"file": "unused.jsonl", **values})


def tokens(row: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> tuple[list[str], list[str]]:
    """The row's tokens as words, and those among them that are learned."""
    row_format = choose_format(section(**options), list(row), tokenizer, "rows")
    ids, learned = tokenise_row(row, row_format, tokenizer)
    assert len(ids) == len(learned)
    words = [WORDS[i] for i in ids]
    return words, [word for word, is_learned in zip(words, learned, strict=True) if is_learned]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------- row -> tokens


def test_plain_text_begins_and_ends_as_the_tokenizer_says() -> None:
    words, learned = tokens({"text": "a b"}, word_tokenizer())
    assert words == learned == ["<bos>", "a", "b", "<eos>"]


def test_prompt_and_completion_without_a_template_learn_the_completion() -> None:
    words, learned = tokens({"prompt": "a b", "completion": "c d"}, word_tokenizer(None))
    assert words == ["<bos>", "a", "b", "c", "d", "<eos>"]
    assert learned == ["c", "d", "<eos>"]
    all_learned = tokens({"prompt": "a", "completion": "c"}, word_tokenizer(None), completion_only_loss=False)[1]
    assert all_learned == ["<bos>", "a", "c", "<eos>"]
    assert tokens({"prompt": "", "completion": "c"}, word_tokenizer(None))[1] == ["<bos>", "c", "<eos>"]


def test_prompt_and_completion_in_the_template_learn_the_answer_and_its_end() -> None:
    words, learned = tokens({"prompt": "a b", "completion": "c"}, word_tokenizer())
    assert words == ["<|user|>", "a", "b", "<|end|>", "<|assistant|>", "c", "<|end|>"]
    assert learned == ["c", "<|end|>"]
    plain, _ = tokens({"prompt": "a b", "completion": "c"}, word_tokenizer(), chat_template=False)
    assert plain == ["<bos>", "a", "b", "c", "<eos>"]


def test_columns_of_other_names_and_conversational_prompts() -> None:
    row = {"question": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "answer": "c"}
    words, learned = tokens(row, word_tokenizer(), prompt_field="question", completion_field="answer")
    assert words[:6] == ["<|system|>", "a", "<|end|>", "<|user|>", "b", "<|end|>"]
    assert learned == ["c", "<|end|>"]


def test_chat_rows_learn_everything_or_every_answer() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    words, learned = tokens({"messages": messages}, word_tokenizer())
    assert words == learned
    again, answers = tokens({"messages": messages}, word_tokenizer(), completion_only_loss=True)
    assert again == words
    assert answers == ["b", "<|end|>", "d", "<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_rather_than_mislabelled() -> None:
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    with pytest.raises(DataError, match="completion_only_loss: false"):
        tokens({"messages": messages}, word_tokenizer(FORGETFUL_TEMPLATE), completion_only_loss=True)


def test_a_template_that_raises_is_reported() -> None:
    refusing = word_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match="no system role"):
        tokens({"prompt": "a", "completion": "b"}, refusing)


def test_bytes_are_their_own_tokens() -> None:
    assert ByteTokenizer().encode("aé", start_of_text=True) == [97, 0xC3, 0xA9]
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


@pytest.mark.parametrize(
    ("row", "options", "error", "part"),
    [
        ({"q": "a"}, {}, DataError, "no column named messages, prompt and completion, or text; found: 'q'"),
        ({"q": "a"}, {"text_field": "body"}, DataError, "no column 'body'; found: 'q'"),
        ({"prompt": "a"}, {"prompt_field": "prompt"}, DataError, "no column 'completion'; found: 'prompt'"),
        ({"text": 3}, {}, DataError, "column 'text': expected text, found int 3"),
        ({"messages": ["a"]}, {}, DataError, "expected a list of {role, content}"),
        ({"text": "a"}, {"completion_only_loss": True}, ConfigError, "rows of rows are plain text"),
        ({"messages": []}, {"chat_template": False}, ConfigError, "data.chat_template is false"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], options: dict[str, Any], error: type, part: str) -> None:
    with pytest.raises(error) as caught:
        tokens(row, word_tokenizer(), **options)
    assert part in str(caught.value)


def test_chat_rows_without_a_template_are_refused() -> None:
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        tokens({"messages": []}, ByteTokenizer())
    with pytest.raises(ConfigError, match="chat_template: true"):
        tokens({"prompt": "a", "completion": "b"}, ByteTokenizer(), chat_template=True)


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer can be loaded from .* data\.tokenizer"):
        load_tokenizer(str(tmp_path))


# ---------------------------------------------------------------------------------------------------- batches


def rows_of(*rows: tuple[list[int], list[bool]]) -> TokenRows:
    return TokenRows.from_rows(rows)


def test_batches_are_padded_right_and_pads_are_not_learned() -> None:
    rows = rows_of(([5, 6, 7], [False, True, True]), ([8], [True]), ([9, 9], [True, False]))
    batch = collate(rows, [2, 0], pad_id=3)
    expected = {
        "input_ids": [[9, 9, 3], [5, 6, 7]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[9, -100, -100], [-100, 6, 7]],
    }
    for name, values in expected.items():
        assert torch.equal(batch[name], torch.tensor(values)), name
        assert batch[name].dtype == torch.int64
    # The label of the first row's first token predicts nothing, so it does not count.
    assert num_label_tokens(batch["labels"]) == 2


def test_fingerprint_tells_rows_apart() -> None:
    one, two = rows_of(([1, 2], [True, True])), rows_of(([1], [True]), ([2], [True]))
    assert one.fingerprint() == rows_of(([1, 2], [True, True])).fingerprint()
    assert len({one.fingerprint(), two.fingerprint(), rows_of(([1, 2], [True, False])).fingerprint()}) == 3


def test_take_copies_rows_in_order() -> None:
    rows = rows_of(([1], [True]), ([2, 3], [False, True]), ([4], [True]))
    taken = rows.take([2, 1])
    assert [taken.row(i)[0].tolist() for i in range(2)] == [[4], [2, 3]]
    assert taken.row(1)[1].tolist() == [False, True]


def test_shuffled_is_a_permutation_fixed_for_ever() -> None:
    assert sorted(shuffled(1000, 3, 4).tolist()) == list(range(1000))
    # Written down: a change of this order would change every run that is resumed.
    assert shuffled(8, 0, 0).tolist() == [4, 0, 1, 7, 6, 2, 5, 3]
    assert shuffled(100, 0, 0).tolist() != shuffled(100, 0, 1).tolist() != shuffled(100, 1, 0).tolist()
    keys = [_splitmix(_splitmix(_splitmix(7) + 2) + index) for index in range(50)]
    assert shuffled(50, 7, 2).tolist() == sorted(range(50), key=keys.__getitem__)


def _splitmix(x: int) -> int:
    """Steele, Lea and Flood's SplitMix64 on Python's integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_each_epoch_has_every_row_once_however_batches_cut_it() -> None:
    order = BatchOrder(num_rows=7, rows_per_step=3, seed=5)
    stream = np.concatenate([order.batch_for_step(step) for step in range(14)])
    for epoch in range(6):
        assert sorted(stream[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))
    assert stream[:7].tolist() != stream[7:14].tolist()
    # A batch larger than the data goes round it.
    large = BatchOrder(num_rows=2, rows_per_step=5, seed=0, shuffle=False)
    assert large.batch_for_step(1).tolist() == [1, 0, 1, 0, 1]


def test_the_rows_of_a_step_need_no_history() -> None:
    order = BatchOrder(num_rows=11, rows_per_step=4, seed=1)
    in_order = [order.batch_for_step(step).tolist() for step in range(20)]
    assert BatchOrder(11, 4, 1).batch_for_step(13).tolist() == in_order[13]


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 4), (0.5, 2), (3.0, 10), (0.001, 1)])
def test_steps_for_epochs(epochs: float, steps: int) -> None:
    assert BatchOrder(num_rows=10, rows_per_step=3, seed=0).steps_for_epochs(epochs) == steps


# ---------------------------------------------------------------------------------------------------- loading


ROWS = [{"text": f"row {number}"} for number in range(20)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "text"])
def test_formats(tmp_path: Path, kind: str) -> None:
    import pandas

    path = tmp_path / f"rows.{'txt' if kind == 'text' else kind}"
    frame = pandas.DataFrame(ROWS)
    if kind == "jsonl":
        jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        path.write_text("\n".join(row["text"] for row in ROWS))
    loaded = load_data(section(file=str(path)), ByteTokenizer(), seed=0)
    assert len(loaded.train) == 20
    assert bytes(loaded.train.row(3)[0].tolist()) == b"row 3"
    assert loaded.evaluation is None


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{i}.jsonl", ROWS[i : i + 2]) for i in (0, 2)]
    assert len(load_data(section(file=files), ByteTokenizer(), seed=0).train) == 4
    with pytest.raises(ConfigError, match="several formats"):
        load_data(section(file=[files[0], _text_file(tmp_path)]), ByteTokenizer(), seed=0)


def _text_file(folder: Path) -> str:
    (folder / "more.txt").write_text("text")
    return str(folder / "more.txt")


def test_held_out_rows_are_the_same_every_time_and_never_trained_on(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", ROWS)
    first, second = (load_data(section(file=file, eval_fraction=0.25), ByteTokenizer(), seed=3) for _ in range(2))
    assert first.evaluation is not None
    assert second.evaluation is not None
    assert (len(first.train), len(first.evaluation)) == (15, 5)
    assert first.evaluation.fingerprint() == second.evaluation.fingerprint()
    held_out = {bytes(first.evaluation.row(i)[0].tolist()) for i in range(5)}
    assert held_out.isdisjoint(bytes(first.train.row(i)[0].tolist()) for i in range(15))
    other = load_data(section(file=file, eval_fraction=0.25), ByteTokenizer(), seed=4)
    assert other.evaluation is not None
    assert other.evaluation.fingerprint() != first.evaluation.fingerprint()


def test_an_evaluation_file(tmp_path: Path) -> None:
    file, held_out = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", ROWS[:3])
    loaded = load_data(section(file=file, eval_file=held_out), ByteTokenizer(), seed=0)
    assert loaded.evaluation is not None
    assert (len(loaded.train), len(loaded.evaluation)) == (20, 3)


def test_cut_and_empty_rows_are_told(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "bcdef"},
        {"prompt": "abcdef", "completion": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    loaded = load_data(section(file=jsonl(tmp_path / "rows.jsonl", rows), max_length=4), ByteTokenizer(), seed=0)
    assert len(loaded.train) == 2
    assert any("2 of 3 rows cut to data.max_length=4" in note for note in loaded.notes)
    assert any("1 of 3 rows left out: no label tokens" in note for note in loaded.notes)


def test_a_row_without_text_is_left_out(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"text": None}, {"text": "bc"}])
    loaded = load_data(section(file=file), ByteTokenizer(), seed=0)
    assert [bytes(loaded.train.row(0)[0].tolist())] == [b"bc"]
    assert any("1 of 2 rows left out" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("content", "options", "error", "part"),
    [
        ("", {}, DataError, "is empty"),
        ("{not json\n", {}, DataError, "cannot be read"),
        ('{"text": ""}\n', {}, DataError, "no tokens to learn"),
        ('{"prompt": "abcdef", "completion": "g"}\n', {"max_length": 4}, DataError, "no tokens to learn"),
        ('{"text": "ab"}\n', {"eval_fraction": 0.5}, DataError, "leaves none to train on"),
        ('{"other": "ab"}\n', {}, DataError, "found: 'other'"),
        ('{"text": 1}\n', {}, DataError, "row 1: column 'text': expected text, found int 1"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, content: str, options: dict[str, Any], error: type, part: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(error) as caught:
        load_data(section(file=str(file), **options), ByteTokenizer(), seed=0)
    assert part in str(caught.value)


def test_missing_files_folders_and_unknown_endings(tmp_path: Path) -> None:
    for file, error, part in (
        (tmp_path / "none.jsonl", DataError, "does not exist"),
        (tmp_path, DataError, "is no file"),
    ):
        with pytest.raises(error, match=part):
            load_data(section(file=str(file)), ByteTokenizer(), seed=0)
    odd = tmp_path / "rows.xyz"
    odd.write_text("ab\n")
    with pytest.raises(ConfigError, match=r"give data\.format"):
        load_data(section(file=str(odd)), ByteTokenizer(), seed=0)
    assert len(load_data(section(file=str(odd), format="text"), ByteTokenizer(), seed=0).train) == 1


def test_tokens_beyond_the_models_vocabulary(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="token 119, but the model's vocabulary has 100"):
        load_data(section(file=file), ByteTokenizer(), seed=0, vocab_size=100)


def test_a_local_folder_as_hub_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS)
    made = DataSection.model_validate({"hub": str(folder), "split": "train[:5]"})
    assert len(load_data(made, ByteTokenizer(), seed=0).train) == 5
    missing = DataSection.model_validate({"hub": str(folder), "split": "test"})
    with pytest.raises(DataError, match="split 'test', cannot be loaded"):
        load_data(missing, ByteTokenizer(), seed=0)
