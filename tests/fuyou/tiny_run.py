"""A tiny run of ten steps, taken up from wherever its store stands: shared by the tests of crashes and resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import fuyou
from tests.tiny_models import tiny_batches, tiny_model_config

NUM_STEPS = 10
SEED = 5


def batches() -> list[dict[str, torch.Tensor]]:
    return [step[0] for step in tiny_batches(tiny_model_config("llama"), NUM_STEPS, 1, batch_size=4, seed=SEED)]


def open_model(store: Path, **offload: Any) -> Any:
    options = {"device": "cpu", "micro_batch_size": 2, "host_memory": "64MiB"} | offload
    return fuyou.from_config(tiny_model_config("llama"), offload=fuyou.OffloadConfig(store=store, **options), seed=SEED)


def adamw(model: Any, max_grad_norm: float | None) -> Any:
    return fuyou.AdamW(model, lr=3e-3, weight_decay=0.1, max_grad_norm=max_grad_norm)


def train(
    store: Path,
    max_grad_norm: float | None,
    *,
    until: int = NUM_STEPS,
    on_step: Callable[[int, float], None],
    **offload: Any,
) -> str:
    """Train from where the store stands; returns how it was opened. Batch and dropout follow from the step's number."""
    model = open_model(store, **offload)
    with model.fuyou:
        optimizer = adamw(model, max_grad_norm)
        todo = batches()
        while optimizer.step_count < until:
            step = optimizer.step_count
            loss = model(**todo[step]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step(step, model.fuyou.step_metrics()["loss"])
    return str(model.fuyou.resumed)


def exported(store: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The store's weights as plain transformers would load them."""
    model = fuyou.open_store_model(store, host_memory="64MiB")
    with model.fuyou:
        model.save_pretrained(folder)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
