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
        # Without trainable weights of the base, memory for their gradients is not asked for while peft is still to come.
        return fuyou.from_config(self.model_config, offload=self.offload, seed=7, trainable=())

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
            name = name.removeprefix("base_model.model.")
            if "lora_" not in name:  # adapters of adapted experts are told apart by it
                name = name.replace(".base_layer.", ".")
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


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
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
        pytest.param("llama", {"use_rslora": True}, marks=pytest.mark.slow),
        ("llama", {"init_lora_weights": "gaussian"}),
        pytest.param("llama", {"init_lora_weights": "orthogonal"}, marks=pytest.mark.slow),
        pytest.param("llama", {"init_lora_weights": False}, marks=pytest.mark.slow),
        pytest.param("llama", {"use_dora": True}, marks=pytest.mark.slow),
        ("gpt2", {"use_dora": True, "fan_in_fan_out": True, "lora_dropout": 0.1}),
        ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        pytest.param("llama", {"modules_to_save": ["input_layernorm"], "lora_dropout": 0.1}, marks=pytest.mark.slow),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}),
        pytest.param("llama", {"layers_to_transform": [1], **ATTENTION}, marks=pytest.mark.slow),
        pytest.param("llama", {"bias": "lora_only", "lora_bias": True}, marks=pytest.mark.slow),
        ("qwen2", {"bias": "all"}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*has no bias.*", "ignore:.*tie_word_embeddings.*")
def test_options_equal_peft_in_memory(make: Callable[..., Pair], name: str, options: dict[str, Any]) -> None:
    make(name, **options).train()


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_float32_base_and_adapters_in_bfloat16(make: Callable[..., Pair], max_grad_norm: float | None) -> None:
    make(dtype="float32", lora_dropout=0.1, max_grad_norm=max_grad_norm).train()
    make(peft_options={"autocast_adapter_dtype": False}, max_grad_norm=max_grad_norm).train()


def test_streamed_with_room_for_one_block(make: Callable[..., Pair]) -> None:
    pair = make("llama", lora_dropout=0.1)
    plan = pair.model.fuyou.plan
    pair.model.fuyou.close()
    blocks = tuple(dataclasses.replace(block, weights_in_host=False) for block in plan.blocks)
    least = max(block.weight_bytes for block in blocks)
    pair.offload = dataclasses.replace(
        pair.offload, plan=dataclasses.replace(plan, blocks=blocks, weight_pool_bytes=2 * least)
    )
    pair.open()
    pair.train()
    # Twice through every layer's weights, and once through those behind them; nothing of the adapters is read.
    layers = sum(block.weight_bytes for block in blocks if block.kind == "layer")
    others = sum(block.weight_bytes for block in blocks if block.kind != "layer")
    assert pair.model.fuyou.step_metrics()["bytes_read"] == 2 * layers + others
    planned = sum(b.num_weight_reads() * b.weight_bytes for b in pair.model.fuyou.plan.blocks)
    assert planned == 2 * layers + others


def test_trained_beside_weights_of_the_base(make: Callable[..., Pair]) -> None:
    """bias="all" trains streamed blocks in both update windows beside the adapters; wrong guesses are made again."""
    pair = make("qwen2", bias="all", max_grad_norm=None)
    pair.train(2)
    clipped = make("qwen2", bias="all", max_grad_norm=1e-3)
    clipped.train(4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica", "loftq", "corda", "eva"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.filterwarnings("ignore:.*is not specified. Using default.*", "ignore:.*eva initialization.*")
def test_initialisations_that_read_or_change_the_base_are_refused(tmp_path: Path, init: str, dtype: str) -> None:
    offload = fuyou.OffloadConfig(store=tmp_path, device="cpu", compute_dtype=dtype, host_memory="64MiB")
    model = fuyou.from_config(tiny_model_config("llama"), offload=offload)
    options: dict[str, Any] = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    with model.fuyou, pytest.raises(fuyou.ModelError, match="in memory with peft"):
        if init == "loftq":
            pytest.importorskip("scipy")
        config = peft.LoraConfig(**ALL_LINEAR, init_lora_weights=init, **options)
        fuyou.AdamW(peft.get_peft_model(model, config))


def test_weights_of_the_base_are_never_read_silently(tmp_path: Path) -> None:
    """What peft copies out of placeholders is NaN, and said to be so before anything is computed with it."""
    offload = fuyou.OffloadConfig(store=tmp_path, device="cpu", host_memory="64MiB")
    model = fuyou.from_config(tiny_model_config("llama"), offload=offload)
    config = peft.LoraConfig(**ALL_LINEAR, trainable_token_indices=[3, 5])
    wrapped = peft.get_peft_model(model, config)
    with model.fuyou, pytest.raises(fuyou.ModelError, match="trainable_tokens_delta.* has no value"):
        wrapped(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_base_replaced_in_memory_is_refused(tmp_path: Path) -> None:
    offload = fuyou.OffloadConfig(store=tmp_path, device="cpu", host_memory="64MiB")
    model = fuyou.from_config(tiny_model_config("llama"), offload=offload)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**ALL_LINEAR))
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.data = torch.zeros(weight.shape, dtype=weight.dtype)
    with model.fuyou, pytest.raises(fuyou.ModelError, match="replaced in memory"):
        fuyou.AdamW(wrapped)


def test_adapter_is_saved_in_pefts_format_and_loads_in_plain_peft(make: Callable[..., Pair]) -> None:
    pair = make("llama", modules_to_save=["lm_head"], lora_dropout=0.1)
    pair.train(2)
    pair.model.save_pretrained(pair.folder / "adapter")
    pair.plain.save_pretrained(pair.folder / "expected")
    saved, expected = (load_file(pair.folder / name / "adapter_model.safetensors") for name in ("adapter", "expected"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    start = AutoModelForCausalLM.from_pretrained(pair.folder / "start", dtype=torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(start, pair.folder / "adapter").eval()
    batch = joined(pair.batches[0])
    with torch.no_grad():
        pair.model.eval()
        ours, theirs = pair.model(**batch), loaded(**batch)
        first = pair.model(input_ids=batch["input_ids"][:2], attention_mask=batch["attention_mask"][:2]).logits
    assert torch.equal(first, theirs.logits[:2])
    assert torch.allclose(ours.logits, theirs.logits, atol=0.05)
    with torch.no_grad(), pair.model.disable_adapter(), pair.plain.eval().disable_adapter():
        rows = {key: value[:2] for key, value in batch.items() if key != "labels"}
        assert torch.equal(pair.model(**rows).logits, pair.plain(**rows).logits)


def test_saved_adapter_goes_on_on_a_streamed_base(make: Callable[..., Pair]) -> None:
    """Loaded values are kept, copies and magnitudes included: nothing is filled from the base again."""
    pair = make("llama", modules_to_save=["lm_head"], use_dora=True)
    pair.train(2)
    pair.model.save_pretrained(pair.folder / "adapter")
    offload = dataclasses.replace(pair.offload, store=pair.folder / "other")
    base = fuyou.from_config(pair.model_config, offload=offload, seed=7)
    again = peft.PeftModel.from_pretrained(base, pair.folder / "adapter", is_trainable=True)
    with base.fuyou:
        fuyou.AdamW(again)
        before, after = dict(pair.model.named_parameters()), dict(again.named_parameters())
        names = [name for name, p in after.items() if p.requires_grad]
        assert names == [name for name, p in before.items() if p.requires_grad]
        assert all(torch.equal(before[name], after[name]) for name in names)


def test_resumes_exactly(make: Callable[..., Pair]) -> None:
    """Given up without a flush after two steps, and opened again with adapters that peft makes anew."""
    pair = make("llama", modules_to_save=["lm_head"], use_dora=True, lora_dropout=0.1)
    pair.train(2)
    pair.model.fuyou.flush()
    pair.model.fuyou.abandon()
    pair.open()
    assert pair.optimizer.step_count == 2
    pair.assert_equal()
    for micro_batches in pair.batches[2:]:
        assert pair.step(micro_batches) == pair.reference.step(micro_batches)
    pair.assert_equal()


def test_other_adapters_than_the_runs_are_refused(make: Callable[..., Pair]) -> None:
    pair = make("llama")
    pair.train(1)
    pair.model.fuyou.close()
    for change, named in (({"r": 8}, "default.r"), ({"lora_alpha": 3}, "lora_alpha"), (ATTENTION, "target_modules")):
        base = pair.open_base()
        with base.fuyou, pytest.raises(fuyou.ConfigError, match=named):
            fuyou.AdamW(peft.get_peft_model(base, peft.LoraConfig(**{**pair.lora, **change})))
    base = pair.open_base()
    with base.fuyou, pytest.raises(fuyou.ConfigError, match="trains adapters"):
        fuyou.AdamW(base)


def test_adapters_after_the_optimizer_are_refused(tmp_path: Path) -> None:
    offload = fuyou.OffloadConfig(store=tmp_path, device="cpu", host_memory="64MiB")
    model = fuyou.from_config(tiny_model_config("llama"), offload=offload)
    with model.fuyou:
        fuyou.AdamW(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**ALL_LINEAR))
        with pytest.raises(fuyou.ModelError, match=r"after fuyou\.AdamW"):
            wrapped(**tiny_batches(tiny_model_config("llama"), 1, 1)[0][0])


def test_gradients_cannot_be_looked_for_in_p_grad(make: Callable[..., Pair]) -> None:
    pair = make("llama")
    pair.model(**joined(pair.batches[0])).loss.backward()
    with pytest.raises(fuyou.ModelError, match="max_grad_norm"):
        torch.nn.utils.clip_grad_norm_(pair.model.parameters(), 1.0)
    pair.model.zero_grad()
    pair.optimizer.step()
    assert pair.optimizer.step_count == 0


def test_skipped_step_and_edited_state(make: Callable[..., Pair]) -> None:
    """A step that is refused changes no adapter; a state that is edited is what the next forward computes with."""
    pair = make("llama")
    pair.train(1)
    before = {name: p.detach().clone() for name, p in pair.model.named_parameters() if p.requires_grad}
    pair.model(**joined(pair.batches[1])).loss.backward()
    pair.optimizer.refuse_step("because")
    pair.optimizer.step()
    pair.assert_equal()
    name = next(iter(before))
    short = name.removeprefix("base_model.model.")
    pair.optimizer.set_state(short, master=torch.full_like(before[name], 0.5))
    assert bool((dict(pair.model.named_parameters())[name] == 0.5).all())


def test_accumulated_and_in_outputs_mode(make: Callable[..., Pair]) -> None:
    """A loss computed outside of the model, two backward passes in a step, equal plain peft's sum of gradients."""
    pair = make("llama", dtype="float32", max_grad_norm=None)
    for model in (pair.model, pair.plain):
        model.eval()  # their random numbers would differ
    for micro_batch in pair.batches[0][:2]:
        for model in (pair.model, pair.plain):
            inputs = {key: value for key, value in micro_batch.items() if key != "labels"}
            (model(**inputs, use_cache=False).logits ** 2).mean().backward()
    sums = {name: p.grad for name, p in pair.plain.named_parameters() if p.requires_grad}
    total = float(torch.sqrt(sum(g.double().pow(2).sum() for g in sums.values() if g is not None)))
    pair.optimizer.step()
    assert pair.optimizer.last_step.grad_norm == pytest.approx(total, rel=1e-6)
