"""`fuyou train` for real: learns, stops, resumes bit for bit, survives kills, and explains bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from fuyou.cli import main
from fuyou.recipe import load_recipe
from fuyou.training import EXPORT_MARK, evaluate, make_scheduler
from tests.fuyou.command_line import (
    NUM_STEPS,
    TINY_LLAMA,
    TrainingProcess,
    metrics,
    same_numbers,
    train,
    write_recipe,
)

METRIC_KEYS = {
    *("step", "committed_step", "loss", "grad_norm", "clipped", "skipped", "learning_rate", "num_tokens"),
    *("seconds", "predicted_seconds", "limiting_lane", "lane_seconds", "peak_gpu_bytes", "peak_host_bytes"),
    *("bytes_read", "bytes_written", "bytes_spilled"),
}


@pytest.fixture(scope="module", autouse=True)
def small_and_private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One compute thread (two only disturb each other at this size) and caches of our own."""
    import datasets

    patch = pytest.MonkeyPatch()
    caches = tmp_path_factory.mktemp("caches")
    patch.setenv("XDG_CACHE_HOME", str(caches))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(caches / "datasets"))
    patch.setenv("HF_DATASETS_CACHE", str(caches / "datasets"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    patch.undo()


EVERY_STEP = ("--set", "offload.durability=step")
"""Else these runs, which fit into memory, are planned to be committed now and then."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(write_recipe(folder)) == 0
    return folder


# ------------------------------------------------------------------------------------------------ a whole run


def test_the_summary_counts_what_is_written_after_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is committed only when it ends: everything that is trained, once."""
    recipe = write_recipe(tmp_path)
    for steps in ("2", "3"):
        assert main(["train", str(recipe), "--json", "--steps", steps]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert sum(event["bytes_written"] for event in events if event["event"] == "step") == 0
        shards = fuyou.inspect_store(tmp_path / "store")["shards"]
        kept = sum(shard["weight_bytes"] + shard["state_bytes"] for shard in shards)
        written = events[-1]["bytes_written"]
        if steps == "2":  # and both slots' room, beforehand
            assert written >= kept + fuyou.inspect_store(tmp_path / "store")["size_bytes"]
        else:
            assert kept <= written < 1.1 * kept


def test_a_run_writes_metrics_recipe_and_a_model_that_transformers_loads(uninterrupted: Path) -> None:
    from transformers import AutoModelForCausalLM

    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(set(line) >= METRIC_KEYS for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "eval_loss" in lines[-1]
    assert load_recipe(uninterrupted / "out" / "recipe.yaml") == load_recipe(uninterrupted / "recipe.yaml")
    plain = AutoModelForCausalLM.from_pretrained(uninterrupted / "out" / "model", dtype=torch.float32)
    opened = fuyou.open_store_model(uninterrupted / "store", host_memory="64MiB")
    with opened.fuyou, torch.no_grad():
        ids = torch.arange(20).reshape(2, 10)
        opened.eval()
        assert torch.equal(plain(input_ids=ids).logits, opened(input_ids=ids).logits)


def test_the_learning_rate_follows_the_schedule(uninterrupted: Path) -> None:
    # Linear warm-up over 2 steps to 1e-3, then linear decay to 0 after 5: worked out by hand.
    expected = [0.0, 0.5e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3]
    assert [line["learning_rate"] for line in metrics(uninterrupted)] == pytest.approx(expected)


def test_training_again_after_the_end_does_nothing(uninterrupted: Path) -> None:
    model = uninterrupted / "out" / "model"
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    lines = metrics(uninterrupted)
    assert train(uninterrupted / "recipe.yaml") == 0
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before
    assert metrics(uninterrupted) == lines


def test_inspect_verify_and_export(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(uninterrupted / "store")
    assert main(["inspect", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == NUM_STEPS
    assert main(["inspect", store]) == 0
    shown = capsys.readouterr().out
    assert f"step: {NUM_STEPS}\n" in shown
    assert "\ncrash: costs at most " in shown
    for file in (uninterrupted / "store").iterdir():
        assert f"{file}:\n" in shown
    assert "none of the store's" not in shown
    assert main(["verify", store]) == 0
    assert capsys.readouterr().out == "all data is as it was written\n"
    assert main(["export", store, str(tmp_path / "exported")]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    exported, trained = tmp_path / "exported", uninterrupted / "out" / "model"
    names = [path.name for path in sorted(trained.glob("*.safetensors"))]
    assert names
    for name in names:
        assert (exported / name).read_bytes() == (trained / name).read_bytes()


def test_verify_finds_a_flipped_bit(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    shutil.copytree(uninterrupted / "store", store)
    for file in store.glob("extents-*.bin"):
        data = bytearray(file.read_bytes())
        data[::4096] = bytes(byte ^ 1 for byte in data[::4096])
        file.write_bytes(data)
    assert main(["verify", str(store)]) == 1
    assert capsys.readouterr().out.strip()
    assert main(["verify", str(store), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]


def test_plan_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["plan", str(recipe)]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert fuyou.Plan.from_json(plan).to_json() == fuyou.Plan.from_json(plan).to_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_plan_from_a_file_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["plan", str(recipe), "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    assert train(recipe, "--set", f"offload.plan={tmp_path / 'plan.json'}", "--steps", "1") == 0


def test_plan_for_the_hardware_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = fuyou.HardwareProfile(
        device="cuda",
        num_cores=16,
        compute_flops_per_second=4e14,
        adam_parameters_per_second=4e9,
        read_bytes_per_second=7e9,
        write_bytes_per_second=5e9,
        mixed_bytes_per_second=6e9,
        host_memory_bytes=2**36,
    )
    file = tmp_path / "hardware.json"
    file.write_text(json.dumps(profile.to_json()))
    assert main(["plan", str(write_recipe(tmp_path)), "--hardware", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cuda"
    file.write_text('{"device": "cuda", "coars": 3}')
    assert main(["plan", str(write_recipe(tmp_path)), "--hardware", str(file)]) == 2


def test_evaluation_is_the_mean_over_label_tokens(uninterrupted: Path) -> None:
    from transformers import AutoModelForCausalLM

    from fuyou.data import TokenRows, collate
    from fuyou.tokenizing import ByteTokenizer

    rows = TokenRows.from_rows(
        (list(text), [i >= learned for i in range(len(text))])
        for text, learned in ((b"1 + 1 = 2!", 8), (b"9 + 1 = 10!!!!", 8), (b"abc", 0))
    )
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "out" / "model", dtype=torch.float32).eval()
    total, count = 0.0, 0
    for i in range(len(rows)):
        batch = collate(rows, [i], ByteTokenizer.pad_id)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1].double()
        for position, label in enumerate(batch["labels"][0, 1:].tolist()):
            if label != -100:
                total -= float(torch.log_softmax(logits[position], dim=0)[label])
                count += 1
    assert evaluate(model, rows, 0, rows_per_batch=2) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt"])
def test_a_resumed_schedule_is_the_one_that_was_never_stopped(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, training__lr_scheduler_type=name, training__max_steps=9))
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = make_scheduler(recipe, plain, 9, 0)
    rates = []
    for _ in range(9):
        rates.append(plain.param_groups[0]["lr"])
        plain.step()
        schedule.step()
    resumed = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    resumed.param_groups[0]["lr"] = 0.25  # whatever the optimizer came back with
    schedule = make_scheduler(recipe, resumed, 9, 4)
    for step in range(4, 9):
        assert resumed.param_groups[0]["lr"] == rates[step]
        resumed.step()
        schedule.step()


# -------------------------------------------------------------------------------------------- stop and resume


def test_stopping_and_continuing_changes_no_bit(uninterrupted: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert train(recipe, "--steps", "2") == 0
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert not (tmp_path / "out" / "model").exists()
    assert train(recipe, "--steps", "1", "--resume", "2") == 0
    assert train(recipe, "--resume", "must") == 0
    assert same_numbers(metrics(tmp_path)) == same_numbers(metrics(uninterrupted))
    assert metrics(tmp_path)[-1]["eval_loss"] == metrics(uninterrupted)[-1]["eval_loss"]
    for file in (uninterrupted / "out" / "model").glob("*.safetensors"):
        assert (tmp_path / "out" / "model" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGINT,
    ],
)
def test_a_run_that_was_ended_by_a_signal_resumes(uninterrupted: Path, tmp_path: Path, number: signal.Signals) -> None:
    # Many steps, so that the signal arrives in the middle; only the first few are compared.
    recipe = write_recipe(tmp_path)
    with TrainingProcess(
        recipe, *EVERY_STEP, "--set", "training.max_steps=100000", "--set", "training.lr_scheduler_type=constant"
    ) as run:
        run.wait_for_step(3)
        code, errors = run.end_by(number)
    found = fuyou.inspect_store(tmp_path / "store")
    committed = found["step"]
    reached = metrics(tmp_path)[-1]["step"]
    assert reached - 2 <= committed <= reached + 1
    assert fuyou.verify_store(tmp_path / "store") == []
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        # bitsandbytes, which peft imports where it is installed, says this on processors with AVX-512.
        ours = [line for line in errors.splitlines() if not line.startswith("Failed to load CPU gemm_4bit_forward")]
        assert ours == [
            f"fuyou: interrupted: the store stands at step {committed}: run the same command to resume there"
        ]
    steps = ["--set", f"training.max_steps={committed + 2}", "--set", "training.lr_scheduler_type=constant"]
    no_export = ["--set", "output.export=false"]
    assert train(recipe, *steps, *no_export) == 0
    resumed = metrics(tmp_path)
    assert [line["step"] for line in resumed] == list(range(1, committed + 3))
    reference = tmp_path / "reference"
    reference.mkdir()
    assert train(write_recipe(reference), *steps, *no_export) == 0
    assert same_numbers(resumed) == same_numbers(metrics(reference))


def test_an_error_in_the_middle_leaves_a_store_that_resumes(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fuyou import metrics as metrics_module

    original = metrics_module.MetricsFile.write

    def full(self: Any, values: Any) -> None:
        if values["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        original(self, values)

    recipe = write_recipe(tmp_path)
    monkeypatch.setattr(metrics_module.MetricsFile, "write", full)
    assert train(recipe, *EVERY_STEP) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert train(recipe) == 0
    assert same_numbers(metrics(tmp_path)) == same_numbers(metrics(uninterrupted))


def test_a_moved_store_continues(uninterrupted: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert train(recipe, "--steps", "2") == 0
    (tmp_path / "store").rename(tmp_path / "other drive")
    assert train(recipe, "--resume", "must", "--store", str(tmp_path / "other drive")) == 0
    assert same_numbers(metrics(tmp_path)) == same_numbers(metrics(uninterrupted))
    assert not (tmp_path / "store").exists()


def test_a_new_run_puts_older_metrics_aside(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')
    assert train(write_recipe(tmp_path), "--steps", "1") == 0
    assert len(metrics(tmp_path)) == 1
    assert (tmp_path / "out" / "metrics.1.jsonl").read_text() == '{"step": 1, "loss": 7}\n'


def test_other_data_on_resume_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert train(recipe, "--steps", "1") == 0
    assert main(["train", str(recipe), "--steps", "1", "--set", "data.max_length=9"]) == 0
    assert "note: data differ from the steps before 1" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *options: str) -> tuple[int, str]:
    """The exit code and the one message of `fuyou train`."""
    code = train(recipe, *options)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuyou: error: ")
    assert "Traceback" not in captured.err
    assert "unexpected" not in captured.err
    return code, captured.err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved by plain transformers, in two shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    values = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def pretrained(folder: Path, checkpoint: Path) -> Path:
    return write_recipe(folder, model__config=None, model__name_or_path=str(checkpoint))


def test_a_checkpoint_trains(tmp_path: Path, checkpoint: Path) -> None:
    assert train(pretrained(tmp_path, checkpoint), "--steps", "1") == 0
    assert len(metrics(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_missing_and_corrupt_safetensors(
    tmp_path: Path, checkpoint: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    victim = sorted(broken.glob("*.safetensors"))[0]
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-64])
    else:
        victim.write_bytes(b"\xff" * 256)
    code, message = refused(capsys, pretrained(tmp_path, broken))
    assert code == 1
    assert victim.name in message
    # Repaired, the same command works: nothing half-made stands in the way.
    shutil.copy(checkpoint / victim.name, victim)
    assert train(pretrained(tmp_path, broken), "--steps", "1") == 0


_SAID_WITHOUT_TORCH = """
import os, sys
from fuyou.cli import main
from fuyou.progress import LineReporter

def note(reporter, text):
    print(text, "torch" in sys.modules, flush=True)
    os._exit(0)

LineReporter.note = note
assert main(["train", sys.argv[1], "--set", "training.max_step=3"]) == 2
assert "torch" not in sys.modules
main(["train", sys.argv[1]])
"""


def test_something_is_said_before_the_libraries_are_loaded(tmp_path: Path) -> None:
    """What is wrong with a recipe, too."""
    found = subprocess.run(
        [sys.executable, "-c", _SAID_WITHOUT_TORCH, str(write_recipe(tmp_path))],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.stdout == "loading torch and transformers False\n"
    assert "max_step" in found.stderr


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("output.dir", "file/out"),
        ("output.dir", "file"),
        ("offload.store", "file/store"),
        ("offload.store", "file"),
        ("offload.base", "file/base"),
    ],
)
def test_a_file_in_the_way_is_named_before_any_work(
    option: str, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    recipe = write_recipe(tmp_path, lora__r=2) if option == "offload.base" else write_recipe(tmp_path)
    assert main(["train", str(recipe), "--set", f"{option}={tmp_path / path}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "loading torch and transformers\n"
    assert captured.err.startswith(f"fuyou: error: {option}={tmp_path / path}: {tmp_path / 'file'} is no folder: ")
    assert {found.name for found in tmp_path.iterdir()} == {"file", "recipe.yaml", "rows.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["export", "store", "{}/file/x"], "OUT={}/file/x"),
        (["trace", "store", "--out", "{}/file/x.json"], "the folder of --out={}/file"),
        (["generate", "store", "--prompt", "a", "--output", "{}/file/x/y.jsonl"], "the folder of --output={}/file/x"),
    ],
)
def test_a_file_in_the_way_of_a_command(
    arguments: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the store is looked at, which is none."""
    (tmp_path / "file").write_text("mine")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fuyou: error: {option.format(tmp_path)}: {tmp_path / 'file'} is no folder: ")


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, pretrained(tmp_path, tmp_path / "nowhere"))
    assert code == 1
    assert "nowhere" in message


def test_a_store_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path), "--steps", "1") == 0
    other = write_recipe(tmp_path, model__config={**TINY_LLAMA, "num_hidden_layers": 3})
    code, message = refused(capsys, other)
    assert code == 1
    assert "another model" in message
    code, message = refused(capsys, write_recipe(tmp_path, offload__compute_dtype="bfloat16"))
    assert code in (1, 2)
    assert "compute_dtype" in message


def test_a_store_directory_with_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("mine")
    code, message = refused(capsys, write_recipe(tmp_path))
    assert code == 1
    assert "thesis.tex" in message
    assert (tmp_path / "store" / "thesis.tex").read_text() == "mine"


def test_a_store_that_is_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert train(recipe, "--steps", "1") == 0
    with fuyou.open_store_model(tmp_path / "store", host_memory="64MiB").fuyou:
        code, message = refused(capsys, recipe)
    assert code == 1
    assert "store" in message


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from io_engine import space

    monkeypatch.setattr(space, "free_bytes", lambda path: 4096)
    code, message = refused(capsys, write_recipe(tmp_path))
    assert code == 1
    assert "space" in message.lower()


def test_a_path_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, message = refused(capsys, write_recipe(tmp_path, offload__store=str(tmp_path / "file" / "store")))
    assert code == 2
    assert str(tmp_path / "file") in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere, so a read-only folder cannot be made by chmod")
def test_a_read_only_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    code, message = refused(capsys, write_recipe(tmp_path, offload__store=str(folder / "store")))
    assert code == 1
    assert str(folder) in message


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc as a directory that even root cannot write")
def test_a_directory_that_nobody_can_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, write_recipe(tmp_path, offload__store="/proc/self/store"))
    assert code == 1
    assert "/proc/self" in message


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_stores_that_are_none(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert main([command, str(folder)]) == 1
        message = capsys.readouterr().err
        assert message.startswith("fuyou: error: ")
        assert str(folder) in message
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("command", ["plan", "train"])
def test_too_small_a_budget(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, offload__host_memory="64KiB")
    assert main([command, str(recipe)]) == 3
    message = capsys.readouterr().err
    assert "host_memory" in message
    assert not (tmp_path / "store").exists()


def test_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    code, message = refused(capsys, write_recipe(tmp_path))
    assert code == 1
    assert "no tokens to learn" in message
    assert not (tmp_path / "store").exists()


def test_a_tokenizer_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, write_recipe(tmp_path, model__config={**TINY_LLAMA, "vocab_size": 40}))
    assert code == 1
    assert "vocabulary has 40" in message


def test_wrong_model_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, write_recipe(tmp_path, model__config={**TINY_LLAMA, "model_type": "lama"}))
    assert code == 2
    assert "lama" in message
    code, message = refused(capsys, write_recipe(tmp_path, model__config={**TINY_LLAMA, "num_attention_heads": "two"}))
    assert code == 2


def test_a_model_that_is_no_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, write_recipe(tmp_path, model__config={"model_type": "vit"}))
    assert code in (1, 2)
    assert "vit" in message.lower()


def test_a_folder_that_an_export_would_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "out" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text("precious")
    code, message = refused(capsys, write_recipe(tmp_path))
    assert code == 2
    assert "output.export: false" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("how", "code"), [("must", 1), ("3", 1)])
def test_resume_where_there_is_nothing(tmp_path: Path, how: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    found, message = refused(capsys, write_recipe(tmp_path), "--resume", how)
    assert found == code
    assert "no run to resume" in message
    assert not (tmp_path / "store").exists()


def test_resume_that_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert train(recipe, "--steps", "2") == 0
    assert refused(capsys, recipe, "--resume", "never")[0] == 1
    code, message = refused(capsys, recipe, "--resume", "1")
    assert code == 1
    assert "step 2" in message
    code, message = refused(capsys, recipe, "--set", "training.max_steps=1")
    assert code == 2
    assert "beyond this recipe's last step 1" in message


BEFORE = "no step was begun; run the same command again"
BEHIND = rf"the store stands at step ({NUM_STEPS - 1}|{NUM_STEPS}): run the same command to resume there"
"""The last step may still be on its way to the drive."""


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("fuyou.training.load_data", BEFORE),
        ("fuyou.opening.random_blocks", BEFORE),
        ("fuyou.opening.freeze", BEFORE),
        ("fuyou.training.evaluate", BEHIND),
        ("fuyou.runtime.export_checkpoint", BEHIND),
    ],
)
def test_ctrl_c_outside_of_the_steps(
    uninterrupted: Path, where: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While rows are read, the store is filled, the model is made, evaluated or exported: a message, and it goes on."""

    def interrupted(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    recipe = write_recipe(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, interrupted)
        assert train(recipe, *EVERY_STEP) == 130
    assert re.fullmatch(f"fuyou: interrupted: {said}\n", capsys.readouterr().err)
    assert train(recipe, *EVERY_STEP) == 0
    assert same_numbers(metrics(tmp_path)) == same_numbers(metrics(uninterrupted))
    assert (tmp_path / "out" / "model" / EXPORT_MARK).exists()
