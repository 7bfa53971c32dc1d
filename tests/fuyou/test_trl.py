"""Unmodified trainers of trl over a streamed model, next to the same trainers over the plain model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fuyou
from tests.fuyou.master_adamw import MasterAdamW, assert_equal_weights
from tests.tiny_models import tiny_model_config

trl = pytest.importorskip("trl", reason="trl (extra trl) is not installed")

# trl warns of its own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    # accelerate keeps these for the whole process.
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def letters() -> PreTrainedTokenizerFast:
    """A token for each letter."""
    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sft(
    model: Any, folder: Path, optimizer: Any = None, *, train: bool = True, callback: bool = True, **changes: Any
) -> Any:
    """The script of trl's documentation; with an optimizer of ours, the lines that change."""
    texts = [
        {"text": f"the cat {chr(97 + i % 26)} sat on mat {chr(97 + (3 * i) % 26)}"[: 14 + i % 5]} for i in range(24)
    ]
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    made = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options | changes),
        train_dataset=Dataset.from_list(texts),
        eval_dataset=Dataset.from_list(texts[:6]),
        processing_class=letters(),
        optimizers=(optimizer, None),
        callbacks=[fuyou.FuyouCallback()] if optimizer is not None and callback else None,
    )
    if train:
        made.train()
    return made


def history(made: Any, key: str) -> list[float]:
    return [entry[key] for entry in made.state.log_history if key in entry]


KEYS = ("loss", "eval_loss", "entropy", "mean_token_accuracy", "eval_mean_token_accuracy")


@pytest.mark.parametrize("micro_batch_size", [1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"loss_type": "dft"}], ids=["plain", "autocast", "dft"])
def test_sft_equals_plain(changes: dict[str, Any], micro_batch_size: int | None, tmp_path: Path) -> None:
    """trl calls the base model and reads the head's weights itself: losses, norms, its own metrics, evaluation."""
    model, plain = streamed_and_plain("llama_tied", tmp_path, micro_batch_size=micro_batch_size)
    expected = sft(plain, tmp_path / "plain", **changes)
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
    with model.fuyou:
        made = sft(model, tmp_path / "out", optimizer, **changes)
        for key in KEYS:
            assert history(made, key) == pytest.approx(history(expected, key), rel=2e-4), key
        # The norm of gradients that bfloat16 sums over one row and one have made, not over two at once.
        tolerance = 2e-2 if changes.get("bf16") and micro_batch_size else 2e-4
        assert history(made, "grad_norm") == pytest.approx(history(expected, "grad_norm"), rel=tolerance)
        assert len(history(made, "loss")) == 3
        assert model.fuyou.committed_step == 3
        model.save_pretrained(tmp_path / "end")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype="auto")
    if not changes.get("bf16"):
        for (name, parameter), wanted in zip(exported.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter, wanted, rtol=1e-3, atol=2e-5, msg=name)


def streamed_and_plain(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A model in a store and the same one in memory, both in float32 unless `compute_dtype` is given."""
    config = tiny_model_config(name)
    config.attention_dropout = 0.0
    dtype = options.setdefault("compute_dtype", "float32")
    offload = fuyou.OffloadConfig(store=folder / "store", device="cpu", host_memory="64MiB", **options)
    model = fuyou.from_config(config, offload=offload, seed=1)
    model.save_pretrained(folder / "start")
    return model, AutoModelForCausalLM.from_pretrained(folder / "start", dtype=getattr(torch, dtype))


@pytest.mark.parametrize(("passes", "bf16"), [pytest.param(1, True, marks=pytest.mark.slow), (2, False), (2, True)])
def test_sft_without_clipping_equals_plain_bit_for_bit(passes: int, bf16: bool, tmp_path: Path) -> None:
    """Where rows are computed together as in memory and nothing is clipped, the arithmetic is the same, autocast too."""
    changes = {"bf16": bf16, "max_grad_norm": 0.0, "gradient_accumulation_steps": passes}
    model, plain = streamed_and_plain("llama", tmp_path)
    expected = sft(plain, tmp_path / "plain", **changes)
    # A limit that is never reached keeps the gradients of one pass for the next.
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.0, max_grad_norm=math.inf if passes > 1 else None)
    with model.fuyou:
        made = sft(model, tmp_path / "out", optimizer, **changes)
        assert {key: history(made, key) for key in KEYS} == {key: history(expected, key) for key in KEYS}
        assert_equal_weights(model, plain, tmp_path)


@pytest.mark.parametrize("bf16", [False, True], ids=["bfloat16", "autocast"])
def test_sft_with_weights_in_bfloat16_equals_plain_bit_for_bit(bf16: bool, tmp_path: Path) -> None:
    """In memory with float32 masters too; clipping is the optimizer's on both sides."""
    model, plain = streamed_and_plain("llama", tmp_path, compute_dtype="bfloat16")
    masters = MasterAdamW(plain, lr=2e-3, max_grad_norm=0.5)
    expected = sft(plain, tmp_path / "plain", masters, callback=False, bf16=bf16, max_grad_norm=0.0)
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
    with model.fuyou:
        made = sft(model, tmp_path / "out", optimizer, bf16=bf16)
        assert {key: history(made, key) for key in KEYS} == {key: history(expected, key) for key in KEYS}
        assert history(made, "grad_norm") == pytest.approx(masters.norms, rel=1e-12)
        assert min(masters.norms) > 0.5  # clipping was at work
        assert_equal_weights(model, plain, tmp_path)


def test_evaluates_before_it_trains(tmp_path: Path) -> None:
    """trl puts its forward on the model when the trainer is made; training after it is what it would have been."""
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        model, plain = streamed_and_plain("llama", folder)
        optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.0, max_grad_norm=math.inf)
        figures = []
        with model.fuyou:
            for run, name, given in ((plain, "plain", None), (model, "out", optimizer)):
                made = sft(run, folder / name, given, train=False, bf16=bf16, max_grad_norm=0.0)
                before = made.evaluate()["eval_loss"]
                made.train()
                figures.append([before, history(made, "loss"), made.evaluate()["eval_loss"]])
        assert figures[0] == figures[1]


def dpo(
    model: Any, reference: Any, folder: Path, optimizer: Any = None, resume: bool | None = None, **changes: Any
) -> Any:
    """The script of trl's documentation with a reference model; with an optimizer of ours, the lines that change."""
    rows = [
        {"prompt": "the cat ", "chosen": f"sat on {chr(97 + i % 26)}", "rejected": f"ran {chr(97 + (2 * i) % 26)}"}
        for i in range(16)
    ]
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    made = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**options | changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=letters(),
        optimizers=(optimizer, None),
        callbacks=[fuyou.FuyouCallback()] if optimizer is not None else None,
    )
    if optimizer is not None and reference is not None:
        reference.fuyou.adopt_forward()  # the callback sees the trained model only
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_dpo_equals_plain(bf16: bool, tmp_path: Path) -> None:
    """Two streamed models: one is trained, the other, opened from the first one's export, is the reference."""
    config = tiny_model_config("llama")
    config.attention_dropout = 0.0

    def offload(name: str) -> fuyou.OffloadConfig:
        return fuyou.OffloadConfig(
            store=tmp_path / name, device="cpu", compute_dtype="float32", host_memory="64MiB", micro_batch_size=None
        )

    model: Any = fuyou.from_config(config, offload=offload("trained"), seed=1)
    model.save_pretrained(tmp_path / "start")
    reference: Any = fuyou.from_pretrained(str(tmp_path / "start"), offload=offload("reference"))
    plain = [AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32) for _ in range(2)]
    expected = dpo(*plain, tmp_path / "plain", bf16=bf16)
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
    with model.fuyou, reference.fuyou:
        made = dpo(model, reference, tmp_path / "out", optimizer, bf16=bf16)
    # Processors with bfloat16 units round a product as its shape has it.
    tolerance = 2e-3 if bf16 and torch.backends.cpu.get_cpu_capability() == "AVX512" else 2e-4
    for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies"):
        assert history(made, key) == pytest.approx(history(expected, key), rel=tolerance, abs=1e-6), key
    assert history(made, "loss")[-1] < history(made, "loss")[0]


def adapted(model: Any) -> Any:
    """LoRA before the optimizer is made, so that trl gets a model of peft's and no peft_config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        )


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_adapters_equal_plain(script: str, tmp_path: Path) -> None:
    """The same scripts over adapters; DPO's reference is the model with its adapters off, or as they began."""
    config = tiny_model_config("llama")
    config.attention_dropout = 0.0
    offload = fuyou.OffloadConfig(
        store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="64MiB", micro_batch_size=None
    )
    model: Any = fuyou.from_config(config, offload=offload, seed=1, trainable=())
    model.save_pretrained(tmp_path / "start")
    plain = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32))
    wrapped = adapted(model)
    optimizer = fuyou.AdamW(wrapped, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
    with wrapped.fuyou:
        if script == "sft":
            expected = sft(plain, tmp_path / "plain")
            made = sft(wrapped, tmp_path / "out", optimizer)
            keys = ["loss", "grad_norm", "eval_loss", "mean_token_accuracy"]
        else:
            expected = dpo(plain, None, tmp_path / "plain")
            made = dpo(wrapped, None, tmp_path / "out", optimizer)
            keys = ["loss", "grad_norm", "rewards/margins"]
    for key in keys:
        assert history(made, key) == pytest.approx(history(expected, key), rel=2e-4, abs=1e-6), key
    assert len(history(made, "loss")) == 3


def test_dpo_over_adapters_resumes_with_the_reference_of_the_beginning(tmp_path: Path) -> None:
    """trl copies the adapter when a trainer is made, which is after steps then: an earlier checkpoint has the right copy."""

    def go(name: str, max_steps: int, resume: bool | None = None, **changes: Any) -> Any:
        config = tiny_model_config("llama")
        config.attention_dropout = 0.0
        offload = fuyou.OffloadConfig(
            store=tmp_path / name / "store", device="cpu", compute_dtype="float32", host_memory="64MiB"
        )
        wrapped = adapted(fuyou.from_config(config, offload=offload, seed=1, trainable=()))
        optimizer = fuyou.AdamW(wrapped, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
        with wrapped.fuyou:
            return dpo(wrapped, None, tmp_path / name / "out", optimizer, resume, max_steps=max_steps, **changes)

    whole = go("whole", 4)
    go("cut", 2, save_strategy="steps", save_steps=1)
    (tmp_path / "cut" / "out" / "checkpoint-2").rename(tmp_path / "gone")
    made = go("cut", 4, resume=True)
    assert history(made, "loss")[-2:] == history(whole, "loss")[-2:]
    go("unsaved", 2)
    with pytest.raises(fuyou.ConfigError, match="adapter 'ref'"):
        go("unsaved", 4, resume=True)
