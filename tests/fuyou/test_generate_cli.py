"""`fuyou generate`: answers equal plain transformers', from stores and folders; wrong input is one message."""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fuyou
from fuyou.cli import main
from fuyou.errors import PlanError
from fuyou.generation import default_offload, plan_generation
from fuyou.generation_plan import Demand
from fuyou.inference import find_source, opened
from fuyou.memory import MemoryMeter
from tests.fuyou.command_line import train, write_recipe
from tests.fuyou.test_generate import GREEDY, letter, letters, saved

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'u' if m.role == 'user' else 'a' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
PROMPTS = ["abc", "hello", "x"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of plain transformers with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("checkpoint") / "plain"
    saved("llama", path)
    tokenizer = letters()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """A store of the same weights, made without `fuyou train`, on a machine that is measured already."""
    path = folder.parent / "store"
    fuyou.measure_hardware(folder.parent, "cpu", "float32")
    offload = fuyou.OffloadConfig(store=path, device="cpu", compute_dtype="float32", host_memory="64MiB")
    fuyou.from_pretrained(folder, offload=offload).fuyou.close()
    return path


def run(model: Path, *arguments: str) -> int:
    return main(["generate", str(model), "--device", "cpu", "--host-memory", "64MiB", *arguments])


def as_json(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()  # progress bars of plain transformers
    assert run(model, "--json", "--quiet", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out)
    return found


def plain_answers(folder: Path, texts: list[str], seed: int = 0, **options: Any) -> list[str]:
    """What transformers alone makes of prompts, padded left."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    output = model.generate(**inputs, max_new_tokens=6, pad_token_id=tokenizer.eos_token_id, **options)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def asked(*texts: str) -> list[str]:
    return [argument for text in texts for argument in ("--prompt", text)] + ["--max-new-tokens", "6"]


# --------------------------------------------------------------------------------------------------------- answers


def test_answers_equal_plain_transformers_from_a_store_and_from_a_folder(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = plain_answers(folder, [f"u{text}a" for text in PROMPTS], **GREEDY)
    raw = plain_answers(folder, PROMPTS, **GREEDY)
    assert turns != raw
    before = sorted(folder.parent.iterdir())
    for model in (store, folder):
        for option, expected in (((), turns), (("--chat",), turns), (("--no-chat",), raw)):
            found = as_json(capsys, model, *asked(*PROMPTS), *option)
            assert [answer["completion"] for answer in found["answers"]] == expected
            assert [answer["prompt"] for answer in found["answers"]] == PROMPTS
            assert found["measured"]["num_texts"] == 3
            assert found["measured"]["num_token_steps"] == 6
            assert found["plan"]["predicted_tokens_per_second"] > 0
    assert sorted(folder.parent.iterdir()) == before  # the copy of the weights is gone


def test_sampling_is_seeded_and_equals_plain_transformers(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-chat", "--temperature", "0.9", "--top-p", "0.95", "--top-k", "30", "--seed", "7"]
    state = torch.get_rng_state()
    found = [as_json(capsys, store, *asked(*PROMPTS), *options)["answers"] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
    expected = plain_answers(folder, PROMPTS, seed=7, do_sample=True, temperature=0.9, top_p=0.95, top_k=30)
    assert [answer["completion"] for answer in found[0]] == expected
    other = as_json(capsys, store, *asked(*PROMPTS), *options[:-1], "8")["answers"]
    assert other != found[0]
    # A later batch goes on with the random numbers where the one before has stopped.
    parts = as_json(capsys, store, *asked("abc", "abc"), *options, "--batch-size", "1")["answers"]
    assert parts[0]["completion"] != parts[1]["completion"]


def test_prompts_in_vertical_micro_batches_are_the_same(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = as_json(capsys, store, *asked(*PROMPTS), "--no-chat")
    # Two rows of the longest prompt at a time.
    monkeypatch.setattr("fuyou.generation_plan.MAX_PREFILL_TOKENS", 2 * len("hello"))
    parts = as_json(capsys, store, *asked(*PROMPTS), "--no-chat")
    assert (whole["plan"]["micro_batch_size"], parts["plan"]["micro_batch_size"]) == (3, 2)
    assert parts["answers"] == whole["answers"]
    assert parts["measured"]["num_token_steps"] == whole["measured"]["num_token_steps"]


def test_answers_on_stdout_and_the_rest_on_stderr(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = plain_answers(folder, PROMPTS[:2], **GREEDY)
    alone = plain_answers(folder, ["abc"], **GREEDY)[0]
    capsys.readouterr()  # progress bars of plain transformers
    assert run(store, *asked("abc"), "--no-chat", "--quiet") == 0
    assert capsys.readouterr() == (f"{alone}\n", "")
    assert run(store, *asked("abc", "hello"), "--no-chat") == 0
    both = capsys.readouterr()
    assert both.out == f"> abc\n{expected[0]}\n\n> hello\n{expected[1]}\n\n"
    assert "predicted: " in both.err
    assert "12 tokens in " in both.err


def test_files_of_prompts_and_of_answers(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("abc\n\nhello\r\n")
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "abc", "id": 5})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"},
                                   {"role": "user", "content": "d"}]})
        + "\n"
    )  # fmt: skip
    common = ["--max-new-tokens", "3", "--quiet"]
    assert run(store, "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "a.jsonl"), *common) == 0
    assert capsys.readouterr() == ("", "")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["abc", "hello"]
    found = as_json(capsys, store, "--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "3")["answers"]
    assert found[0] == {**lines[0], "id": 5}
    assert found[1]["num_prompt_tokens"] == len("ubacuda")


def test_an_answer_ends_where_the_tokenizers_end_is(folder: Path, store: Path, tmp_path: Path, capsys: Any) -> None:
    """The third token of the greedy answer, made the tokenizer's end of a text."""
    whole = as_json(capsys, store, *asked("abc"), "--no-chat")["answers"][0]
    third = whole["completion"][2]
    tokenizer = letters()
    tokenizer.eos_token = third
    tokenizer.save_pretrained(tmp_path)
    found = as_json(capsys, store, *asked("abc"), "--no-chat", "--tokenizer", str(tmp_path))["answers"][0]
    end = whole["completion"].index(third)
    assert (found["completion"], found["finish"], found["num_tokens"]) == (whole["completion"][:end], "stop", end)
    assert whole["finish"] == "length"


def test_a_trained_store_has_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path)) == 0
    capsys.readouterr()
    of_store = as_json(capsys, tmp_path / "store", *asked("1 + 1 = "))["answers"]
    exported = as_json(capsys, tmp_path / "out" / "model", *asked("1 + 1 = "), "--tokenizer", "bytes")["answers"]
    assert of_store == exported


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_of_a_folder_and_of_a_stores_run(folder: Path, tmp_path: Path, capsys: Any) -> None:
    import peft

    def adapted(model: Any) -> Any:
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(2)
        return peft.get_peft_model(model, config)

    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="64MiB")
    model = fuyou.from_pretrained(folder, offload=offload)
    with model.fuyou as runtime:
        wrapped = adapted(model)
        optimizer = fuyou.AdamW(wrapped, lr=1e-2)
        wrapped(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        optimizer.step()
        runtime.flush()
        wrapped.save_pretrained(tmp_path / "adapter")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload()
    plain.save_pretrained(tmp_path / "merged")
    letters().save_pretrained(tmp_path / "merged")
    expected = plain_answers(tmp_path / "merged", PROMPTS, **GREEDY)
    assert expected != plain_answers(folder, PROMPTS, **GREEDY)
    for arguments in ((folder, "--adapter", str(tmp_path / "adapter")), (tmp_path / "store",)):
        found = as_json(capsys, arguments[0], *asked(*PROMPTS), "--no-chat", *arguments[1:])  # type: ignore[arg-type]
        assert [answer["completion"] for answer in found["answers"]] == expected


# ----------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--prompt", "a", "--prompts", "x.txt"], 2, "not allowed with argument"),
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature=-1.0: expected 0"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "3"], 2, "leave top_p and top_k out"),
        (["--prompt", "a", "--top-p", "0"], 2, "top_p=0.0: expected"),
        (["--prompt", "a", "--top-k", "0"], 2, "'0': expected a whole number above 0"),
        (["--prompts", "missing.txt"], 1, "missing.txt cannot be read: No such file"),
        (["--prompts", "prompts.csv"], 2, "name a .txt file"),
        (["--prompts", "empty.txt"], 1, "has no prompts"),
        (["--prompts", "broken.jsonl"], 1, "broken.jsonl, line 2: not JSON"),
        (["--prompts", "odd.jsonl"], 1, "odd.jsonl, line 1: expected prompt (text) or messages (a list); found text"),
        (["--prompts", "roles.jsonl"], 1, "roles.jsonl, line 1: messages must be objects with role and content"),
        (["--prompt", "a", "--output", "there.jsonl"], 2, "exists; name a new file"),
        (["--prompt", "a", "--output", "answers.txt"], 2, "name a .jsonl file"),
        (["--prompt", "", "--no-chat"], 1, "has no tokens: there is nothing to continue"),
        (["--prompt", "a", "--adapter", "."], 2, "no adapter_config.json in it"),
        (["--prompt", "a", "--tokenizer", "./none"], 1, "no tokenizer can be loaded"),
        (["--prompt", "a", "--tokenizer", "bytes", "--chat"], 2, "--chat: this tokenizer has no chat template"),
        (["--prompts", "turns.jsonl", "--tokenizer", "bytes"], 2, "messages need a chat template"),
        (["--prompt", "a", "--max-new-tokens", "999"], 2, "64 that this model has positions for: set --max-new-tokens to 61"),
        (["--prompt", "a", "--dtype", "bfloat16"], 2, "a store of float32 weights"),
        (["--prompt", "a", "--max-new-tokens", "9", "--host-memory", "64KiB"], 3, "Not one token fits"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_message(
    arguments: list[str],
    code: int,
    part: str,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("empty.txt", "\n \n"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt"\n'),
        ("odd.jsonl", '{"text": "a"}\n'),
        ("roles.jsonl", '{"messages": ["a"]}\n'),
        ("turns.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n'),
        ("there.jsonl", ""),
    ):
        (tmp_path / name).write_text(text)
    assert run(store, *arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuyou: error: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_what_is_neither_store_nor_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (
        ([str(tmp_path)], "neither a store nor a checkpoint"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path), "--also", str(tmp_path / "b")], "no store of several directories"),
        ([str(tmp_path), "--also", str(tmp_path)], "a directory is named twice"),
    ):
        assert main(["generate", *arguments, "--prompt", "a"]) in (1, 2)
        assert part in capsys.readouterr().err


def test_a_failure_leaves_no_copy_of_the_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), opened(find_source(str(folder)), device="cpu", host_memory="64MiB",
                                                  temporary=str(tmp_path)):  # fmt: skip
        assert [path.name.startswith("fuyou-temporary-") for path in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_letters_round_trip() -> None:
    """The tokenizer of these tests gives one token a letter."""
    assert letters()("abc")["input_ids"] == [97, 98, 99]
    assert letters().decode([97, 5]) == "a" + letter(5)


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with positions for a million tokens, whose cache takes 8 KiB a token."""
    path = tmp_path_factory.mktemp("long") / "plain"
    shape = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2**20)).save_pretrained(path)
    letters().save_pretrained(path)
    return path


def test_a_context_too_long_for_the_budget_is_refused_before_anything_starts(
    long_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the number that fits: so many do, one more does not."""
    arguments = ["--prompt", "abc", "--no-chat", "--temporary", str(tmp_path), "--max-new-tokens"]
    assert run(long_folder, *arguments, "1000000") == 3
    said = capsys.readouterr().err
    match = re.search(r"(\d+) tokens fit: set --max-new-tokens to (\d+) or less", said)
    assert match is not None, said
    total, most = map(int, match.groups())
    assert total == most + 3
    assert not list(tmp_path.iterdir())
    source = find_source(str(long_folder))
    offload = default_offload(source, device="cpu", host_memory="64MiB")
    for new_tokens, fits in ((most, True), (most + 1, False)):
        with contextlib.nullcontext() if fits else pytest.raises(PlanError):
            plan = plan_generation(source, Demand(1, 3, new_tokens), offload, batch_size=None, say=lambda _line: None)
            assert plan.cache_bytes > 2**24


def test_memory_stays_within_the_budget_of_cache_and_weights_together(
    long_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 texts of 200 tokens: 24 MiB of keys and values and of what computes with them, beside weights."""
    (tmp_path / "p.txt").write_text("\n".join(["abcdefghij" * 19] * 12))
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="1GiB")
    fuyou.from_pretrained(long_folder, offload=offload, trainable=()).fuyou.close()
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--no-chat", "--max-new-tokens", "10", "--batch-size", "12"]
    peaks = []
    for _ in range(2):  # the first brings in what is imported late
        gc.collect()
        meter = MemoryMeter()
        found = as_json(capsys, tmp_path / "store", *arguments, "--tokenizer", str(long_folder))
        peaks.append(meter.take_peak())
        meter.close()
    assert found["plan"]["cache_bytes"] > 2**24
    assert peaks[-1] < 64 * 2**20
