"""A plan is data: it survives JSON, it can be edited, and one that cannot work is refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from fuyou.plan import Plan
from tests.tiny_models import tiny_model_config


def made(folder: Path, name: str = "llama", *, max_grad_norm: float | None = 1.0, **offload: Any) -> Plan:
    options = {"device": "cpu", "host_memory": "256MiB"} | offload
    return fuyou.plan_model(
        tiny_model_config(name),
        offload=fuyou.OffloadConfig(store=folder / "store", **options),
        batch_size=2,
        sequence_length=8,
        max_grad_norm=max_grad_norm,
    )


def opened(folder: Path, plan: Any, name: str = "llama", **offload: Any) -> Any:
    return fuyou.from_config(
        tiny_model_config(name), offload=fuyou.OffloadConfig(store=folder / "store", device="cpu", plan=plan, **offload)
    )


def step(model: Any, optimizer: Any) -> None:
    ids = torch.randint(0, 128, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_json_round_trip(tmp_path: Path) -> None:
    plan = made(tmp_path)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    predicted = dataclasses.replace(
        plan, prediction=fuyou.plan.Prediction(1.0, {"gpu": 1.0}, "gpu", bytes_read=3, bytes_written=4)
    )
    assert Plan.from_json(json.loads(json.dumps(predicted.to_json()))) == predicted


def test_planning_makes_nothing(tmp_path: Path) -> None:
    made(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_description_says_what_was_decided_and_why(tmp_path: Path) -> None:
    text = made(tmp_path).describe()
    for part in (
        "5 blocks",
        "bfloat16 on cpu",
        "256 MiB",
        "begin in the backward pass",
        "durability     step",
        "because",
    ):
        assert part in text
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_pool_bytes": 2**40}, "more than host_memory_bytes"),
        ({"weight_pool_bytes": -1}, "at least 0"),
        ({"num_io_threads": 0}, "at least 1"),
        ({"max_clipped_share": 2.0}, "max_clipped_share"),
        ({"colour": "red"}, "not a plan of this version"),
        ({"blocks": [{"name": "x"}]}, "not a plan of this version"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(fuyou.ConfigError, match=message):
        Plan.from_json(made(tmp_path).to_json() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update_window": "both"}, 'update_window.*choose "backward" or "forward"'),
        ({"gradient": "gone"}, 'gradient.*choose "host", "spill" or "free"'),
        ({"gradient": "free", "update_window": "forward"}, "needed in the forward window"),
    ],
)
def test_nonsense_in_a_block_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = made(tmp_path).to_json()
    data["blocks"] = [data["blocks"][0] | change, *data["blocks"][1:]]
    with pytest.raises(fuyou.ConfigError, match=message):
        Plan.from_json(data)


def test_a_missing_field_is_refused(tmp_path: Path) -> None:
    data = made(tmp_path).to_json()
    del data["prefetch_depth"]
    with pytest.raises(fuyou.ConfigError, match="not a plan of this version"):
        Plan.from_json(data)


@pytest.mark.parametrize("as_json", [False, True])
def test_an_edited_plan_is_followed(as_json: bool, tmp_path: Path) -> None:
    """The planner would choose early updates and keep everything."""
    plan = made(tmp_path)
    changes: dict[str, Any] = {"weights_in_host": False, "states_in_host": False, "update_window": "forward"}
    blocks = tuple(dataclasses.replace(b, **changes) for b in plan.blocks)
    plan = dataclasses.replace(plan, blocks=blocks, prefetch_depth=0, num_io_threads=1)
    model = opened(tmp_path, plan.to_json() if as_json else plan)
    with model.fuyou:
        optimizer = fuyou.AdamW(model)
        assert model.fuyou.plan == plan
        for _ in range(3):
            step(model, optimizer)
        assert model.fuyou.step_metrics()["update_window"] == "forward"
        sizes = sum(b.weight_bytes for b in plan.blocks)
        assert model.fuyou.step_metrics()["bytes_read"] >= sizes  # nothing was kept


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "llama_tied"}, "blocks|parameters"),
        ({"name": "gpt2"}, "blocks"),
        ({"compute_dtype": "float32"}, "make a plan for this model and compute_dtype"),
        ({"moment_dtype": "bfloat16"}, "make a plan for this moment_dtype"),
    ],
)
def test_a_plan_of_another_model_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan = made(tmp_path, **other)
    with pytest.raises(fuyou.ConfigError, match=message):
        opened(tmp_path, plan)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("field", ["weight_pool_bytes", "gradient_pool_bytes", "record_pool_bytes"])
def test_pools_too_small_for_what_is_kept_are_refused(field: str, tmp_path: Path) -> None:
    """Such a run would wait for itself."""
    plan = dataclasses.replace(made(tmp_path), **{field: 65536})
    with pytest.raises(fuyou.PlanError, match=field):
        opened(tmp_path, plan)
    assert not (tmp_path / "store").exists()


def test_clipping_of_gradients_that_are_given_back_is_refused(tmp_path: Path) -> None:
    model = opened(tmp_path, made(tmp_path, max_grad_norm=None))
    with model.fuyou:
        with pytest.raises(fuyou.ConfigError, match="cannot be clipped"):
            fuyou.AdamW(model, max_grad_norm=1.0)
        step(model, fuyou.AdamW(model))


def test_activations_that_fit_nowhere_are_refused_with_their_size(tmp_path: Path) -> None:
    plan = dataclasses.replace(made(tmp_path), activation_pool_bytes=4096)
    model = opened(tmp_path, plan)
    with model.fuyou:
        optimizer = fuyou.AdamW(model, max_grad_norm=1.0)
        ids = torch.randint(0, 128, (4, 60))
        with pytest.raises(fuyou.PlanError, match="smaller micro_batch_size"):
            model(input_ids=ids, labels=ids)
        ids = ids[:1, :8]  # a smaller batch still goes through
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert model.fuyou.committed_step == 1


def test_micro_batches_of_unequal_size_with_little_room(tmp_path: Path) -> None:
    """Small tensors that are kept must make room for a large one that comes later."""
    config = tiny_model_config("llama")
    losses = []
    for budget in (2**24, 5 * 16384):
        folder = tmp_path / str(budget)
        folder.mkdir()
        plan = dataclasses.replace(made(folder), activation_pool_bytes=budget)
        model = fuyou.from_config(
            config,
            offload=fuyou.OffloadConfig(store=folder / "store", device="cpu", plan=plan, micro_batch_size=3),
            seed=1,
        )
        with model.fuyou:
            optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=1.0)
            generator = torch.Generator().manual_seed(0)
            for rows in (4, 3, 7, 5):
                ids = torch.randint(3, 128, (rows, 40), generator=generator)
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(model.fuyou.step_metrics()["loss"])
    assert losses[:4] == losses[4:]
