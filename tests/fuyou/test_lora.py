"""Adapters by recipe and command line: export, merging by peft's own arithmetic, the same run after a kill."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fuyou
from fuyou.cli import main
from tests.fuyou.command_line import TrainingProcess, metrics, same_numbers, train, write_recipe
from tests.tiny_models import tiny_batches, tiny_model_config

# transformers warns of an attribute of its own that peft reads; peft of what it does with tied weights.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*"),
]

ATTENTION = ["q_proj", "v_proj"]
LINEAR: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def offload(folder: Path, **changes: Any) -> fuyou.OffloadConfig:
    return fuyou.OffloadConfig(store=folder, **{"device": "cpu", "host_memory": "64MiB", **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """As plain transformers loads them."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True, "modules_to_save": ["lm_head", "input_layernorm"]}),
        ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt2", {"fan_in_fan_out": True, "use_rslora": True}),
        ("qwen2", {"bias": "all", "target_modules": ATTENTION}),
        (
            "qwen3_moe",
            {"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        ),
    ],
    ids=str,
)
def test_merged_export_equals_pefts_own_merge(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """After training steps; the store and the run go on unchanged. The store alone gives the same files again."""
    config = tiny_model_config(name)
    model = fuyou.from_config(config, offload=offload(tmp_path / "s"), seed=7, trainable=())
    model.save_pretrained(tmp_path / "start")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**LINEAR, **options}))
    batches = tiny_batches(config, 3, 1, seed=3)
    with wrapped.fuyou:
        optimizer = fuyou.AdamW(wrapped, lr=1e-2)
        for micro_batches in batches[:2]:
            wrapped(**micro_batches[0]).loss.backward()
            optimizer.step()
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        wrapped.fuyou.export(str(tmp_path / "base"))
        wrapped.fuyou.export(str(tmp_path / "merged"), merge=True)
        with pytest.raises(fuyou.ModelError, match="merge=True"):
            wrapped.merge_and_unload()
        with pytest.raises(fuyou.ModelError, match="merge=True"):
            wrapped.base_model.merge_adapter()
        wrapped.fuyou.export(str(tmp_path / "base_again"))
        wrapped(**batches[2][0]).loss.backward()
        optimizer.step()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    expected = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    merged, start = weights(tmp_path / "merged"), weights(tmp_path / "start")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], value.to(torch.bfloat16)) for key, value in expected.items())
    assert any(not torch.equal(merged[key], start[key]) for key in merged)
    kept, again = weights(tmp_path / "base"), weights(tmp_path / "base_again")
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    if options.get("bias") != "all":
        assert all(torch.equal(kept[key], start[key]) for key in kept)


def test_a_store_is_opened_with_its_adapters(tmp_path: Path) -> None:
    """For evaluation and generation: the same logits, nothing to be trained; an adapter in bfloat16 keeps its type."""
    config = tiny_model_config("llama")
    for own_dtype in (True, False):
        store = tmp_path / f"s{own_dtype}"
        model = fuyou.from_config(config, offload=offload(store), seed=7, trainable=())
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**LINEAR), autocast_adapter_dtype=own_dtype)
        batch = tiny_batches(config, 1, 1, seed=3)[0][0]
        ids = {key: value for key, value in batch.items() if key != "labels"}
        with wrapped.fuyou, torch.no_grad():
            fuyou.AdamW(wrapped)
            expected = wrapped.eval()(**ids).logits
            dtypes = {name: p.dtype for name, p in wrapped.named_parameters()}
        opened = fuyou.open_store_model(store, host_memory="64MiB")
        with opened.fuyou, torch.no_grad():
            assert torch.equal(opened.eval()(**ids).logits, expected)
            assert {name: p.dtype for name, p in opened.named_parameters()} == dtypes
            assert not any(p.requires_grad for p in opened.parameters())
            new = opened.generate(input_ids=ids["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
            assert new.shape == (1, 7)


def test_merging_what_one_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    config = tiny_model_config("llama_tied")
    model = fuyou.from_config(config, offload=offload(tmp_path / "s"), trainable=())
    with model.fuyou:
        with pytest.raises(fuyou.ModelError, match="no adapters"):
            model.fuyou.export(str(tmp_path / "out"), merge=True)
        peft.get_peft_model(model, peft.LoraConfig(**LINEAR, modules_to_save=["lm_head"]))
        with pytest.raises(fuyou.ModelError, match=r"lm_head is tied"):
            model.fuyou.export(str(tmp_path / "out"), merge=True)
    assert not (tmp_path / "out").exists()


# --- recipes ---------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {
    "lora__r": 4,
    "lora__lora_dropout": 0.1,
    "lora__target_modules": ATTENTION,
    "lora__modules_to_save": ["lm_head"],
    "offload__compute_dtype": "bfloat16",
    "optimizer__learning_rate": 1e-2,
}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapter" / "adapter_model.safetensors")


def test_recipe_trains_exports_and_resumes_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed after two steps and run again: the numbers and the adapter of one run; the store alone exports both kinds."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert train(write_recipe(tmp_path / "whole", **LORA)) == 0
    recipe = write_recipe(tmp_path / "killed", **LORA)
    with TrainingProcess(recipe) as process:
        process.wait_for_step(2)
        process.end_by(signal.SIGKILL)
    assert train(recipe) == 0
    assert same_numbers(metrics(tmp_path / "killed")) == same_numbers(metrics(tmp_path / "whole"))
    expected, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "killed")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["eval_loss"] < lines[0]["loss"]

    store = str(tmp_path / "whole" / "store")
    capsys.readouterr()
    assert main(["export", store, str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["what"] == "adapter"
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert main(["export", store, str(tmp_path / "merged"), "--merge"]) == 0
    assert "merged model" not in capsys.readouterr().err
    assert torch.equal(weights(tmp_path / "merged")["lm_head.weight"], _head(expected))
    assert main(["export", store, str(tmp_path / "dcp"), "--format", "dcp"]) == 1
    assert "trains adapters" in capsys.readouterr().err
    assert main(["export", store, str(tmp_path / "dcp"), "--format", "dcp", "--merge"]) == 2
    assert not (tmp_path / "dcp").exists()


def _head(saved: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(value for name, value in saved.items() if "lm_head" in name).to(torch.bfloat16)


def test_merging_a_run_without_adapters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path, training__max_steps=1)) == 0
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "merged"), "--merge"]) == 2
    assert "trains no adapters" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.lora_alfa=3", "did you mean 'lora_alpha'"),
        ("lora.r=0", r"lora\.r=0"),
        ("lora.init_lora_weights=pissa", r"lora\.init_lora_weights"),
        ("lora.target_modules=[q_prj]", r"lora\.target_modules: .*'q_prj'.* q_proj"),
        ("lora.modules_to_save=[head]", r"lora\.modules_to_save: .*'head'.* lm_head"),
        ("lora.target_modules=nothing.*", "lora: "),
        ("trainable=[lm_head]", "either trainable or lora"),
    ],
)
def test_wrong_sections_are_refused(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, **LORA)
    assert train(recipe, "--set", setting) == 2
    assert re.search(message, capsys.readouterr().err)


def test_other_adapters_than_the_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, **LORA)
    assert train(recipe, "--steps", "1") == 0
    assert train(recipe, "--set", "lora.r=8") != 0
    assert "default.r" in capsys.readouterr().err
    assert train(recipe) == 0


def test_plan_of_a_recipe_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan before the run is that of the run: nothing of the base is trained."""
    assert main(["plan", str(write_recipe(tmp_path, **LORA)), "--json"]) == 0
    planned = fuyou.Plan.from_json(json.loads(capsys.readouterr().out))
    assert not any(b.trainable for b in planned.blocks)
    config = tiny_model_config("llama")
    lora = peft.LoraConfig(r=4, target_modules=ATTENTION, layers_to_transform=[1])
    made = fuyou.plan_model(config, offload=offload(tmp_path / "s"), batch_size=2, sequence_length=24, lora=lora)
    assert [b.in_backward for b in made.blocks] == [False, False, True, True, True]
    wrapped = peft.get_peft_model(fuyou.from_config(config, offload=offload(tmp_path / "s"), trainable=()), lora)
    with wrapped.fuyou:
        fuyou.AdamW(wrapped)
        for own, other in zip(wrapped.fuyou.plan.blocks, made.blocks, strict=True):
            # Which depends on how long the batch is, as far as that is known.
            assert own == dataclasses.replace(other, activations=own.activations)
        assert wrapped.fuyou.plan.host_memory_bytes == made.host_memory_bytes


@pytest.mark.parametrize("durability", ["step", "checkpoint"])
def test_either_durability(durability: Any, tmp_path: Path) -> None:
    """What a crash may cost is chosen for adapters too: given up after five steps, the last commit is what is left."""
    config = tiny_model_config("llama")
    every = {"commit_every_steps": 2} if durability == "checkpoint" else {}

    def open_run() -> tuple[Any, Any]:
        settings = offload(tmp_path / "s", durability=durability, **every)
        model = fuyou.from_config(config, offload=settings, seed=7, trainable=())
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**LINEAR))
        return wrapped, fuyou.AdamW(wrapped, lr=1e-2, max_grad_norm=0.05)

    batches = [m[0] for m in tiny_batches(config, 6, 1, seed=3)]

    def step(wrapped: Any, optimizer: Any, number: int) -> float:
        wrapped(**batches[number]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(wrapped.fuyou.step_metrics()["loss"])

    wrapped, optimizer = open_run()
    losses = [step(wrapped, optimizer, number) for number in range(5)]
    wrapped.fuyou.abandon()
    wrapped, optimizer = open_run()
    with wrapped.fuyou:
        begun = optimizer.step_count
        assert begun == 4 if durability == "checkpoint" else begun >= 3
        assert [step(wrapped, optimizer, number) for number in range(begun, 5)] == losses[begun:]
