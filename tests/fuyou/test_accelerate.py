"""Loops that users write: plain torch, and accelerate with accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

import fuyou
from tests.tiny_models import Batch, tiny_batches, tiny_model_config

NUM_STEPS, ACCUMULATION = 3, 4
OPTIONS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}


def _reset() -> None:
    """What accelerate keeps for the whole process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _reset()
    yield
    _reset()
    torch.set_num_threads(threads)


def streamed(folder: Path, name: str = "llama", **options: Any) -> Any:
    config = tiny_model_config(name)
    config.attention_dropout = 0.0
    offload = fuyou.OffloadConfig(
        store=folder / "store", device="cpu", compute_dtype="float32", host_memory="96MiB", **options
    )
    return fuyou.from_config(config, offload=offload, seed=7)


def micro_batches(config: Any) -> list[list[Batch]]:
    """Without padding: accelerate divides by the number of micro-batches, not by tokens."""
    return tiny_batches(config, NUM_STEPS, ACCUMULATION, seed=5, padding=False)


def masters(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    return {name: optimizer.state_of(name).master for name, _ in model.named_parameters()}


def plain_loop(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The whole batch in one call, split by micro_batch_size."""
    model = streamed(folder, micro_batch_size=2)
    optimizer = fuyou.AdamW(model, **OPTIONS)
    norms = []
    with model.fuyou:
        for batch in micro_batches(model.config):
            whole = {key: torch.cat([m[key] for m in batch]) for key in batch[0]}
            loss = model(**whole).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.last_step is not None
            norms.append(optimizer.last_step.grad_norm)
        return norms, masters(model, optimizer)


def test_accumulate_equals_one_call(tmp_path: Path) -> None:
    """Four micro-batches of accelerator.accumulate run vertically when the last one comes: the same bits."""
    expected_norms, expected = plain_loop(tmp_path / "plain")
    model = streamed(tmp_path / "accelerate")
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
    prepared, optimizer = accelerator.prepare(model, fuyou.AdamW(model, **OPTIONS))
    assert type(model) is type(prepared)
    norms = []
    with model.fuyou:
        for batch in micro_batches(model.config):
            for micro_batch in batch:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(**micro_batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            norms.append(model.fuyou.optimizer.last_step.grad_norm)
        assert model.fuyou.optimizer.step_count == NUM_STEPS
        assert norms == expected_norms
        found = masters(model, model.fuyou.optimizer)
    for name, master in expected.items():
        assert torch.equal(found[name], master), name


def test_accelerators_clipping_is_refused(tmp_path: Path) -> None:
    """It would find no gradient, and clip nothing."""
    model = streamed(tmp_path)
    accelerator = Accelerator(cpu=True)
    prepared, _optimizer = accelerator.prepare(model, fuyou.AdamW(model))
    with pytest.raises(fuyou.ModelError, match="max_grad_norm"):
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
    model.fuyou.abandon()


def test_losses_scaled_differently_are_refused(tmp_path: Path) -> None:
    """Micro-batches that wait for the last one run with one scale."""
    model = streamed(tmp_path)
    optimizer = fuyou.AdamW(model, **OPTIONS)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    batch = micro_batches(model.config)[0]
    with accelerator.accumulate(model):
        (model(**batch[0]).loss * 3).backward()
    with accelerator.accumulate(model), pytest.raises(fuyou.ModelError, match="scaled"):
        model(**batch[1]).loss.backward()
    optimizer.zero_grad()
    model.fuyou.abandon()


def test_a_step_that_never_got_its_last_micro_batch(tmp_path: Path) -> None:
    """Stepping says so; zero_grad() forgets them, so that they end in no later step."""
    model = streamed(tmp_path, "llama")
    optimizer = fuyou.AdamW(model, **OPTIONS)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    first, second = micro_batches(model.config)[0][:2]
    with accelerator.accumulate(model):
        model(**first).loss.backward()
    with pytest.raises(RuntimeError, match="1 micro-batches wait"):
        optimizer.step()
    optimizer.zero_grad()
    GradientState()._set_sync_gradients(True)
    with torch.no_grad():
        expected = model(**second).loss
    model(**second).loss.backward()
    optimizer.step()
    assert model.fuyou.step_metrics()["loss"] == pytest.approx(expected.item())
    model.fuyou.close()


def test_plain_loop_with_a_schedule_and_groups_equals_torch(tmp_path: Path) -> None:
    """torch.optim.AdamW, clip_grad_norm_ and a scheduler over the plain model, within rounding."""
    model = streamed(tmp_path, name="llama_tied", micro_batch_size=2)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32).train()

    def groups(of: Any) -> list[dict[str, Any]]:
        norms = [p for name, p in of.named_parameters() if "norm" in name]
        others = [p for name, p in of.named_parameters() if "norm" not in name]
        return [{"params": others, "weight_decay": 0.1, "lr": 1e-3}, {"params": norms, "weight_decay": 0.0}]

    expected = torch.optim.AdamW(groups(plain), lr=3e-3)
    optimizer = fuyou.AdamW(model, lr=3e-3, max_grad_norm=0.5, param_groups=groups(model))
    schedules = [get_linear_schedule_with_warmup(made, 1, 10) for made in (expected, optimizer)]
    with model.fuyou:
        for step, batch in enumerate(tiny_batches(model.config, 5, 1, batch_size=4, padding=False)):
            plain_loss = plain(**batch[0]).loss
            plain_loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            loss = model(**batch[0]).loss
            loss.backward()
            for made in (expected, optimizer):
                made.step()
                made.zero_grad()
            for schedule in schedules:
                schedule.step()
            assert float(loss.detach()) == pytest.approx(float(plain_loss.detach()), rel=1e-5), step
            assert optimizer.last_step is not None
            assert optimizer.last_step.grad_norm == pytest.approx(float(norm), rel=1e-4), step
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(optimizer.state_of(name).master, parameter.detach(), rtol=1e-3, atol=1e-5)
