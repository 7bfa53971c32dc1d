"""Adapters of unmodified peft on a streamed base: the same bits as peft on the model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fuyou
from tests.reference import ReferenceTrainer
from tests.tiny_models import Batch, tiny_batches, tiny_model_config

# transformers warns of an attribute of its own that peft reads.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
ALL_LINEAR: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def joined(micro_batches: list[Batch]) -> Batch:
    return {key: torch.cat([m[key] for m in micro_batches]) for key in micro_batches[0]}


class Pair:
    """A streamed model and the same in memory, both with the adapters of one config, trained side by side."""

    def __init__(
        self,
        folder: Path,
        name: str = "llama",
        *,
        dtype: str = "bfloat16",
        max_grad_norm: float | None = 0.05,
        host_memory: str = "64MiB",
        peft_options: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.folder, self.lora = folder, {**ALL_LINEAR, **config}
        self.peft_options = peft_options or {}
        self.max_grad_norm = max_grad_norm
        self.model_config = tiny_model_config(name)
        self.offload = fuyou.OffloadConfig(
            store=folder / "store", device="cpu", compute_dtype=dtype, micro_batch_size=2, host_memory=host_memory
        )
        with self.open_base().fuyou as runtime:
            runtime.export(str(folder / "start"))
        plain = AutoModelForCausalLM.from_pretrained(
            folder / "start", dtype=getattr(torch, dtype), attn_implementation=self.model_config._attn_implementation
        )
        self.plain = self.with_adapters(plain)
        self.reference = ReferenceTrainer(
            self.plain, compute_dtype=dtype, max_grad_norm=max_grad_norm, seed=7, **OPTIONS
        )
        self.batches = tiny_batches(self.model_config, 4, 3, seed=3)
        self.open()

    def open_base(self) -> Any:
        return fuyou.from_config(self.model_config, offload=self.offload, seed=7)

    def with_adapters(self, model: Any) -> Any:
        torch.manual_seed(11)
        return peft.get_peft_model(model, peft.LoraConfig(**self.lora), **self.peft_options)

    def open(self) -> None:
        self.model = self.with_adapters(self.open_base())
        self.optimizer = fuyou.AdamW(self.model, max_grad_norm=self.max_grad_norm, **OPTIONS)

    def step(self, micro_batches: list[Batch]) -> tuple[float, float]:
        self.model(**joined(micro_batches)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.model.fuyou.step_metrics()["loss"], self.optimizer.last_step.grad_norm

    def assert_equal(self) -> None:
        """The adapters as peft sees them, at any moment; the masters; what was frozen is not stored twice."""
        own = dict(self.model.named_parameters())
        weights = self.reference.weights()
        assert weights
        for name, weight in weights.items():
            if "base_layer" not in name and "original_module" not in name:
                assert torch.equal(own[name], weight), name
        for name, master in self.reference.masters().items():
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            state = self.optimizer.state_of(name)
            assert torch.equal(state.master.flatten(), master.flatten()), name

    def train(self, num_steps: int = 3) -> None:
        for micro_batches in self.batches[:num_steps]:
            expected = self.reference.step(micro_batches)
            assert self.step(micro_batches) == expected
        self.assert_equal()


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*args: Any, **kwargs: Any) -> Pair:
        made.append(Pair(tmp_path / str(len(made)), *args, **kwargs))
        return made[-1]

    yield make
    for pair in made:
        pair.model.fuyou.abandon()


ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS: dict[str, Any] = {**ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {}),
        ("llama_tied", {}),
        ("qwen2", {"bias": "none", "lora_bias": False}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("mixtral", ATTENTION),
        ("qwen3_moe", ATTENTION),
    ],
)
def test_equals_peft_in_memory(make: Callable[..., Pair], name: str, config: dict[str, Any], dropout: float) -> None:
    """Padding, three micro-batches, clipping that triggers; the frozen base has neither states nor a second slot."""
    pair = make(name, lora_dropout=dropout, **config)
    pair.train()
    store = pair.model.fuyou.store
    for layout in pair.model.fuyou.layouts.values():
        assert layout.state_name not in store.names()
        assert store.num_slots(layout.weight_name) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", EXPERTS),
        ("qwen3_moe", EXPERTS),
        ("llama", {"use_rslora": True}),
        ("llama", {"init_lora_weights": "gaussian"}),
        ("llama", {"init_lora_weights": "orthogonal"}),
        ("llama", {"init_lora_weights": False}),
        ("llama", {"use_dora": True}),
        ("gpt2", {"use_dora": True, "fan_in_fan_out": True, "lora_dropout": 0.1}),
        ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {"modules_to_save": ["input_layernorm"], "lora_dropout": 0.1}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}),
        ("llama", {"layers_to_transform": [1], **ATTENTION}),
        ("llama", {"bias": "lora_only", "lora_bias": True}),
        ("qwen2", {"bias": "all"}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*has no bias.*", "ignore:.*tie_word_embeddings.*")
def test_options_equal_peft_in_memory(make: Callable[..., Pair], name: str, options: dict[str, Any]) -> None:
    make(name, **options).train()
