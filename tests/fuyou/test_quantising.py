"""Frozen layers in 8 and 4 bits: bitsandbytes' numbers, the trajectory of a model that holds them in memory, the traffic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import fuyou
from io_engine import StoreError
from tests.reference import ReferenceTrainer
from tests.tiny_models import tiny_batches, tiny_model_config

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes (extra quantised) is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

KINDS: list[Any] = ["int8", "nf4"]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def offload(folder: Path, kind: Any, **changes: Any) -> fuyou.OffloadConfig:
    settings = {"device": "cpu", "host_memory": "64MiB", "micro_batch_size": 2, "durability": "step", **changes}
    return fuyou.OffloadConfig(store=folder, frozen_dtype=kind, **settings)


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(11)
    lora: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    return peft.get_peft_model(model, peft.LoraConfig(**lora | options))


def by_the_library(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.reshape(-1, weight.shape[-1]).half())
        return bnb.int8_vectorwise_dequant(codes, scales).to(weight.dtype).reshape(weight.shape)
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"))


def joined(micro_batches: list[Any]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([m[key] for m in micro_batches]) for key in micro_batches[0]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("qwen3_moe", "bfloat16"), ("gpt2", "float32")])
def test_numbers_and_trajectory_are_the_librarys(name: str, dtype: Any, kind: Any, tmp_path: Path) -> None:
    """Weights as bitsandbytes gives them back; logits, losses, norms and masters as of a model that holds those."""
    config = tiny_model_config(name)
    plain_start = fuyou.from_config(config, offload=offload(tmp_path / "p", "bfloat16", compute_dtype=dtype), seed=7)
    with plain_start.fuyou:
        plain_start.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "start", dtype=getattr(torch, dtype), attn_implementation=config._attn_implementation
    )
    with torch.no_grad():
        for parameter_name, parameter in plain.named_parameters():
            if ("layers." in parameter_name or ".h." in parameter_name) and parameter.ndim > 1:
                parameter.copy_(by_the_library(parameter.detach().clone(), kind))
    settings = offload(tmp_path / "s", kind, compute_dtype=dtype)
    model = fuyou.from_pretrained(tmp_path / "start", offload=settings, seed=7, trainable=())
    model.save_pretrained(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=getattr(torch, dtype)).state_dict()
    assert all(torch.equal(exported[key], value) for key, value in plain.state_dict().items())
    options = {"fan_in_fan_out": True} if name == "gpt2" else {}
    if name == "qwen3_moe":
        options = {"target_modules": ["q_proj", "v_proj"]}
    wrapped = adapted(model, **options)
    reference = ReferenceTrainer(adapted(plain, **options), compute_dtype=dtype, max_grad_norm=0.05, seed=7, **OPTIONS)
    with wrapped.fuyou:
        optimizer = fuyou.AdamW(wrapped, max_grad_norm=0.05, **OPTIONS)
        for micro_batches in tiny_batches(config, 3, 2, seed=3):
            expected = reference.step(micro_batches)
            wrapped(**joined(micro_batches)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert (wrapped.fuyou.step_metrics()["loss"], optimizer.last_step.grad_norm) == expected
        for parameter_name, master in reference.masters().items():
            own = parameter_name.removeprefix("base_model.model.")
            assert torch.equal(optimizer.state_of(own).master.flatten(), master.flatten())
    assert fuyou.verify_store(tmp_path / "s") == []
    opened = fuyou.open_store_model(tmp_path / "s", host_memory="64MiB")
    with opened.fuyou:
        opened.fuyou.export(str(tmp_path / "merged"), merge=True)


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 4.01), ("int8", 2.05), ("nf4", 1.05)])
def test_traffic_of_a_step(kind: Any, most: float, tmp_path: Path) -> None:
    """Bytes read of the layers, a parameter and step, whatever the number of micro-batches; as planned."""
    config = tiny_model_config("llama")
    config.hidden_size, config.intermediate_size = 256, 768
    settings = offload(tmp_path / "s", kind)
    made = fuyou.from_config(config, offload=settings, seed=7, trainable=())
    plan = made.fuyou.plan
    made.fuyou.close()
    blocks = tuple(dataclasses.replace(b, weights_in_host=False, in_backward=b.kind != "prologue") for b in plan.blocks)
    pool = 2 * max(b.weight_bytes for b in blocks)
    settings = dataclasses.replace(settings, plan=dataclasses.replace(plan, blocks=blocks, weight_pool_bytes=pool))
    wrapped = adapted(fuyou.from_config(config, offload=settings, trainable=()))
    with wrapped.fuyou:
        optimizer = fuyou.AdamW(wrapped, **OPTIONS)
        for num_micro_batches in (1, 1, 3):
            wrapped(**joined(tiny_batches(config, 1, num_micro_batches, seed=3)[0])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.step_count > 1:  # the first brings the adapters' states into memory
                read = wrapped.fuyou.step_metrics()["bytes_read"]
                assert read == sum(b.num_weight_reads() * b.weight_bytes for b in blocks)
    layers = [b for b in blocks if b.kind == "layer"]
    parameters = sum(b.num_parameters for b in layers)
    assert 0.98 * most < 2 * sum(b.weight_bytes for b in layers) / parameters <= most


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    config = tiny_model_config("llama")
    with pytest.raises(fuyou.ConfigError, match="no decoder layer is frozen"):
        fuyou.from_config(config, offload=offload(tmp_path / "s", "nf4"))
    assert not (tmp_path / "s").exists()
    model = fuyou.from_config(config, offload=offload(tmp_path / "s", "nf4"), trainable=["model.layers.2", "lm_head"])
    with model.fuyou:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        with pytest.raises(fuyou.ConfigError, match=r"model\.layers\.0 is to be trained"):
            fuyou.AdamW(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.2" in name)
        optimizer = fuyou.AdamW(model)
        model(**tiny_batches(config, 1, 1)[0][0]).loss.backward()
        optimizer.step()
    for kind in ("bfloat16", "int8"):
        with pytest.raises(StoreError, match="frozen_dtype='nf4'"):
            fuyou.from_config(config, offload=offload(tmp_path / "s", kind), trainable=["model.layers.2"])
    kinds = {s["name"]: s["weight_bytes"] for s in fuyou.inspect_store(tmp_path / "s")["shards"]}
    assert kinds["model.layers.0"] < kinds["model.layers.2"] / 3


def test_a_base_in_4_bits_is_shared(tmp_path: Path) -> None:
    """The losses of a run that holds the same quantised weights itself; a run that asks for others is refused."""
    config = tiny_model_config("llama")
    losses: dict[str, list[float]] = {}
    for name, changes in (("own", {}), ("one", {"base": tmp_path / "base"}), ("two", {"base": tmp_path / "base"})):
        model = adapted(
            fuyou.from_config(config, offload=offload(tmp_path / name, "nf4", **changes), seed=7, trainable=())
        )
        optimizer = fuyou.AdamW(model, **OPTIONS)
        losses[name] = []
        with model.fuyou:
            for micro_batches in tiny_batches(config, 2, 2, seed=3):
                model(**joined(micro_batches)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[name].append(model.fuyou.step_metrics()["loss"])
    assert losses["own"] == losses["one"] == losses["two"]
    with pytest.raises(StoreError, match="frozen_dtype='nf4', this run asks for 'int8'"):
        fuyou.from_config(config, offload=offload(tmp_path / "other", "int8", base=tmp_path / "base"))
