"""The reference trainer against plain torch loops, and the tiny models against what they claim to be."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests import reference
from tests.reference import (
    ReferenceTrainer,
    micro_batch_seed,
    round_half_up_to_bfloat16,
    sum_of_squares,
    target_weights,
)
from tests.tiny_models import (
    SLIDING_WINDOW,
    TINY_MODEL_NAMES,
    tiny_batches,
    tiny_model,
    tiny_model_config,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # These matrices are too small to share: a second thread costs more than it does.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def without_dropout(model: Any) -> Any:
    module: Any
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def plain_backward(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> None:
    """Gradients accumulated by autograd itself, with the weights and seeds of step 0."""
    for index, (batch, weight) in enumerate(zip(batches, target_weights(batches), strict=True)):
        torch.manual_seed(micro_batch_seed(0, 0, index))
        (model(**batch, use_cache=False).loss * weight).backward()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_it_imports_nothing_of_this_project() -> None:
    assert reference.__file__ is not None
    imported: set[str] = set()
    for node in ast.walk(ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported.isdisjoint({"fuyou", "optim", "io_engine"})


def test_micro_batch_seeds() -> None:
    expected = int.from_bytes(hashlib.sha256(b"fuyou:7:3:1").digest()[:8], "little") % 2**63
    assert micro_batch_seed(7, 3, 1) == expected
    seeds = {micro_batch_seed(s, t, i) for s in range(4) for t in range(4) for i in range(4)}
    assert len(seeds) == 64


def test_sum_of_squares_is_close_to_numpy() -> None:
    gradient = np.random.default_rng(0).standard_normal(150_001).astype(np.float32)
    assert sum_of_squares(gradient) == pytest.approx(float((gradient.astype(np.float64) ** 2).sum()), rel=1e-13)


def test_bfloat16_rounding_is_to_nearest_with_ties_away_from_zero() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    ties = (values.view(torch.int32) & 0xFFFF) == 0x8000
    torch.testing.assert_close(round_half_up_to_bfloat16(values)[~ties], values.bfloat16()[~ties], rtol=0, atol=0)
    tie = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32).view(torch.float32)
    expected = torch.tensor([1.0078125, 1.015625, -1.0078125], dtype=torch.bfloat16)
    torch.testing.assert_close(round_half_up_to_bfloat16(tie), expected, rtol=0, atol=0)


def test_one_micro_batch_in_float32_is_a_plain_torch_loop() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    trainer = ReferenceTrainer(model, compute_dtype="float32", seed=5, **options)
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True, **options)
    # No parameter of this model needs padding, so torch updates the very same vectors.
    assert all(p.numel() % 64 == 0 for p in plain.parameters())

    for step, [batch] in enumerate(tiny_batches(plain.config, 5, 1)):
        loss, norm = trainer.step([batch])
        torch.manual_seed(micro_batch_seed(5, step, 0))
        plain_loss = plain(**batch, use_cache=False).loss
        plain_loss.backward()
        plain_norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        assert loss == float(plain_loss.detach())
        assert norm == pytest.approx(float(plain_norm), rel=1e-5)
    assert trainer.step_count == 5
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trainer.weights()[name], parameter.detach(), rtol=0, atol=0)
        torch.testing.assert_close(trainer.masters()[name], parameter.detach(), rtol=0, atol=0)
        state = optimizer.state[parameter]
        for ours, theirs in zip(trainer.moments()[name], (state["exp_avg"], state["exp_avg_sq"]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_clipping_is_close_to_clip_grad_norm() -> None:
    model, plain = tiny_model("qwen3"), tiny_model("qwen3")
    trainer = ReferenceTrainer(model, compute_dtype="float32", lr=1e-3, max_grad_norm=0.1)
    [batches] = tiny_batches(plain.config, 1, 3)
    _, norm = trainer.step(batches)
    assert norm > 0.1

    plain_backward(plain, batches)
    plain_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert norm == pytest.approx(float(plain_norm), rel=1e-5)
    for name, parameter in plain.named_parameters():
        # The first step's first moment is (1 - beta1) times the clipped gradient.
        assert parameter.grad is not None
        assert relative_error(trainer.moments()[name][0], parameter.grad * 0.1) < 1e-4


def test_a_limit_above_the_norm_changes_nothing() -> None:
    [batches] = tiny_batches(tiny_model_config("llama"), 1, 2)
    results = []
    for limit in (None, 1e6):
        trainer = ReferenceTrainer(tiny_model("llama"), compute_dtype="float32", max_grad_norm=limit)
        trainer.step(batches)
        results.append(trainer.weights())
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt", "gemma2"])
def test_a_tied_weight_gets_the_sum_of_both_gradients(name: str) -> None:
    model: Any = tiny_model(name)
    plain: Any = tiny_model(name)
    trainer = ReferenceTrainer(model, compute_dtype="float32", lr=1e-3)
    [batches] = tiny_batches(plain.config, 1, 3)
    trainer.step(batches)
    plain_backward(plain, batches)

    tied = plain.get_input_embeddings().weight
    tied_name = next(name for name, parameter in plain.named_parameters() if parameter is tied)
    assert relative_error(trainer.moments()[tied_name][0], tied.grad * 0.1) < 1e-5
    # The tie is as before, and the head sees the update.
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(model.get_output_embeddings().weight, tied)


def test_head_gradients_come_before_embedding_gradients() -> None:
    model = without_dropout(tiny_model("llama_tied"))
    [batches] = tiny_batches(model.config, 1, 3)
    embedding_gradients, head_gradients = [], []
    for batch, weight in zip(batches, target_weights(batches), strict=True):
        plain = without_dropout(tiny_model("llama_tied"))
        embedding = plain.get_input_embeddings().weight
        head = torch.nn.Parameter(embedding.detach().clone())
        plain.lm_head.weight = head
        loss = plain(**batch, use_cache=False).loss
        loss.backward(torch.tensor(weight, dtype=loss.dtype))
        embedding_gradients.append(embedding.grad)
        head_gradients.append(head.grad)
    head_first, embedding_first = torch.zeros_like(head), torch.zeros_like(head)
    for gradient in head_gradients + embedding_gradients:
        head_first = head_first + gradient
    for gradient in embedding_gradients + head_gradients:
        embedding_first = embedding_first + gradient
    assert not torch.equal(head_first, embedding_first)

    trainer = ReferenceTrainer(model, compute_dtype="float32")
    _, norm = trainer.step(batches)
    # The first step's first moment is 0 + 0.1 * (gradient - 0), in float32.
    expected = head_first * torch.tensor(1.0 - 0.9, dtype=torch.float32)
    torch.testing.assert_close(trainer.moments()["model.embed_tokens.weight"][0], expected, rtol=0, atol=0)
    assert norm > 0.0


def test_bfloat16_weights_are_the_rounded_masters() -> None:
    trainer = ReferenceTrainer(tiny_model("qwen2", torch.bfloat16), lr=1e-3, max_grad_norm=1.0)
    initial = trainer.weights()
    for batches in tiny_batches(trainer.model.config, 2, 2):
        trainer.step(batches)
    masters, weights = trainer.masters(), trainer.weights()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=0)
        torch.testing.assert_close(weights[name], round_half_up_to_bfloat16(masters[name]), rtol=0, atol=0)
        assert not torch.equal(weights[name], initial[name])


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = tiny_model("llama")
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    trainer = ReferenceTrainer(model, compute_dtype="float32", weight_decay=0.5)
    [batches] = tiny_batches(model.config, 1, 1)
    trainer.step(batches)
    assert trainer.weights()["unused"].tolist() == [1.0, 1.0, 1.0]
    assert trainer.moments()["unused"][1].tolist() == [0.0, 0.0, 0.0]


def test_frozen_parameters_are_not_trained() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().requires_grad_(False)
    trainer = ReferenceTrainer(model, compute_dtype="float32")
    assert "model.embed_tokens.weight" not in trainer.weights()


def test_weight_decay_by_name_and_a_new_learning_rate() -> None:
    [[batch], [second]] = tiny_batches(tiny_model_config("llama"), 2, 1)
    options: dict[str, Any] = {"compute_dtype": "float32", "lr": 1e-2}
    by_name = ReferenceTrainer(tiny_model("llama"), weight_decay=lambda n: 0.0 if "norm" in n else 0.5, **options)
    none = ReferenceTrainer(tiny_model("llama"), **options)
    for trainer in (by_name, none):
        trainer.step([batch])
    for name, weight in by_name.weights().items():
        assert torch.equal(weight, none.weights()[name]) == ("norm" in name)

    before = none.weights()
    none.lr = 0.0
    none.step([second])
    for name, weight in none.weights().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_a_non_finite_norm_changes_nothing() -> None:
    trainer = ReferenceTrainer(tiny_model("llama"), compute_dtype="float32")
    [batches] = tiny_batches(trainer.model.config, 1, 1)
    before = trainer.weights()
    with pytest.raises(FloatingPointError, match="step 0 is nan"):
        trainer.step(batches, weights=[float("nan")])
    for name, weight in trainer.weights().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_weights_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="convert the model to bfloat16 first"):
        ReferenceTrainer(tiny_model("llama"), compute_dtype="bfloat16")


def test_the_same_batch_again_and_again_is_learned() -> None:
    trainer = ReferenceTrainer(tiny_model("llama", torch.bfloat16), lr=3e-3, max_grad_norm=1.0)
    [batches] = tiny_batches(trainer.model.config, 1, 3)
    losses = [trainer.step(batches)[0] for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY_MODEL_NAMES)
def test_every_tiny_model_trains_the_same_twice(name: str, dtype: torch.dtype) -> None:
    results = []
    for _ in range(2):
        model = tiny_model(name, dtype)
        trainer = ReferenceTrainer(
            model,
            compute_dtype=str(dtype).removeprefix("torch."),
            lr=1e-3,
            weight_decay=0.01,
            max_grad_norm=0.5,
        )
        steps = [trainer.step(batches) for batches in tiny_batches(model.config, 2, 3)]
        results.append((steps, trainer.weights()))
    assert results[0][0] == results[1][0]
    for weight_name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][weight_name], rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY_MODEL_NAMES)
def test_tiny_models_have_what_makes_them_worth_testing(name: str) -> None:
    model = tiny_model(name)
    config = model.config
    [[batch]] = tiny_batches(config, 1, 1)
    assert config.num_hidden_layers >= 3
    assert config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(float(model(**batch, use_cache=False).loss.detach()))
    assert losses[0] != losses[1], "no dropout"
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        assert model(**batch, use_cache=False).aux_loss is not None
    if getattr(config, "sliding_window", None):
        assert config.sliding_window == SLIDING_WINDOW < batch["input_ids"].shape[1]


def test_tiny_batches_have_unequal_rows() -> None:
    steps = tiny_batches(tiny_model_config("llama"), 2, 3, seed=1)
    assert [len(step) for step in steps] == [3, 3]
    lengths = [batch["attention_mask"].sum(1).tolist() for step in steps for batch in step]
    assert len({length for row in lengths for length in row}) > 3
    for step in steps:
        for batch in step:
            assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)
            assert batch["input_ids"].shape == (2, 24)
    [[unpadded]] = tiny_batches(tiny_model_config("llama"), 1, 1, padding=False)
    assert bool((unpadded["attention_mask"] == 1).all())
    assert bool((unpadded["labels"] == unpadded["input_ids"]).all())
