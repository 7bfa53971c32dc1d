"""`training.sample_prompts`: answers at evaluation, kept in metrics.jsonl; training goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fuyou.cli import main
from tests.fuyou.command_line import metrics, same_numbers, train, write_recipe

SAMPLED = {
    "training__sample_prompts": ["1 + 1 = ", "7"],
    "training__sample_max_new_tokens": 5,
    "training__eval_on_start": True,
    "training__eval_steps": 2,
}
CHANGED = {"training__sample_prompts", "training__sample_max_new_tokens"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield
    torch.set_num_threads(threads)


def test_samples_change_no_bit_of_training_and_equal_plain_transformers(tmp_path: Path) -> None:
    runs = {}
    for name, changes in (("with", SAMPLED), ("without", {k: v for k, v in SAMPLED.items() if k not in CHANGED})):
        (tmp_path / name).mkdir()
        assert train(write_recipe(tmp_path / name, **changes)) == 0
        runs[name] = metrics(tmp_path / name)
    assert same_numbers(runs["with"]) == same_numbers(runs["without"])
    assert [line.get("eval_loss") for line in runs["with"]] == [line.get("eval_loss") for line in runs["without"]]
    assert [line["step"] for line in runs["with"] if "samples" in line] == [2, 4, 5]
    assert not any("samples" in line for line in runs["without"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "with" / "out" / "model", dtype=torch.float32)
    for sample in runs["with"][-1]["samples"]:
        ids = torch.tensor([list(sample["prompt"].encode())])
        new = plain.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert sample["completion"] == bytes(new.tolist()).decode("utf-8", errors="replace")


def test_samples_are_said_and_need_no_held_out_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, **SAMPLED, data__eval_fraction=None)
    assert main(["train", str(recipe), "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for step in (0, 2):
        at = lines.index(f"step {step}: 1 + 1 =")
        assert lines[at + 1].startswith("  -> ")
        assert lines[at + 2] == f"step {step}: 7"
    assert main(["train", str(recipe), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sampled = [event for event in events if event["event"] == "samples"]
    assert [event["step"] for event in sampled] == [4, 5]
    assert sampled[-1]["samples"] == metrics(tmp_path)[-1]["samples"]


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        ({"training__sample_max_new_tokens": 60}, 2, "makes 68 tokens, and this model has positions for 64"),
        ({"training__sample_prompts": [""]}, 2, "training.sample_prompts"),
        ({"training__sample_prompts": "one"}, 2, "expected a list of texts"),
        ({"data__chat_template": True}, 2, "chat"),
    ],
)
def test_prompts_that_cannot_be_sampled_end_a_run_before_its_first_step(
    changes: dict[str, object], code: int, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_recipe(tmp_path, **SAMPLED | changes)) == code
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
