"""Runs beside their predictions: tokens from the data, windows from the first batch, what later runs learn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import fuyou
from fuyou.cli import main
from fuyou.hardware import HardwareProfile, cached_hardware, drives_of, keep_profile, versions_of
from fuyou.opening import shards_of
from fuyou.plan import StepShape
from fuyou.planner import compute_bytes, fitting_micro_batch, simulate_plan
from fuyou.recipe import load_recipe
from fuyou.training import expected_shape

SLOW_WRITES = HardwareProfile(
    device="cpu",
    num_cores=2,
    compute_flops_per_second=2e10,
    adam_parameters_per_second=1e9,
    read_bytes_per_second=2e9,
    write_bytes_per_second=5e7,
    mixed_bytes_per_second=1.05e9,
    host_memory_bytes=2**34,
    versions=versions_of("cpu"),
)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HardwareProfile:
    """A machine that was measured before, as far as anybody can tell."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_profile(SLOW_WRITES, drives_of(tmp_path), "cpu", "float32")
    assert cached_hardware(tmp_path, "cpu", "float32") == SLOW_WRITES
    return SLOW_WRITES


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        tie_word_embeddings=False,
        max_position_embeddings=256,
    )


def train(
    folder: Path, *, steps: int, expect: StepShape | None = None, host_memory: str = "48MiB"
) -> tuple[list[dict[str, Any]], fuyou.Plan, fuyou.Plan]:
    """The steps' metrics, the plan before the first batch and the one at the end."""
    offload = fuyou.OffloadConfig(
        store=folder, device="cpu", host_memory=host_memory, compute_dtype="float32", durability="step"
    )
    model = fuyou.from_config(llama(), offload=offload, seed=0)
    torch.manual_seed(0)
    metrics = []
    with model.fuyou:
        if expect is not None:
            model.fuyou.expect(expect)
        optimizer = fuyou.AdamW(model, lr=1e-3, max_grad_norm=1e9)
        before = model.fuyou.plan
        for _ in range(steps):
            ids = torch.randint(0, 256, (4, 64))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics.append(model.fuyou.step_metrics())
        return metrics, before, model.fuyou.plan


def test_windows_follow_the_first_batch_and_change_no_bit(measured: HardwareProfile, tmp_path: Path) -> None:
    """Writes are the limit, and the forward pass leaves the drive idle: some updates go there once that is known."""
    metrics, before, after = train(tmp_path / "store", steps=3)
    late = [b.name for b in after.blocks if b.update_window == "forward"]
    assert all(b.update_window == "backward" for b in before.blocks)
    assert 0 < len(late) < len(after.blocks)
    shape = StepShape(256, 1, 64)
    earlier = simulate_plan(before, measured, 256, 64)
    assert metrics[-1]["predicted_seconds"] == simulate_plan(after, measured, 256, 64).seconds < earlier.seconds
    assert set(metrics[-1]["predicted_lane_seconds"]) == set(metrics[-1]["lane_seconds"])
    # The same losses as of a run that knew it from the beginning, and as of one that knows nothing of the machine.
    known, planned, kept = train(tmp_path / "known", steps=3, expect=shape)
    assert planned == kept
    cached = tmp_path / "cache" / "fuyou"
    for file in cached.iterdir():
        file.unlink()
    plain, _, unknown = train(tmp_path / "plain", steps=3)
    assert all(b.update_window == "backward" for b in unknown.blocks)
    assert [m["predicted_seconds"] for m in plain] == [None] * 3
    assert [m["loss"] for m in metrics] == [m["loss"] for m in known] == [m["loss"] for m in plain]
    assert [m["grad_norm"] for m in metrics] == [m["grad_norm"] for m in known] == [m["grad_norm"] for m in plain]


def test_a_profile_that_is_off_is_warned_of_once_and_learnt(
    measured: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute was measured a thousand times too fast, the drive too slow; the next run of this model knows better."""
    wrong = dataclasses.replace(
        measured, compute_flops_per_second=2e13, write_bytes_per_second=1e10, read_bytes_per_second=1e10
    )
    keep_profile(dataclasses.replace(wrong, mixed_bytes_per_second=1e10), drives_of(tmp_path), "cpu", "float32")
    # Whatever else this machine does is not the cause here.
    monkeypatch.setattr("fuyou.prediction_check.PredictionCheck._cause", lambda *_args: None)
    metrics, _, _ = train(tmp_path / "store", steps=12, host_memory="1GiB")
    warned = [text for m in metrics for text in m.get("warnings", [])]
    about_compute = [text for text in warned if text.startswith("compute takes")]
    assert len(about_compute) <= 1
    assert len(warned) == len(set(warned)) > 0
    assert all("times as long as predicted" in text for text in warned)
    learnt = cached_hardware(tmp_path, "cpu", "float32")
    assert learnt is not None
    ((key, factors),) = learnt.refined.items()
    assert key.startswith(f"{metrics and sum(p.numel() for p in fuyou_parameters())} parameters")
    assert factors
    assert all(factor > 1 for factor in factors.values())
    again, _, _ = train(tmp_path / "again", steps=2, host_memory="1GiB")
    assert again[-1]["predicted_seconds"] > 1.5 * metrics[-1]["predicted_seconds"]


def fuyou_parameters() -> list[torch.nn.Parameter]:
    from transformers import LlamaForCausalLM

    return list(LlamaForCausalLM(llama()).parameters())


def write_recipe(folder: Path, **values: Any) -> Path:
    """Rows of 10 and of 30 tokens, in turn; a limit of 200."""
    lines = [json.dumps({"text": "a" * (9 if n % 2 else 29)}) for n in range(64)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    recipe: dict[str, Any] = {
        "model": {
            "config": {"model_type": "llama", "vocab_size": 300}
            | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        },
        "data": {"file": str(folder / "data.jsonl"), "text_field": "text", "tokenizer": "bytes", "max_length": 200},
        "offload": {
            "store": str(folder / "store"),
            "host_memory": "128MiB",
            "device": "cpu",
            "compute_dtype": "float32",
        },
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "output": {"dir": str(folder / "out"), "export": False},
    }
    for name, value in values.items():
        section, key = name.split("__")
        recipe[section][key] = value
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return file


def test_tokens_of_a_step_are_those_of_the_data(tmp_path: Path) -> None:
    """Eight rows are padded to their longest, which is 30 in nearly all steps; four micro-batches."""
    shape, source = expected_shape(load_recipe(write_recipe(tmp_path)))
    assert shape.num_micro_batches == 4
    assert 29 <= shape.sequence_length <= 31
    assert abs(shape.num_tokens - 8 * shape.sequence_length) <= 4
    assert source == "64 rows of the data"
    one, _ = expected_shape(
        load_recipe(
            write_recipe(tmp_path), ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"]
        )
    )
    assert 13 <= one.num_tokens <= 27  # between the two kinds of rows
    packed, source = expected_shape(load_recipe(write_recipe(tmp_path, data__packing=True)))
    assert packed.num_tokens == 8 * 200
    assert "packing" in source


def test_the_plan_of_a_recipe_counts_the_tokens_of_its_data(
    measured: HardwareProfile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["plan", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = found["prediction"]["seconds"]
    assert main(["train", str(recipe), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    for step in steps:
        assert step["predicted_seconds"] == pytest.approx(seconds, rel=0.05)
    # Without the data it is still a plan, of the longest rows.
    (tmp_path / "data.jsonl").unlink()
    assert main(["plan", str(recipe)]) == 0
    assert "1,600 a step, by data.max_length=200, since the data cannot be looked at" in capsys.readouterr().out


def test_other_versions_are_measured_again(measured: HardwareProfile, tmp_path: Path) -> None:
    old = dataclasses.replace(measured, versions={"torch": "1.0"})
    keep_profile(old, drives_of(tmp_path), "cpu", "float32")
    assert cached_hardware(tmp_path, "cpu", "float32") is None


def test_a_batch_that_finds_no_room_is_split_for_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is left beside the pools: as with micro_batch_size=1 given, bit for bit; the manifest keeps it."""
    ids = torch.arange(6 * 64).reshape(6, 64) % 256

    def losses(folder: Path, steps: int, **options: Any) -> tuple[list[float], Any, int]:
        offload = fuyou.OffloadConfig(
            store=folder, device="cpu", host_memory="64MiB", compute_dtype="float32", **options
        )
        model = fuyou.from_config(llama(), offload=offload, seed=0)
        found = []
        with model.fuyou:
            optimizer = fuyou.AdamW(model, lr=1e-3)
            for _ in range(steps):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(float(loss.detach()))
            return found, model.fuyou.plan, model.fuyou.store.state["numerics"]["micro_batch_size"]

    given, _, _ = losses(tmp_path / "given", 3, micro_batch_size=1)
    assert losses(tmp_path / "whole", 1)[2] is None
    monkeypatch.setattr("fuyou.runtime.available_host_bytes", lambda: 0)
    found, plan, stored = losses(tmp_path / "store", 2)
    assert (plan.micro_batch_size, stored) == (1, 1)
    assert "are free for a micro-batch in compute" in plan.reasons["micro_batch_size"]
    monkeypatch.undo()
    # With all the memory that there is: a run keeps its numerics.
    again, _, stored = losses(tmp_path / "store", 1)
    assert stored == 1
    assert found + again == given
    with pytest.raises(fuyou.ConfigError, match="micro_batch_size=3 conflicts with the run's micro_batch_size=1"):
        losses(tmp_path / "store", 1, micro_batch_size=3)


def test_the_largest_equal_micro_batches_that_find_room() -> None:
    shards = shards_of(llama())

    def rows(room_bytes: int, num_rows: int = 7) -> int:
        return fitting_micro_batch(
            shards, "float32", num_rows=num_rows, sequence_length=64, room_bytes=room_bytes, loss_chunk_tokens=None
        )

    def needed(size: int) -> int:
        return compute_bytes(shards, "float32", StepShape(size * 64, 1, 64), None)

    assert rows(needed(7)) == 7
    assert rows(needed(7) - 1) == rows(needed(4)) == 4
    assert rows(needed(4) - 1) == 3
    assert rows(needed(1)) == rows(0) == 1
