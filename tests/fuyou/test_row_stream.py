"""Rows that are read as they are needed, and rows that are kept tokenised: the same rows as without, after any stop."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuyou import data
from fuyou.data import load_data
from fuyou.errors import DataError
from fuyou.recipe import DataSection
from fuyou.tokenizing import ByteTokenizer
from tests.fuyou.command_line import TrainingProcess, metrics, same_numbers, train, write_recipe


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def section(**options: Any) -> DataSection:
    return DataSection(tokenizer="bytes", **{"max_length": 8, **options})


def stream_of(file: str | list[str], **options: Any) -> Any:
    loaded = load_data(section(file=file, streaming=True, **options), ByteTokenizer(), seed=5)
    assert loaded.stream is not None
    assert len(loaded.train) == 0
    return loaded.stream


def texts_of(rows: Any) -> list[str]:
    return [bytes(rows.row(index)[0].tolist()).decode() for index in range(len(rows))]


NAMES = [f"row {number:02}" for number in range(11)]


def test_a_stream_has_every_row_once_an_epoch_in_its_window(tmp_path: Path) -> None:
    """Windows follow each other, rows within are shuffled, and otherwise in each epoch; without shuffling as they come."""
    file = [jsonl(tmp_path / "a.jsonl", NAMES[:6]), jsonl(tmp_path / "b.jsonl", ["x", *NAMES[6:]])]  # "x" has no label
    stream = stream_of(file, shuffle_window=4)
    seen = texts_of(stream.take(22)[0])
    for epoch in (seen[:11], seen[11:]):
        assert [set(epoch[:4]), set(epoch[4:8]), set(epoch[8:])] == [set(NAMES[:4]), set(NAMES[4:8]), set(NAMES[8:])]
    assert seen[:11] != NAMES
    assert seen[:11] != seen[11:]
    plain = stream_of(file, shuffle_window=4, shuffle=False)
    assert texts_of(plain.take(22)[0]) == NAMES * 2
    loaded = load_data(section(file=file), ByteTokenizer(), seed=5)
    assert texts_of(loaded.train) == NAMES


@pytest.mark.parametrize(("kind", "window"), [("jsonl", 1), ("jsonl", 4), ("parquet", 4), ("text", 11), ("jsonl", 100)])
def test_a_stream_goes_on_at_any_position(tmp_path: Path, kind: str, window: int) -> None:
    """From a position that went through JSON, in a new stream, come the rows that would have come."""
    import datasets

    rows = datasets.Dataset.from_list([{"text": name} for name in NAMES])
    file = str(tmp_path / f"rows.{'txt' if kind == 'text' else kind}")
    if kind == "parquet":
        rows.to_parquet(file)
    elif kind == "jsonl":
        rows.to_json(file)
    else:
        Path(file).write_text("".join(f"{name}\n" for name in NAMES))
    whole = texts_of(stream_of(file, shuffle_window=window).take(30)[0])
    for stop in (0, 3, 4, 10, 11, 12, 23):
        stream = stream_of(file, shuffle_window=window)
        stream.take(stop)
        position = json.loads(json.dumps(stream.position))
        again = stream_of(file, shuffle_window=window)
        again.seek(position)
        assert texts_of(again.take(30 - stop)[0]) == whole[stop:], stop
        assert again.position == json.loads(json.dumps(again.position))


def test_what_streamed_rows_say(tmp_path: Path) -> None:
    """Cut and empty rows are told; a set without usable rows, a broken row and tokens beyond the vocabulary are errors."""
    notes = stream_of(jsonl(tmp_path / "long.jsonl", ["0123456789", "", "abc"])).take(2)[1]
    assert [("cut" in note, "left out" in note) for note in notes] == [(True, False), (False, True)]
    with pytest.raises(DataError, match="none of 2 rows has a label token"):
        stream_of(jsonl(tmp_path / "empty.jsonl", ["", ""])).take(1)
    with pytest.raises(DataError, match=r"no column named.*found: 'words'"):
        (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
        stream_of(str(tmp_path / "other.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        (tmp_path / "broken.jsonl").write_text('{"text": "abc"\n')
        stream_of(str(tmp_path / "broken.jsonl")).take(1)
    small = load_data(
        section(file=jsonl(tmp_path / "a.jsonl", NAMES), streaming=True), ByteTokenizer(), seed=0, vocab_size=100
    )
    assert small.stream is not None
    with pytest.raises(DataError, match="vocabulary has 100"):
        small.stream.take(1)


def test_rows_are_kept_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows come back without a tokenizer; other options, other rows and damage are seen; what is old goes."""
    file, keep = jsonl(tmp_path / "rows.jsonl", [*NAMES, "", "0123456789"]), tmp_path / "rows"

    def load(**options: Any) -> Any:
        return load_data(section(file=file, **options), ByteTokenizer(), seed=5, keep=keep)

    first = load(eval_fraction=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(data, "tokenise_row", lambda *_: pytest.fail("tokenised again"))
        second = load(eval_fraction=0.2)
    for a, b in ((first.train, second.train), (first.evaluation, second.evaluation)):
        assert a.fingerprint() == b.fingerprint()
    assert [note for note in second.notes if "tokenised before" not in note] == list(first.notes)
    assert len(list(keep.iterdir())) == 1
    kept = next(keep.iterdir())
    assert load(max_length=4).train.fingerprint() != first.train.fingerprint()
    assert [path for path in keep.iterdir() if path != kept] == list(keep.iterdir()) != []
    jsonl(Path(file), NAMES[:3])
    shutil.rmtree(tmp_path / "datasets-cache")
    assert texts_of(load().train) == NAMES[:3]
    tokens = next(keep.iterdir()) / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"?")
    assert data.read_rows(tokens.parent, Counter()) is None
    assert texts_of(load().train) == NAMES[:3]


def test_digests_of_rows_stay_what_they_were() -> None:
    """Stores name them: runs of earlier versions must go on."""
    rows = data.TokenRows.from_rows([([1, 2, 3], [False, True, True]), ([4], [True])])
    assert rows.fingerprint() == "xxh3:8c30622233e182fa"
    assert data.TokenRows(np.asarray(rows.tokens), rows.learned, rows.starts).fingerprint() == rows.fingerprint()


@pytest.mark.parametrize(
    ("streaming", "kill"),
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_the_next_row(tmp_path: Path, streaming: bool, kill: bool, capsys: Any) -> None:
    """The numbers of a run that was never stopped, with rows streamed in small windows, and with rows kept."""
    options: dict[str, Any] = {"data__eval_fraction": None, "training__max_steps": 6, "offload__durability": "step"}
    options |= {"data__streaming": True, "data__shuffle_window": 5} if streaming else {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert train(write_recipe(tmp_path / "whole", **options)) == 0
    recipe = write_recipe(tmp_path / "killed", **options)
    if kill:
        with TrainingProcess(recipe) as process:
            process.wait_for_step(3)
            process.end_by(signal.SIGKILL)
    else:
        assert train(recipe, "--steps", "3") == 0
    assert train(recipe) == 0
    assert same_numbers(metrics(tmp_path / "killed")) == same_numbers(metrics(tmp_path / "whole"))
    assert (tmp_path / "killed" / "out" / "rows").exists() != streaming
    for wrong in ("data.packing=true", "data.eval_fraction=0.1", "training={num_train_epochs: 1.0}"):
        if streaming:
            assert train(recipe, "--set", wrong) == 2
            assert "streaming" in capsys.readouterr().err
