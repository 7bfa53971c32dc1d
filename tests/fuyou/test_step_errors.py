"""What goes wrong around a step, and that the next one is as if it had not: losses that are no numbers, errors, old losses."""

from __future__ import annotations

import dataclasses
import errno
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fuyou
import fuyou.runtime
from fuyou.plan_search import pooled_bytes
from tests.fuyou.test_step import Broken, Pair, _make, _one_thread, failing, joined

__all__ = ["_make", "_one_thread"]  # fixtures
NO_DROPOUT = {"attention_dropout": 0.0}


@pytest.fixture
def all_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in memory, and every update is late."""
    real = fuyou.runtime.plan_for

    def plan_for(*args: Any, **kwargs: Any) -> fuyou.Plan:
        plan = real(*args, **kwargs)
        changes: dict[str, Any] = {
            "weights_in_host": False,
            "states_in_host": False,
            "update_window": "forward",
            "gradient": "host",
        }
        gradients = plan.gradient_pool_bytes + sum(pooled_bytes(b.gradient_bytes) for b in plan.blocks)
        blocks = tuple(dataclasses.replace(b, **changes) for b in plan.blocks)
        return dataclasses.replace(plan, blocks=blocks, gradient_pool_bytes=gradients, host_memory_bytes=2**30)

    monkeypatch.setattr(fuyou.runtime, "plan_for", plan_for)


def spoil_losses(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes give NaN until `monkeypatch.undo()`."""
    real = pair.model.fuyou._executor.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        record = real(*args, **kwargs)
        record.losses = [loss * math.nan for loss in record.losses]
        return record

    monkeypatch.setattr(pair.model.fuyou._executor, "forward", forward)


def test_a_loss_that_is_no_number_skips_its_step(make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make(changes=NO_DROPOUT)
    spoil_losses(pair, monkeypatch)
    pair.model(**joined(pair.batch())).loss.backward()
    pair.optimizer.step()
    assert pair.optimizer.last_step.skipped == "the loss is nan"


@pytest.mark.parametrize("thrown_away", ["after forward", "after backward"])
def test_a_loss_that_was_thrown_away_skips_nothing(
    thrown_away: str, make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`if not isfinite(loss): continue`, or zero_grad() after its backward pass."""
    pair = make(changes=NO_DROPOUT)
    batch = joined(pair.batch())
    spoil_losses(pair, monkeypatch)
    loss = pair.model(**batch).loss
    assert not torch.isfinite(loss)
    if thrown_away == "after backward":
        loss.backward()
        pair.optimizer.zero_grad()
    monkeypatch.undo()
    loss = pair.model(**batch).loss
    loss.backward()
    pair.optimizer.step()
    assert pair.optimizer.last_step.skipped is None
    assert pair.model.fuyou.step_metrics()["loss"] == pytest.approx(loss.item())
    assert pair.model.fuyou.step_metrics()["num_tokens"] == int(batch["attention_mask"].sum())


@pytest.mark.parametrize("host_memory", ["3MiB", "96MiB"])
def test_an_old_loss_leaves_the_next_step_as_it_is(host_memory: str, make: Callable[..., Pair]) -> None:
    """backward() of a loss whose activations are gone raises, and changes nothing: early updates go on."""
    pair = make(max_grad_norm=None, host_memory=host_memory)
    batch = joined(pair.batch())
    old = pair.model(**batch).loss
    pair.model(**batch)
    with pytest.raises(fuyou.ModelError, match="earlier forward pass"):
        old.backward()
    pair.step(batch)
    assert pair.optimizer.last_step.window == "backward"


@pytest.mark.parametrize("then", ["flush", "close", "evaluate"])
@pytest.mark.parametrize("where", ["a second forward pass", "an evaluation"])
def test_an_error_between_backward_and_step(where: str, then: str, make: Callable[..., Pair], all_late: None) -> None:
    """What was read ahead goes: the step's late updates begin where they are read."""
    pair = make(changes=NO_DROPOUT)
    batch = joined(pair.batch())
    pair.model(**batch).loss.backward()
    with (
        failing(pair.model.model.layers[1].mlp, 1),
        pytest.raises(Broken),
        torch.set_grad_enabled(where != "an evaluation"),
    ):
        pair.model(**batch)
    pair.optimizer.step()
    if then == "evaluate":
        with torch.no_grad():
            pair.model(**batch)
    else:
        getattr(pair.model.fuyou, then)()
    assert pair.model.fuyou.committed_step == 1


@pytest.mark.parametrize("host_memory", ["3MiB", "96MiB"])
def test_weights_that_cannot_be_read_for_their_update(host_memory: str, make: Callable[..., Pair]) -> None:
    """No gradient's memory is lost, and the next step is made."""
    pair = make(changes=NO_DROPOUT, max_grad_norm=None, host_memory=host_memory)
    batch = joined(pair.batch())
    weights = pair.model.fuyou._weights
    loss = pair.model(**batch).loss
    real = weights.acquire

    def acquire(name: str) -> Any:
        if name == "epilogue":
            raise OSError(errno.EIO, "broken")
        return real(name)

    weights.acquire = acquire
    with pytest.raises(OSError, match="broken"):
        loss.backward()
    del weights.acquire
    pair.optimizer.zero_grad()
    assert {pool.name: pool.used_bytes for pool in pair.model.fuyou._pools}["gradients"] == 0
    pair.step(batch)
    assert pair.optimizer.step_count == 1


def test_late_updates_of_blocks_read_ahead_are_not_waited_for(
    make: Callable[..., Pair], all_late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute begins when the new weights are in memory, not when they are on the drive."""
    pair = make(changes=NO_DROPOUT)
    batch = joined(pair.batch())
    pair.step(batch)
    runtime, optimizer = pair.model.fuyou, pair.optimizer
    waited: list[str] = []
    wait = optimizer.wait_written

    def wait_written(shard: str) -> None:
        loaded, job = runtime._weights._loaded.get(shard), optimizer._jobs.get(shard)
        if loaded is not None and job is not None and loaded.job is job:
            waited.append(shard)
        wait(shard)

    monkeypatch.setattr(optimizer, "wait_written", wait_written)
    pair.model(**batch)
    assert not waited


def test_a_loss_from_before_the_step_is_refused(make: Callable[..., Pair]) -> None:
    """Its weights are gone; this step and the next are those of plain torch."""
    pair = make(changes=NO_DROPOUT)
    batch = pair.batch()
    pair.model(**joined(batch)).loss.backward()
    stale = pair.model(**joined(batch)).loss
    pair.optimizer.step()
    with pytest.raises(fuyou.ModelError, match=r"before optimizer\.step"):
        stale.backward()
    pair.optimizer.zero_grad()
    pair.step(joined(batch))
    for _ in range(2):
        pair.reference.step(batch)
    pair.assert_equal()
