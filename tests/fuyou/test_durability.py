"""durability="checkpoint": planned where it fits, the same bits, an idle drive between commits, and what ends cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from fuyou.hardware import HardwareProfile
from fuyou.plan import Plan
from tests.fuyou.tiny_run import NUM_STEPS, SEED, adamw, assert_same, batches, exported, open_model, train
from tests.tiny_models import tiny_model_config

EVERY = 4
CHECKPOINT: dict[str, Any] = {"durability": "checkpoint", "commit_every_steps": EVERY}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[None, 0.5], ids=["free", "clipped"])
def each_step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Limit of the norm, losses and final weights of a run of which every step is committed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("each-step")
    losses: dict[int, float] = {}
    train(folder / "store", request.param, on_step=losses.__setitem__, durability="step")
    weights = exported(folder / "store", folder / "out")
    torch.set_num_threads(threads)
    return request.param, losses, weights


# --- the run --------------------------------------------------------------------------------------------------------


def test_same_bits_and_no_traffic_between_commits(each_step: Any, tmp_path: Path) -> None:
    max_grad_norm, expected, weights = each_step
    model = open_model(tmp_path / "store", **CHECKPOINT)
    losses: dict[int, float] = {}
    moved, committed = [], []
    with model.fuyou:
        optimizer = adamw(model, max_grad_norm)
        for step, batch in enumerate(batches()):
            before = sum(model.fuyou.bytes_moved)
            loss = model(**batch).loss
            # Here the last step's updates have been made, and written if it is one that is committed.
            for name in model.fuyou.layouts:
                optimizer.wait_written(name)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            moved.append(sum(model.fuyou.bytes_moved) - before)
            losses[step] = model.fuyou.step_metrics()["loss"]
            committed.append(model.fuyou.committed_step)
        stored_bytes = sum(b.weight_bytes + b.state_bytes for b in model.fuyou.plan.blocks)
    assert losses == expected
    # Read when they are first used, the states one step later than the weights; written once every four steps.
    assert [number for number, num_bytes in enumerate(moved) if num_bytes] == [0, 1, 4, 8]
    assert sum(moved[:2]) == moved[4] == moved[8] == stored_bytes
    assert committed[:4] == [0] * 4
    assert committed[5:8] == [4] * 3
    assert committed[9:] == [8]
    found = fuyou.inspect_store(tmp_path / "store")
    assert found["step"] == NUM_STEPS
    assert found["crash"].startswith("costs at most ")
    assert "every step" not in found["crash"]
    assert fuyou.verify_store(tmp_path / "store") == []
    assert_same(exported(tmp_path / "store", tmp_path / "out"), weights)


@pytest.mark.parametrize(
    "killed_after", [1, pytest.param(4, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_crash_costs_the_steps_since_the_last_commit(killed_after: int, each_step: Any, tmp_path: Path) -> None:
    """And what is repeated has the same bits, also when the run goes on with every step committed."""
    max_grad_norm, expected, weights = each_step
    model = open_model(tmp_path / "store", **CHECKPOINT)
    optimizer = adamw(model, max_grad_norm)
    for batch in batches()[:killed_after]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.fuyou.abandon()
    at = fuyou.inspect_store(tmp_path / "store")["step"]
    assert killed_after - at <= EVERY
    assert at == (killed_after - 1) // EVERY * EVERY
    losses = {step: loss for step, loss in expected.items() if step < at}
    options: dict[str, Any] = CHECKPOINT if killed_after % 2 else {"durability": "step"}
    train(tmp_path / "store", max_grad_norm, on_step=losses.__setitem__, **options)
    assert losses == expected
    assert_same(exported(tmp_path / "store", tmp_path / "out"), weights)


def test_a_run_that_ends_with_an_error_between_steps_is_committed(tmp_path: Path) -> None:
    """As one whose data ran out of order; only what was cut short in its middle costs steps."""

    def fail(step: int, _loss: float) -> None:
        if step == 2:
            raise LookupError("no more rows")

    with pytest.raises(LookupError):
        train(tmp_path / "store", 0.5, on_step=fail, **CHECKPOINT)
    assert fuyou.inspect_store(tmp_path / "store")["step"] == 3


def test_what_looks_at_the_weights_commits_them(each_step: Any, tmp_path: Path) -> None:
    """Evaluation, an export, states: all of them see the last step, and the run goes on undisturbed."""
    max_grad_norm, expected, weights = each_step
    model = open_model(tmp_path / "store", **(CHECKPOINT | {"commit_every_steps": 1000}))
    losses, committed = {}, []
    with model.fuyou:
        optimizer = adamw(model, max_grad_norm)
        for step, batch in enumerate(batches()):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[step] = model.fuyou.step_metrics()["loss"]
            if step == 2:
                with torch.no_grad():
                    model(**batch)
            if step == 4:
                model.save_pretrained(tmp_path / "half")
            if step == 6:
                optimizer.state_of("model.norm.weight")
            committed.append(model.fuyou.committed_step)
    assert losses == expected
    assert committed == [0, 0, 3, 3, 5, 5, 7, 7, 7, 7]
    assert_same(exported(tmp_path / "store", tmp_path / "out"), weights)


def test_weights_that_are_lost_are_never_read_from_the_drive(tmp_path: Path) -> None:
    model = open_model(tmp_path / "store", **CHECKPOINT)
    with model.fuyou:
        optimizer = adamw(model, None)
        for batch in batches()[:2]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.fuyou._weights.forget_resident()
        with pytest.raises(RuntimeError, match=r"in host memory alone .* stands at\s+step 0"):
            model(**batches()[2])
        model.fuyou.abandon()
    train(tmp_path / "store", None, until=2, on_step=lambda *_: None, **CHECKPOINT)


# --- the choice -----------------------------------------------------------------------------------------------------

HARDWARE = HardwareProfile(
    device="cpu",
    num_cores=4,
    compute_flops_per_second=1e10,
    adam_parameters_per_second=1e9,
    read_bytes_per_second=2e9,
    write_bytes_per_second=1e9,
    mixed_bytes_per_second=1e9,
    host_memory_bytes=2**33,
)

FAST_DRIVES = dataclasses.replace(
    HARDWARE,
    device="cuda",
    compute_flops_per_second=1e9,
    adam_parameters_per_second=1e6,
    read_bytes_per_second=1e12,
    write_bytes_per_second=1e12,
    mixed_bytes_per_second=2e12,
    link_bytes_per_second=1e12,
)


def made(folder: Path, hardware: HardwareProfile | None = HARDWARE, **offload: Any) -> Plan:
    options: dict[str, Any] = {"device": "cpu", "host_memory": "64MiB"} | offload
    return fuyou.plan_model(
        tiny_model_config("llama"),
        offload=fuyou.OffloadConfig(store=folder, **options),
        batch_size=4,
        sequence_length=16,
        max_grad_norm=1.0,
        hardware=hardware,
    )


def test_planned_where_everything_fits(tmp_path: Path) -> None:
    plan = made(tmp_path)
    assert (plan.durability, plan.commit_every_steps) == ("checkpoint", 20)
    assert "durability     checkpoint, a commit every 20 steps" in plan.describe()
    assert "costs at most 21 steps" in plan.reasons["durability"]
    assert plan.prediction is not None
    stored_bytes = sum(b.weight_bytes + b.state_bytes for b in plan.blocks)
    assert plan.prediction.bytes_read == 0
    assert plan.prediction.bytes_written == pytest.approx(stored_bytes / 20, abs=len(plan.blocks))
    assert made(tmp_path, commit_every_steps=7).commit_every_steps == 7
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("hardware", "host_memory"),
    [
        (None, "64MiB"),  # nothing was measured that says what it would bring
        (HARDWARE, "3MiB"),
        (FAST_DRIVES, "64MiB"),  # the updates, in the forward pass alone, would cost more than writing all the time
    ],
    ids=["not measured", "does not fit", "slower"],
)
def test_every_step_is_committed_otherwise(hardware: HardwareProfile | None, host_memory: str, tmp_path: Path) -> None:
    plan = made(tmp_path, hardware, host_memory=host_memory)
    assert (plan.durability, plan.commit_every_steps) == ("step", 1)
    assert "at most the two steps in flight" in plan.reasons["durability"]


def test_as_asked_for(tmp_path: Path) -> None:
    assert made(tmp_path, durability="step").durability == "step"
    assert made(tmp_path, None, durability="checkpoint").durability == "checkpoint"
    with pytest.raises(fuyou.PlanError, match=r'durability="checkpoint" keeps .* short .*Set host_memory to'):
        made(tmp_path, durability="checkpoint", host_memory="3MiB")
    with pytest.raises(fuyou.ConfigError, match="commit_every_steps=3 conflicts"):
        made(tmp_path, durability="step", commit_every_steps=3)
    with pytest.raises(fuyou.ConfigError, match="commit_every_steps=0: expected"):
        made(tmp_path, commit_every_steps=0)


@pytest.mark.parametrize(
    "change",
    [{"states_in_host": False}, {"weights_in_host": False}, {"update_window": "backward"}, {"gradient": "spill"}],
)
def test_plans_that_could_lose_a_step_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    plan = made(tmp_path)
    with pytest.raises(fuyou.ConfigError, match='durability="checkpoint" needs .* of model.layers.1'):
        dataclasses.replace(
            plan,
            blocks=tuple(dataclasses.replace(b, **change) if b.name == "model.layers.1" else b for b in plan.blocks),
        )


def test_plan_and_config_must_agree(tmp_path: Path) -> None:
    plan = made(tmp_path)
    with pytest.raises(fuyou.ConfigError, match="durability='checkpoint', this run has 'step'"):
        fuyou.from_config(
            tiny_model_config("llama"),
            offload=fuyou.OffloadConfig(store=tmp_path / "s", device="cpu", plan=plan, durability="step"),
            seed=SEED,
        )
    assert not (tmp_path / "s").exists()
    for field, value in (("durability", "sometimes"), ("commit_every_steps", 0)):
        with pytest.raises(fuyou.ConfigError, match='choose "step" or "checkpoint"'):
            dataclasses.replace(plan, **{field: value})
    with pytest.raises(fuyou.ConfigError, match="commits every step"):
        dataclasses.replace(plan, durability="step")
