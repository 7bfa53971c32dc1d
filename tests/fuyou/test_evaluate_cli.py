"""`fuyou evaluate`: the losses of plain transformers, every weight read once for many micro-batches; wrong input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

import fuyou
from fuyou.cli import main
from fuyou.data import TokenRows, collate
from fuyou.evaluation import EvaluationPlan, evaluate_rows
from tests.fuyou.command_line import metrics, train, write_recipe
from tests.fuyou.test_generate import letters, opened, saved
from tests.tiny_models import TINY_MODEL_NAMES

ROWS = [("abc", "defgh"), ("q", "rs"), ("hello", "x"), ("uvw", "uvwuvwuvw"), ("z", "zzz")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield
    torch.set_num_threads(threads)


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "plain"
    saved("llama", path)
    letters().save_pretrained(path)
    return path


def evaluated(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    options = ["--device", "cpu", "--host-memory", "64MiB", "--json", "--quiet"]
    assert main(["evaluate", str(model), *options, *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out)
    return found


def plain_losses(folder: Path) -> tuple[float, float]:
    """(of all tokens, of completions), row by row by transformers' own loss; means over the tokens that count."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums, counts = [0.0, 0.0], [0, 0]
    for prompt, completion in ROWS:
        ids = torch.tensor([[*map(ord, prompt + completion), 2]])  # the tokenizer's end of a text is token 2
        for kind, learned_from in enumerate((1, len(prompt))):
            labels = ids.clone()
            labels[:, :learned_from] = -100
            count = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                sums[kind] += float(model(input_ids=ids, labels=labels).loss) * count
            counts[kind] += count
    return sums[0] / counts[0], sums[1] / counts[1]


def test_losses_equal_plain_transformers_from_a_folder_and_a_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(rows_file(tmp_path))
    loss, completion_loss = plain_losses(folder)
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="64MiB")
    fuyou.from_pretrained(folder, offload=offload).fuyou.close()
    for model in (folder, tmp_path / "store"):
        for options in ((), ("--batch-size", "1"), ("--batch-size", "2")):
            found = evaluated(capsys, model, "--data", data, *options)
            assert found["loss"] == pytest.approx(loss, rel=1e-6)
            assert found["completion_loss"] == pytest.approx(completion_loss, rel=1e-6)
            assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
            assert (found["num_rows"], found["num_passes"]) == (5, 1)
            assert found["num_completion_tokens"] == sum(len(c) + 1 for _, c in ROWS)


def test_keys_of_a_recipes_data_section(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": p, "a": c}) + "\n" for p, c in ROWS))
    columns = ("--data", str(path), "--set", "prompt_field=q", "--set", "completion_field=a")
    found = evaluated(capsys, folder, *columns)
    assert found["completion_loss"] == pytest.approx(plain_losses(folder)[1], rel=1e-6)
    learned = evaluated(capsys, folder, *columns, "--set", "completion_only_loss=false")
    assert learned["completion_loss"] == learned["loss"] == found["loss"]
    assert evaluated(capsys, folder, *columns, "--set", "max_length=4")["num_tokens"] < found["num_tokens"]


def test_a_recipes_held_out_rows_have_the_loss_that_its_run_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert train(recipe) == 0
    found = evaluated(capsys, tmp_path / "store", "--data", str(recipe))
    assert found["completion_loss"] == pytest.approx(metrics(tmp_path)[-1]["eval_loss"], rel=1e-6)
    assert found["num_rows"] == 3


@pytest.mark.parametrize("name", TINY_MODEL_NAMES)
def test_vertical_micro_batches_equal_plain_transformers(name: str, tmp_path: Path) -> None:
    plain = saved(name, tmp_path / "plain")
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="64MiB")
    rows = TokenRows.from_rows([(list(range(3 + i, 9 + 3 * i)), [False] * 2 + [True] * (4 + 2 * i)) for i in range(5)])
    batch = collate(rows, range(5), 0)
    with torch.no_grad():
        expected = float(plain(**batch, use_cache=False).loss)
    attention = plain.config._attn_implementation
    model = fuyou.from_pretrained(tmp_path / "plain", offload=offload, attn_implementation=attention).eval()
    with model.fuyou:
        found = evaluate_rows(model, rows, 0, EvaluationPlan(2, 4, 0))
    assert found.completion_loss == pytest.approx(expected, rel=1e-5)
    assert (found.num_passes, found.num_rows) == (2, 5)


def test_each_weight_is_read_once_a_pass(tmp_path: Path) -> None:
    model = opened(tmp_path / "store")
    with model.fuyou as runtime:
        rows = TokenRows.from_rows([([1, 2, 3, 4], [True] * 4)] * 12)
        sizes = [layout.weight_bytes for layout in runtime.layouts.values()]
        whole = evaluate_rows(model, rows, 0, EvaluationPlan(2, 12, 0))
        assert whole.bytes_read == sum(sizes)
        halves = evaluate_rows(model, rows, 0, EvaluationPlan(2, 6, 0))
        assert halves.bytes_read == 2 * sum(sizes)
        assert halves.loss == pytest.approx(whole.loss, rel=1e-6)
        model.train()
        with pytest.raises(fuyou.ModelError, match="call model.eval"):
            evaluate_rows(model, rows, 0, EvaluationPlan(2, 12, 0))


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "required: --data"),
        (["--data", "missing.jsonl"], 1, "does not exist"),
        (["--data", "missing.yaml"], 2, "recipe 'missing.yaml' cannot be read"),
        (["--data", "rows.jsonl", "--set", "promt_field=q"], 2, "did you mean 'prompt_field'"),
        (["--data", "rows.jsonl", "--set", "max_length=1"], 2, "data.max_length=1: expected a number at least 2"),
        (["--data", "rows.jsonl", "--set", "max_length=3"], 1, "no tokens to learn"),
        (["--data", "rows.jsonl", "--host-memory", "64KiB"], 3, "host_memory"),
    ],
)
def test_wrong_input_is_one_message(
    arguments: list[str],
    code: int,
    part: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abcdef", "completion": "g"}\n')
    assert main(["evaluate", str(folder), "--device", "cpu", "--quiet", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err
    assert captured.err.count("fuyou: error: ") == 1
