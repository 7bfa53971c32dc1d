"""The central promise: the same bits as plain torch in memory, whatever the plan.

The reference (tests/reference.py) imports nothing of ours. Every model starts from the weights that our store was
filled with, exported and loaded by plain transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fuyou
from tests.reference import ReferenceTrainer
from tests.tiny_models import tiny_batches, tiny_model_config

ARCHITECTURES = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
)
NUM_STEPS, NUM_MICRO_BATCHES = 5, 3
ROOMY, TIGHT = "256MiB", "3MiB"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def joined(micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The micro-batches as one batch, as a user passes it."""
    return {key: torch.cat([m[key] for m in micro_batches]) for key in micro_batches[0]}


class Run:
    """A streamed model in training, and the plain model that it must equal."""

    def __init__(self, name: str, dtype: str, folder: Path, *, max_grad_norm: float | None, **offload: Any) -> None:
        config = tiny_model_config(name)
        self.model = fuyou.from_config(
            config,
            offload=fuyou.OffloadConfig(
                store=folder / "store", device="cpu", compute_dtype=dtype, micro_batch_size=2, **offload
            ),
            seed=7,
        )
        self.model.save_pretrained(folder / "start")
        plain = AutoModelForCausalLM.from_pretrained(
            folder / "start", dtype=getattr(torch, dtype), attn_implementation=config._attn_implementation
        )
        plain.train()
        options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        self.reference = ReferenceTrainer(plain, compute_dtype=dtype, max_grad_norm=max_grad_norm, seed=7, **options)
        self.optimizer = fuyou.AdamW(self.model, max_grad_norm=max_grad_norm, **options)
        self.batches = tiny_batches(config, NUM_STEPS, NUM_MICRO_BATCHES, seed=3)

    def step(self, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
        loss = self.model(**joined(micro_batches)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.model.fuyou.step_metrics()["loss"], self.optimizer.last_step.grad_norm

    def check(self, folder: Path) -> None:
        """Train both, and compare losses, norms, weights, masters and moments bit for bit."""
        with self.model.fuyou:
            for micro_batches in self.batches:
                expected = self.reference.step(micro_batches)
                assert self.step(micro_batches) == expected
            masters, moments = self.reference.masters(), self.reference.moments()
            for name in masters:
                state = self.optimizer.state_of(name)
                assert torch.equal(state.master.flatten(), masters[name].flatten()), name
                assert torch.equal(state.exp_avg.flatten(), moments[name][0].flatten()), name
                assert torch.equal(state.exp_avg_sq.flatten(), moments[name][1].flatten()), name
            assert self.model.fuyou.committed_step == NUM_STEPS
            self.model.save_pretrained(folder / "end")
        exported = AutoModelForCausalLM.from_pretrained(folder / "end", dtype="auto")
        weights = self.reference.weights()
        for name, parameter in exported.named_parameters():
            assert torch.equal(parameter, weights[name].view_as(parameter)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_plain_torch(name: str, dtype: str, tmp_path: Path) -> None:
    """Dropout on where the architecture has it, padding, three micro-batches, clipping that triggers."""
    Run(name, dtype, tmp_path, max_grad_norm=0.5, host_memory=ROOMY).check(tmp_path)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("host_memory", [ROOMY, TIGHT])
@pytest.mark.parametrize("name", ["llama_tied", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_plan_changes_no_bit(name: str, host_memory: str, max_grad_norm: float | None, tmp_path: Path) -> None:
    """Everything kept in memory or everything streamed; updates in either window."""
    Run(name, "bfloat16", tmp_path, max_grad_norm=max_grad_norm, host_memory=host_memory).check(tmp_path)


def test_hand_edited_plan_with_spilled_gradients_and_activations(tmp_path: Path) -> None:
    """A plan is data: one that keeps nothing, spills every gradient and nearly every activation gives the same bits."""
    run = Run("llama", "bfloat16", tmp_path, max_grad_norm=0.5, host_memory=ROOMY)
    plan = run.model.fuyou.plan
    run.model.fuyou.close()
    blocks = tuple(
        dataclasses.replace(
            b,
            weights_in_host=False,
            states_in_host=False,
            gradient="spill",
            update_window="forward" if number % 2 else "backward",
        )
        for number, b in enumerate(plan.blocks)
    )
    plan = dataclasses.replace(
        plan, blocks=blocks, max_clipped_share=1.0, prefetch_depth=1, activation_pool_bytes=6 * 8192
    )
    (tmp_path / "edited").mkdir()
    edited = Run("llama", "bfloat16", tmp_path / "edited", max_grad_norm=0.5, plan=plan.to_json())
    edited.check(tmp_path / "edited")
    assert edited.model.fuyou.step_metrics()["bytes_spilled"] > 0
