"""OffloadedAdamW driven directly: the bits of plain torch in any window, place and order; what goes wrong.

`LazyDrive` ends no transfer before everybody waits for it and `GarbagePool` overwrites what is released, so
that a missing wait gives wrong bytes every time.
"""

from __future__ import annotations

import copy
import errno
import gc
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from io_engine import BudgetError, ByteArray, Engine, Extent, MockEngine, PosixEngine, Store, Transfer
from optim import NonFiniteUpdateError, OffloadedAdamW, StepResult
from tests.optim.harness import (
    SHAPES,
    Gradients,
    LazyDrive,
    PlainAdamW,
    Trainer,
    initial_masters,
    layouts,
    own_threads,
    random_gradients,
)

pytestmark = pytest.mark.timeout(60)

Window = Literal["backward", "mixed", "forward"]
WINDOWS: tuple[Window, ...] = ("backward", "mixed", "forward")
ALL = tuple(SHAPES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["posix", "lazy"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made: Engine = PosixEngine(2) if request.param == "posix" else LazyDrive()
    yield made
    made.close()


@pytest.fixture
def lazy() -> Iterator[LazyDrive]:
    made = LazyDrive()
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    deadline_seconds = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_seconds
        time.sleep(0.001)


def without(gradients: Gradients, *names: str) -> Gradients:
    return {name: value for name, value in gradients.items() if name not in names}


# --- the bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("resident", [(), ("layers.0", "epilogue")])
@pytest.mark.parametrize(
    ("window", "spilled"),
    [
        ("backward", ()),
        ("backward", ALL),
        ("mixed", ()),
        ("mixed", ("layers.0", "prologue")),
        ("forward", ()),
        ("forward", ALL),
    ],
)
def test_same_bits_as_torch(
    window: Window,
    spilled: tuple[str, ...],
    resident: tuple[str, ...],
    dtype: str,
    engine: Engine,
    tmp_path: Path,
) -> None:
    """Two groups, a schedule, absent gradients, whole shards absent, and gradients thrown away."""
    trainer = Trainer(tmp_path / "s", engine, window=window, spilled=spilled, resident=resident, dtype=dtype)
    plain = PlainAdamW(initial_masters())
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1 / (n + 1)])
        for optimizer in (trainer.optimizer, plain.optimizer)
    ]
    for step in range(6):
        gradients = random_gradients(step)
        if step in (1, 2):
            gradients = without(gradients, "l0.bias", "l1.weight")
        if step == 3:
            gradients = without(gradients, "embed", "norm")
        if step == 4:  # thrown away
            trainer.forward()
            trainer.backward(random_gradients(99))
            trainer.optimizer.zero_grad()
        trainer.train(gradients)
        norm = plain.step(gradients)
        early = [s for s in _hit(gradients, ALL) if trainer.optimizer.updates_early(s)]
        read_back = [s for s in _hit(gradients, spilled) if s not in early]
        assert trainer.optimizer.last_step == StepResult(
            step=step + 1,
            grad_norm=norm,
            clipped=False,
            skipped=None,
            window="backward" if early else "forward",
            num_redone=0,
            bytes_spilled=sum(trainer.layouts[s].gradient_bytes for s in [*_hit(gradients, spilled), *read_back]),
        )
        for scheduler in schedulers:
            scheduler.step()
        if step in (0, 3):
            trainer.check(plain)
    trainer.optimizer.flush()
    assert trainer.store.step == 6
    trainer.check(plain)
    trainer.close()


def _hit(gradients: Gradients, shards: tuple[str, ...]) -> list[str]:
    return [shard for shard in shards if gradients.keys() & SHAPES[shard].keys()]


@pytest.mark.parametrize("max_grad_norm", [1e9, 1e-3, 1.5])
@pytest.mark.parametrize(
    ("spilled", "resident"), [((), ()), (ALL, ()), ((), ("layers.0", "prologue")), (("layers.1",), ("layers.0",))]
)
@pytest.mark.parametrize("max_clipped_share", [0.25, 1.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_clipping(
    window: Window,
    max_clipped_share: float,
    spilled: tuple[str, ...],
    resident: tuple[str, ...],
    max_grad_norm: float,
    lazy: LazyDrive,
    tmp_path: Path,
) -> None:
    """Never, always and sometimes, by the norm's own definition; early updates that were wrong are made again."""
    trainer = Trainer(
        tmp_path / "s",
        lazy,
        window=window,
        spilled=spilled,
        resident=resident,
        max_grad_norm=max_grad_norm,
        max_clipped_share=max_clipped_share,
    )
    early = sum(trainer.optimizer.updates_early(shard) for shard in SHAPES)
    plain = PlainAdamW(initial_masters(), max_grad_norm)
    clipped = []
    for step in range(4):
        gradients = random_gradients(step, scale=(0.005, 0.02)[step % 2])
        trainer.train(gradients)
        norm = plain.step(gradients)
        result = trainer.optimizer.last_step
        assert result is not None
        assert result.grad_norm == norm
        assert result.clipped == (norm > max_grad_norm)
        guessed = early if sum(clipped) <= max_clipped_share * len(clipped) else 0
        assert result.window == ("backward" if guessed else "forward")
        assert result.num_redone == (guessed if result.clipped else 0)
        clipped.append(result.clipped)
    assert clipped == {1e9: [False] * 4, 1e-3: [True] * 4, 1.5: [False, True] * 2}[max_grad_norm]
    trainer.check(plain)
    trainer.close()


def test_max_grad_norm_may_change_between_steps(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    plain = PlainAdamW(initial_masters())
    for step, limit in enumerate((None, 1e-2, None)):
        trainer.optimizer.max_grad_norm = plain.max_grad_norm = limit
        assert trainer.optimizer.max_grad_norm == limit
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("spilled", [(), ALL, ("layers.0",)])
@pytest.mark.parametrize("resident", [(), ("layers.0", "prologue")])
@pytest.mark.parametrize("window", WINDOWS)
def test_backward_passes_add_up_until_a_step(
    window: Window, resident: tuple[str, ...], spilled: tuple[str, ...], lazy: LazyDrive, tmp_path: Path
) -> None:
    """Three passes, each with gradients that the others lack; spilled ones come back to be added to."""
    trainer = Trainer(
        tmp_path / "s",
        lazy,
        window=window,
        spilled=spilled,
        resident=resident,
        max_grad_norm=0.5,
        max_clipped_share=1.0,
    )
    plain = PlainAdamW(initial_masters(), 0.5)
    for step in range(2):
        parts = [
            without(random_gradients(10 * step), "l0.bias"),
            without(random_gradients(10 * step + 1), "l0.weight", "norm"),
            without(random_gradients(10 * step + 2), "embed"),
        ]
        trainer.train(*parts)
        norm = plain.step(*parts)
        assert trainer.optimizer.last_step is not None
        assert trainer.optimizer.last_step.grad_norm == norm
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("resident", [(), ("layers.0",), ALL])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_in_bfloat16_are_spilled_as_such(
    dtype: str, window: Window, resident: tuple[str, ...], num_passes: int, lazy: LazyDrive, tmp_path: Path
) -> None:
    """Half of the bytes, the same bits: read for late updates and wrong guesses, and to be added to."""
    trainer = Trainer(
        tmp_path / "s",
        lazy,
        window=window,
        spilled=ALL,
        resident=resident,
        dtype=dtype,
        max_grad_norm=0.5,
        max_clipped_share=1.0,
    )
    trainer.narrow = () if dtype == "float32" else ("prologue", "layers.0", "epilogue")
    plain = PlainAdamW(initial_masters(), 0.5)
    for step in range(3):
        parts = [of_bfloat16(random_gradients(10 * step + number)) for number in range(num_passes)]
        trainer.train(*parts)
        norm = plain.step(*parts)
        last = trainer.optimizer.last_step
        assert last is not None
        assert (last.grad_norm, last.clipped) == (norm, True)
        if num_passes == 1:
            # Each is written, and read, since early updates were wrong, too.
            expected = sum(trainer.layouts[s].gradient_bytes / (2 if s in trainer.narrow else 1) for s in ALL)
            assert 2 * expected <= last.bytes_spilled <= 2 * expected + 4096 * len(ALL)  # whole pages
        trainer.check(plain)
    trainer.close()


def of_bfloat16(gradients: Gradients) -> Gradients:
    """Rounded, so that the lower halves are zero."""
    return {name: torch.from_numpy(g).bfloat16().float().numpy() for name, g in gradients.items()}


def test_gradients_add_up_in_a_pool_of_two_buffers(lazy: LazyDrive, tmp_path: Path) -> None:
    """Nothing but spilling lets buffers go; adding to what was spilled must not need more of them."""
    largest = max(layout.gradient_bytes for layout in layouts("bfloat16").values())
    trainer = Trainer(
        tmp_path / "s",
        lazy,
        window="forward",
        spilled=ALL,
        gradient_bytes=2 * (1 << (largest - 1).bit_length()),
    )
    plain = PlainAdamW(initial_masters())
    parts = [random_gradients(1), random_gradients(2)]
    trainer.train(*parts)
    plain.step(*parts)
    trainer.check(plain)
    trainer.close()


def test_norm_before_the_step(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    assert trainer.optimizer.grad_norm() == 0.0
    trainer.backward(random_gradients(1))
    assert trainer.optimizer.grad_norm() == PlainAdamW(initial_masters()).step(random_gradients(1))
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_records", [1, 2, 8])
def test_any_number_of_record_buffers(num_records: int, window: Window, engine: Engine, tmp_path: Path) -> None:
    """One buffer must do: read, update, write, one after the other."""
    trainer = Trainer(tmp_path / "s", engine, window=window, num_records=num_records, num_workers=1)
    plain = PlainAdamW(initial_masters())
    for step in range(2):
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
    trainer.check(plain)
    trainer.close()


def test_backward_window_with_one_gradient_buffer(engine: Engine, tmp_path: Path) -> None:
    """The backward pass waits for the update that holds the only buffer."""
    trainer = Trainer(tmp_path / "s", engine, window="backward", gradient_bytes=1 << 16)
    plain = PlainAdamW(initial_masters())
    for step in range(2):
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_steps_without_a_forward_pass_between(window: Window, engine: Engine, tmp_path: Path) -> None:
    """step() begins what the forward pass did not."""
    trainer = Trainer(tmp_path / "s", engine, window=window)
    plain = PlainAdamW(initial_masters())
    for step in range(3):
        trainer.backward(random_gradients(step))
        trainer.optimizer.step()
        plain.step(random_gradients(step))
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("spilled", [(), ALL])
def test_the_forward_pass_computes_with_the_new_weights(
    spilled: tuple[str, ...], lazy: LazyDrive, tmp_path: Path
) -> None:
    """What `wait_ready` promises, while every write is still under way."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward", spilled=spilled, num_records=16)
    plain = PlainAdamW(initial_masters())
    for step in range(2):
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
        trainer.forward()
        assert trainer.seen.keys() == SHAPES.keys()
        for name, array in trainer.seen.items():
            trainer.check_weights(trainer.layouts[name], array, plain)
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("resident", [(), ("layers.0",), ALL])
@pytest.mark.parametrize("spilled", [(), ("layers.1",), ("layers.0",)])
def test_traffic_of_a_step(
    window: Window, resident: tuple[str, ...], spilled: tuple[str, ...], lazy: LazyDrive, tmp_path: Path
) -> None:
    """Each record is read once, if it is not in memory, and written once; spilled gradients once each way, but not read
    where the early update was right."""
    trainer = Trainer(tmp_path / "s", lazy, window=window, resident=resident, spilled=spilled)
    for step in range(2):
        trainer.train(random_gradients(step))
    trainer.optimizer.flush()
    read, written = lazy.bytes_read, lazy.bytes_written
    trainer.backward(random_gradients(2))
    trainer.optimizer.step()
    trainer.optimizer.flush()
    all_of = trainer.layouts.values()
    states = sum(layout.state_bytes for layout in all_of)
    weights = sum(layout.weight_bytes for layout in all_of)
    kept = sum(trainer.layouts[shard].state_bytes for shard in resident)
    spilled_bytes = sum(trainer.layouts[s].gradient_bytes for s in spilled)
    read_back = sum(trainer.layouts[s].gradient_bytes for s in spilled if not trainer.optimizer.updates_early(s))
    assert lazy.bytes_read - read == weights + states - kept + read_back
    assert lazy.bytes_written - written == weights + states + spilled_bytes
    trainer.close()


def test_spilled_gradient_is_read_before_the_next_is_spilled(lazy: LazyDrive, tmp_path: Path) -> None:
    """Even if nobody waits for the update in between: both lie in the same place."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward", spilled=ALL)
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    for shard in SHAPES:
        buffer, array, transfer = trainer._read(shard)
        trainer.start_update(shard, buffer, array, transfer)
    trainer.backward(random_gradients(1))
    trainer.optimizer.step()
    plain.step(random_gradients(1))
    trainer.check(plain)
    trainer.close()


# --- states that are read before their gradient is there -----------------------------------------------------


def log_of_state_reads(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by "shard/record" with every read of states."""
    log: list[str] = []
    read = trainer.engine.read
    places = {
        (extent.path, extent.offset_bytes): f"{name}/{index}"
        for name, layout in trainer.layouts.items()
        for slot in (0, 1)
        for index in range(layout.num_chunks)
        for extent in [trainer.store.extent(layout.state_name, slot).sub(*layout.state_range(index))]
    }

    def logged_read(extent: Extent, array: ByteArray) -> Transfer:
        log.extend(filter(None, [places.get((extent.path, extent.offset_bytes))]))
        return read(extent, array)

    monkeypatch.setattr(trainer.engine, "read", logged_read)
    return log


def test_expected_states_are_read_once_and_before_the_gradient(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path / "s", engine, window="backward")
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.optimizer.flush()
    log = log_of_state_reads(trainer, monkeypatch)
    trainer.forward()
    trainer.optimizer.begin_backward()
    for shard in reversed(SHAPES):
        trainer.optimizer.expect_gradient(shard)
        first = [f"{shard}/{index}" for index in range(min(2, trainer.layouts[shard].num_chunks))]
        until(lambda first=first: set(first) <= set(log))  # type: ignore[misc]
        assert log[-len(first) :] == first
        trainer.complete(shard, random_gradients(1))
        trainer.optimizer.wait_written(shard)
    trainer.optimizer.step()
    plain.step(random_gradients(1))
    trainer.optimizer.flush()
    assert len(log) == len(set(log)) == sum(layout.num_chunks for layout in trainer.layouts.values())
    trainer.check(plain)
    trainer.close()


def test_more_is_read_ahead_when_a_buffer_comes_back(
    lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="backward", num_records=2)
    log = log_of_state_reads(trainer, monkeypatch)
    with trainer.records.acquire(1 << 16):
        trainer.optimizer.expect_gradient("layers.0")
        until(lambda: log == ["layers.0/0"])
    # Its record's buffer is the other one, in use until it is written.
    trainer.complete("epilogue", random_gradients(0))
    until(lambda: len(log) == 3)
    assert log == ["layers.0/0", "epilogue/0", "layers.0/1"]
    trainer.optimizer.zero_grad()
    trainer.close()


def test_nothing_expected_is_read_before_the_last_commit(
    lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the states of the last step may be on their way to the drive, also while its last update is under way."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward", num_records=8)
    log = log_of_state_reads(trainer, monkeypatch)
    gate, commit = threading.Event(), trainer.store.commit

    def wait_for_gate() -> None:
        gate.wait(20)

    def logged_commit(**arguments: Any) -> None:
        commit(**arguments)
        log.append("commit")

    monkeypatch.setattr(trainer.store, "commit", logged_commit)
    trainer.optimizer._updater.submit_barrier(wait_for_gate)
    trainer.backward(random_gradients(0), ["epilogue"])
    trainer.optimizer.step()
    trainer.optimizer.expect_gradient("layers.1")
    gate.set()
    until(lambda: len(log) == 4)
    assert log == ["epilogue/0", "commit", "layers.1/0", "layers.1/1"]
    trainer.optimizer.zero_grad()
    trainer.close()


def test_nothing_is_expected_while_updates_have_not_begun(
    lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass of the last block opens its gradient; what that pass has skipped keeps the commit out of the queue."""
    trainer = Trainer(tmp_path / "s", lazy, window="mixed")
    trainer.train(random_gradients(0))
    for shard in ("prologue", "layers.1"):
        trainer.optimizer.wait_written(shard)
    log = log_of_state_reads(trainer, monkeypatch)
    trainer.optimizer.expect_gradient("layers.1")
    trainer.load("layers.0")
    trainer.optimizer.expect_gradient("layers.1")
    time.sleep(0.05)
    assert log == ["layers.0/0", "layers.0/1", "layers.0/2"]
    trainer.close()


@pytest.mark.parametrize("num_records", [1, 3])
def test_a_gradient_that_is_expected_and_never_comes(num_records: int, engine: Engine, tmp_path: Path) -> None:
    """Others' updates get its buffers when there are no more, and whoever reads states, too."""
    trainer = Trainer(tmp_path / "s", engine, window="backward", num_records=num_records, num_workers=1)
    plain = PlainAdamW(initial_masters())
    for step in range(3):
        trainer.forward()
        trainer.optimizer.expect_gradient("prologue")
        until(lambda: trainer.records.used_bytes > 0)
        gradients = without(random_gradients(step), *SHAPES["prologue"])
        trainer.backward(gradients, [name for name in SHAPES if name != "prologue"])
        trainer.optimizer.step()
        plain.step(gradients)
        trainer.optimizer.expect_gradient("layers.0")
        trainer.check(plain)
    trainer.optimizer.zero_grad()
    until(lambda: trainer.records.used_bytes == 0)
    trainer.optimizer.expect_gradient("layers.0")
    trainer.close()


def test_states_that_are_edited_are_read_again(engine: Engine, tmp_path: Path) -> None:
    """They were read ahead for a backward pass that ended in an error, say."""
    trainer = Trainer(tmp_path / "s", engine, window="backward", num_records=8)
    edited = initial_masters()
    edited["l0.weight"] = edited["l0.weight"] * 2
    trainer.optimizer.expect_gradient("layers.0")
    until(lambda: trainer.records.used_bytes > 0)
    trainer.optimizer.set_state("l0.weight", master=torch.from_numpy(edited["l0.weight"]).reshape(80, 130))
    plain = PlainAdamW(edited)
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.close()


def test_an_expected_read_that_fails(lazy: LazyDrive, tmp_path: Path) -> None:
    """It matters to the update that it was made for alone."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.optimizer.flush()

    def expect_to_fail() -> None:
        extent = trainer.store.extent("layers.1/state")
        lazy.fail("read", extent, OSError(errno.EIO, "broken"))
        trainer.optimizer.expect_gradient("layers.1")
        until(lambda: not lazy.failures)

    expect_to_fail()
    trainer.train(without(random_gradients(1), *SHAPES["layers.1"]))
    plain.step(without(random_gradients(1), *SHAPES["layers.1"]))
    trainer.check(plain)
    expect_to_fail()
    trainer.backward(random_gradients(2), ["layers.1"])
    with pytest.raises(OSError, match="Input/output error"):
        trainer.optimizer.step()
        trainer.optimizer.flush()
    assert trainer.store.step == 2
    trainer.close()


# --- commit and resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_resume(window: Window, engine: Engine, tmp_path: Path) -> None:
    """A new optimizer goes on with step counts, counts of absent gradients and what the user added."""
    plain = PlainAdamW(initial_masters())
    for run in range(3):
        trainer = Trainer(tmp_path / "s", engine, window=window, resident=("layers.1",) if run == 1 else ())
        assert trainer.optimizer.step_count == 2 * run
        assert trainer.optimizer.extra == ({"rows": 2 * run - 1} if run else {})
        for step in (2 * run, 2 * run + 1):
            gradients = random_gradients(step)
            if step in (1, 4):
                gradients = without(gradients, "l1.bias", "embed")
            trainer.optimizer.commit_extra({"rows": step})
            trainer.train(gradients)
            plain.step(gradients)
        trainer.check(plain)
        trainer.close()


def test_parameters_unfrozen_later_count_from_their_first_update(lazy: LazyDrive, tmp_path: Path) -> None:
    """In a shard that was trained, and in one that was not."""
    late = {"l0.weight", "l0.bias", "norm"}
    plain = PlainAdamW(initial_masters())
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    for step in range(2):
        gradients = without(random_gradients(step), "norm", "l0.bias", "l0.weight")
        trainer.train(gradients)
        plain.step(gradients)
    trainer.optimizer.flush()
    missed = trainer.store.state["optimizer"]["missed"]  # type: ignore[index, call-overload]
    assert {name for name, count in missed.items() if count == 2} == late | {"l0.frozen"}
    trainer.close()

    # A store whose shard has never been updated says nothing of its parameters: as if written before.
    with Store.open(tmp_path / "s", engine=lazy) as store:
        assert "epilogue/state" not in store.checksums
        state = dict(store.state)
        kept = {name: count for name, count in missed.items() if name != "norm"}
        state["optimizer"] = {**state["optimizer"], "missed": kept}  # type: ignore[dict-item]
        store.commit(step=store.step, slots={}, checksums={}, state=state)

    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    trainer.train(random_gradients(5))
    plain.step(random_gradients(5))
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_commit_follows_every_write_of_its_step(window: Window, lazy: LazyDrive, tmp_path: Path) -> None:
    """Power lost right after each commit: the step it names is there, whole."""
    trainer = Trainer(tmp_path / "s", lazy, window=window)
    plain = PlainAdamW(initial_masters())
    for step in range(2):
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
    seen = len(lazy.transfers)
    trainer.train(random_gradients(2))
    plain.step(random_gradients(2))
    trainer.optimizer.flush()
    log = lazy.transfers[seen:]
    last_sync = max(i for i, line in enumerate(log) if line.startswith("sync"))
    num_chunks = sum(layout.num_chunks for layout in trainer.layouts.values())
    written = [line for line in log[:last_sync] if line.startswith("write")]
    assert len(written) >= 2 * num_chunks
    lazy.lose_unsynced()
    trainer.close()
    again = Trainer(tmp_path / "s", lazy, window=window)
    assert again.optimizer.step_count == 3
    again.check(plain)
    again.close()


def test_no_write_of_the_next_step_before_the_commit(
    lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its updates are in the queue before the commit is made."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    gate = threading.Event()

    def wait_for_gate() -> None:
        gate.wait(20)

    trainer.optimizer._updater.submit_barrier(wait_for_gate)
    log: list[str] = []
    write, commit = lazy.write, trainer.store.commit
    of_next_step = trainer.store.extent("prologue/weight", 1)

    def logged_write(extent: Extent, array: ByteArray) -> Transfer:
        if extent.path == of_next_step.path and extent.offset_bytes == of_next_step.offset_bytes:
            log.append("write of step 2")
        return write(extent, array)

    def logged_commit(**arguments: Any) -> None:
        commit(**arguments)
        log.append(f"commit of step {arguments['step']}")

    monkeypatch.setattr(lazy, "write", logged_write)
    monkeypatch.setattr(trainer.store, "commit", logged_commit)
    trainer.backward(random_gradients(0), ["epilogue"])
    trainer.optimizer.step()
    trainer.backward(random_gradients(1), ["prologue"])
    trainer.optimizer.step()
    gate.set()
    trainer.optimizer.flush()
    assert log == ["commit of step 1", "write of step 2", "commit of step 2"]
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("resident", [(), ALL])
def test_what_is_not_committed_leaves_the_store_alone(
    window: Window, resident: tuple[str, ...], engine: Engine, tmp_path: Path
) -> None:
    """Updates in the backward window without a step; in the forward window, not all of them begun."""
    trainer = Trainer(tmp_path / "s", engine, window=window, resident=resident)
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.backward(random_gradients(1))
    if window == "forward":
        trainer.optimizer.step()
        trainer.load("prologue")
        trainer.load("layers.0")
    trainer.close()
    again = Trainer(tmp_path / "s", engine, window=window)
    assert again.optimizer.step_count == 1
    again.check(plain)
    again.close()


@pytest.mark.parametrize("resident", [(), ALL])
def test_updates_that_no_step_accepts_change_nothing(resident: tuple[str, ...], engine: Engine, tmp_path: Path) -> None:
    """zero_grad() after updates in the backward window: slots and resident states as before."""
    trainer = Trainer(tmp_path / "s", engine, window="backward", resident=resident)
    plain = PlainAdamW(initial_masters())
    for step in range(3):
        trainer.forward()
        trainer.backward(random_gradients(50 + step))
        assert not trainer.optimizer.is_written("prologue")
        trainer.optimizer.zero_grad()
        assert trainer.num_dropped == step + 1
        assert trainer.optimizer.is_written("prologue")
        trainer.check(plain)
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
        trainer.check(plain)
    trainer.close()


def test_reading_states_between_backward_and_step(engine: Engine, tmp_path: Path) -> None:
    """Those of the last step, though updates have begun; the step is then the one it would have been."""
    trainer = Trainer(tmp_path / "s", engine, window="backward")
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.forward()
    trainer.backward(random_gradients(1))
    for shard in SHAPES:
        trainer.optimizer.wait_written(shard)
    assert all(trainer.optimizer._guesses[shard].job.done.is_set() for shard in SHAPES)
    trainer.check(plain)
    for shard in SHAPES:
        trainer.load(shard)
    trainer.optimizer.step()
    plain.step(random_gradients(1))
    trainer.check(plain)
    trainer.close()


def test_state_of_unknown_names(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    with pytest.raises(KeyError, match="nothing"):
        trainer.optimizer.state_of("nothing")
    trainer.close()


def test_extra_must_be_json_and_is_copied(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    with pytest.raises(TypeError):
        trainer.optimizer.commit_extra({"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match="JSON"):
        trainer.optimizer.commit_extra({"loss": math.nan})
    extra = {"rows": [1, 2]}
    trainer.optimizer.commit_extra(extra)
    extra["rows"].append(3)
    trainer.train(random_gradients(0))
    trainer.close()
    again = Trainer(tmp_path / "s", lazy, window="backward")
    assert again.optimizer.extra == {"rows": [1, 2]}
    again.close()


# --- gradients that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("where", ["norm", "l0.weight", "embed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_skip_the_step(
    window: Window, where: str, bad: float, lazy: LazyDrive, tmp_path: Path
) -> None:
    """Wherever the backward pass meets it: nothing changes but the count of steps, which is committed."""
    resident = ("layers.1",)
    trainer = Trainer(tmp_path / "s", lazy, window=window, resident=resident, spilled=("layers.0",))
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.optimizer.flush()
    slots = trainer.store.slots
    gradients = random_gradients(1)
    gradients[where][7] = bad
    trainer.train(gradients)
    result = trainer.optimizer.last_step
    assert result is not None
    assert (result.step, result.clipped) == (2, False)
    assert not math.isfinite(result.grad_norm)
    assert result.skipped is not None
    assert result.skipped.startswith("the gradient norm is")
    assert trainer.optimizer.num_skipped == 1
    trainer.check(plain)
    assert trainer.store.step == 2
    assert trainer.store.slots == slots
    trainer.train(random_gradients(2))
    plain.step(random_gradients(2))
    trainer.check(plain)
    trainer.close()
    again = Trainer(tmp_path / "s", lazy, window=window)
    assert (again.optimizer.step_count, again.optimizer.num_skipped) == (3, 1)
    again.check(plain)
    again.close()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_update_that_overflows_is_refused(window: Window, dtype: str, engine: Engine, tmp_path: Path) -> None:
    """The store stays at the step before, whole; every call says so from then on."""
    masters = initial_masters()
    masters["l0.bias"][3] = np.uint32(0x7F7E0000).view(np.float32)  # 3.376e38, exact in bfloat16
    trainer = Trainer(tmp_path / "s", engine, window=window, dtype=dtype, masters=masters)
    plain = PlainAdamW(masters)
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.optimizer.param_groups[1]["lr"] = 1e37
    trainer.train({name: -np.abs(g) for name, g in random_gradients(0).items()})
    with pytest.raises(NonFiniteUpdateError, match=r"step 2 would make l0.bias .* stays at step 1"):
        trainer.optimizer.flush()
    with pytest.raises(NonFiniteUpdateError):
        trainer.optimizer.step()
    with pytest.raises(NonFiniteUpdateError):
        trainer.optimizer.acquire_gradient("prologue")
    trainer.close()
    again = Trainer(tmp_path / "s", engine, window=window, dtype=dtype)
    assert again.optimizer.step_count == 1
    again.check(plain)
    again.close()


# --- hyperparameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": "1e-3"}, "lr='1e-3'"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1\.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]=-0\.1"),
        ({"betas": 0.9}, r"betas=0\.9"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"weight_decay": math.inf}, "weight_decay=inf"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, Any], message: str, lazy: LazyDrive, tmp_path: Path) -> None:
    """One clear sentence; no thread is left behind."""

    def one_group(parameters: Any) -> list[dict[str, Any]]:
        return [{"params": [parameters["embed"]]}]

    before = frozenset(threading.enumerate())
    with pytest.raises(ValueError, match=message):
        Trainer(tmp_path / "s", lazy, window="forward", groups=one_group, **wrong)
    assert not own_threads(before)


@pytest.mark.parametrize("field", ["amsgrad", "maximize"])
def test_options_of_torch_that_would_be_ignored(field: str, lazy: LazyDrive, tmp_path: Path) -> None:
    def group(parameters: Any) -> list[dict[str, Any]]:
        return [{"params": [parameters["embed"]], field: True}]

    with pytest.raises(ValueError, match=f"{field}=True"):
        Trainer(tmp_path / "s", lazy, window="forward", groups=group)


def test_parameters_that_are_not_trained(lazy: LazyDrive, tmp_path: Path) -> None:
    """In the constructor and in add_param_group."""
    with pytest.raises(ValueError, match="1 of 1 parameters"):
        Trainer(tmp_path / "s", lazy, window="forward", groups=lambda p: [{"params": [p["l0.frozen"]]}])
    trainer = Trainer(tmp_path / "t", lazy, window="forward", groups=lambda p: [{"params": [p["embed"]], "lr": 1e-2}])
    with pytest.raises(ValueError, match="1 of 1 parameters"):
        trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert len(trainer.optimizer.param_groups) == 1
    trainer.optimizer.add_param_group({"params": [trainer.parameters["norm"]], "lr": 1e-3})
    assert len(trainer.optimizer.param_groups) == 2
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_of_parameters_in_no_group(window: Window, lazy: LazyDrive, tmp_path: Path) -> None:
    """They count for the norm, as in clip_grad_norm_ over the whole model; nothing of theirs changes."""

    def groups(parameters: Any) -> list[dict[str, Any]]:
        return [{"params": [parameters["l1.bias"]], "lr": 1e-2}]

    trainer = Trainer(tmp_path / "s", lazy, window=window, groups=groups)
    plain = PlainAdamW(initial_masters())
    plain.optimizer = torch.optim.AdamW(groups(plain.masters), fused=True, weight_decay=0.01)
    for step in range(2):
        trainer.train(random_gradients(step))
        norm = plain.step(random_gradients(step))
        assert trainer.optimizer.last_step is not None
        assert trainer.optimizer.last_step.grad_norm == norm
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_step_that_updates_nothing_is_committed(window: Window, lazy: LazyDrive, tmp_path: Path) -> None:
    """All gradients belong to parameters in no group."""
    trainer = Trainer(tmp_path / "s", lazy, window=window, groups=lambda p: [{"params": [p["norm"]], "lr": 1e-2}])
    trainer.train(without(random_gradients(0), "norm"))
    trainer.optimizer.flush()
    assert (trainer.store.step, trainer.optimizer.step_count) == (1, 1)
    trainer.close()


def test_a_backward_pass_without_gradients_is_no_step(lazy: LazyDrive, tmp_path: Path) -> None:
    for window in WINDOWS:
        trainer = Trainer(tmp_path / window, lazy, window=window)
        for _ in range(2):
            trainer.backward({})
            trainer.optimizer.step()
        assert trainer.optimizer.step_count == 0
        trainer.check(PlainAdamW(initial_masters()))
        trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_wrong_hyperparameters_set_later(window: Window, lazy: LazyDrive, tmp_path: Path) -> None:
    """The call says so and changes nothing: with the right value the same step is made."""
    trainer = Trainer(tmp_path / "s", lazy, window=window)
    plain = PlainAdamW(initial_masters())
    trainer.forward()
    trainer.optimizer.param_groups[0]["lr"] = -1.0
    if window != "forward":
        with pytest.raises(ValueError, match="lr=-1"):
            trainer.optimizer.acquire_gradient("prologue")
        trainer.optimizer.param_groups[0]["lr"] = 1e-2
        trainer.backward(random_gradients(0))
    else:
        trainer.backward(random_gradients(0))
        with pytest.raises(ValueError, match="lr=-1"):
            trainer.optimizer.step()
        assert trainer.optimizer.step_count == 0
        trainer.optimizer.param_groups[0]["lr"] = 1e-2
    trainer.optimizer.step()
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("field", ["lr", "betas", "eps", "weight_decay"])
def test_hyperparameters_changed_between_backward_and_step(field: str, lazy: LazyDrive, tmp_path: Path) -> None:
    """RuntimeError where gradients are given back, with nothing changed: the former value makes the step."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    plain = PlainAdamW(initial_masters())
    group = trainer.optimizer.param_groups[0]
    trainer.backward(random_gradients(0))
    former = group[field]
    trainer.optimizer.flush()
    group[field] = (0.5, 0.5) if field == "betas" else 0.5
    with pytest.raises(RuntimeError, match=r"changed between backward\(\) and step\(\)"):
        trainer.optimizer.step()
    assert trainer.optimizer.step_count == 0
    group[field] = former
    trainer.optimizer.step()
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_hyperparameters_changed_where_gradients_are_kept_count(
    window: Window, lazy: LazyDrive, tmp_path: Path
) -> None:
    """As in torch: those at step(), and only shards with another value are updated again."""
    trainer = Trainer(tmp_path / "s", lazy, window=window, kept=True)
    plain = PlainAdamW(initial_masters())
    trainer.backward(random_gradients(0))
    trainer.optimizer.flush()
    for optimizer in (trainer.optimizer, plain.optimizer):
        optimizer.param_groups[0]["lr"] = 0.5
    trainer.optimizer.step()
    assert trainer.optimizer.last_step is not None
    # The first group has parameters in all shards but layers.1.
    assert trainer.optimizer.last_step.num_redone == {"backward": 3, "mixed": 1, "forward": 0}[window]
    trainer.optimizer.param_groups[0]["lr"] = 0.25  # for the next one
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.close()


def test_clipping_is_refused_where_gradients_are_given_back(lazy: LazyDrive, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"before the norm is known"):
        Trainer(tmp_path / "s", lazy, window="backward", max_grad_norm=1.0, kept=False)
    trainer = Trainer(tmp_path / "t", lazy, window="backward")
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0"):
        trainer.optimizer.max_grad_norm = 1.0
    trainer.optimizer.max_grad_norm = None
    trainer.close()


def test_second_backward_pass_where_gradients_are_given_back(lazy: LazyDrive, tmp_path: Path) -> None:
    """Refused with the remedy; after zero_grad() or step() all is well."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    plain = PlainAdamW(initial_masters())
    trainer.backward(random_gradients(0))
    with pytest.raises(RuntimeError, match="micro_batch_size"):
        trainer.optimizer.accumulate()
    trainer.optimizer.step()
    plain.step(random_gradients(0))
    trainer.backward(random_gradients(1))
    with pytest.raises(RuntimeError, match=r"accumulate\(\)"):
        trainer.backward(random_gradients(2))
    trainer.optimizer.zero_grad()
    trainer.train(random_gradients(2))
    plain.step(random_gradients(2))
    trainer.check(plain)
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_shards_that_a_forward_pass_skips(window: Window, engine: Engine, tmp_path: Path) -> None:
    """Layer drop: their late update begins before anything of the next step is written, and is in its own commit."""
    trainer = Trainer(tmp_path / "s", engine, window=window, kept=True)
    plain = PlainAdamW(initial_masters())
    for step in range(4):
        for shard in ("prologue", "layers.1") if step % 2 else ("layers.0",):
            trainer.load(shard)
        trainer.backward(random_gradients(step))
        assert trainer.store.step <= step  # nothing commits a step that was not taken
        trainer.optimizer.step()
        plain.step(random_gradients(step))
        if step == 1:
            trainer.check(plain)
    trainer.check(plain)
    trainer.close()


def test_accumulating_onto_nothing(lazy: LazyDrive, tmp_path: Path) -> None:
    """After a backward pass that failed before its first block: the next one is an ordinary one, early updates included."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward", gradient_bytes=1 << 16)
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.optimizer.accumulate()
    trainer.optimizer.zero_grad()
    trainer.train(random_gradients(1))
    plain.step(random_gradients(1))
    assert trainer.optimizer.last_step is not None
    assert trainer.optimizer.last_step.window == "backward"
    trainer.check(plain)
    trainer.close()


def test_guesses_that_no_step_takes_are_forgotten(lazy: LazyDrive, tmp_path: Path) -> None:
    """Many backward passes thrown away leave no list that grows."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    for step in range(6):
        trainer.backward(random_gradients(step))
        trainer.optimizer.zero_grad()
    assert len(trainer.optimizer._updater._unfinished) <= len(SHAPES)
    trainer.close()


def test_refused_steps_change_nothing(lazy: LazyDrive, tmp_path: Path) -> None:
    """Whoever knows of a loss that is no number says so before step(); zero_grad() takes it back."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward", kept=True)
    plain = PlainAdamW(initial_masters())
    trainer.backward(random_gradients(0))
    trainer.optimizer.refuse_step("the loss is nan")
    trainer.optimizer.step()
    assert trainer.optimizer.last_step is not None
    assert trainer.optimizer.last_step.skipped == "the loss is nan"
    assert trainer.optimizer.num_skipped == 1
    trainer.backward(random_gradients(1))
    trainer.optimizer.refuse_step("the loss is nan")
    trainer.optimizer.zero_grad()
    trainer.train(random_gradients(2))
    plain.step(random_gradients(2))
    trainer.check(plain)
    trainer.close()


def test_state_dict_is_small_and_goes_round(lazy: LazyDrive, tmp_path: Path) -> None:
    """Hyperparameters only; states of another optimizer are refused, and values that cannot be used."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    trainer.train(random_gradients(0))
    saved = copy.deepcopy(trainer.optimizer.state_dict())
    assert saved["state"] == {}
    assert len(json.dumps(saved)) < 2000
    trainer.optimizer.param_groups[0]["lr"] = 7.0
    trainer.optimizer.load_state_dict(saved)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2
    plain = PlainAdamW(initial_masters())
    plain.step(random_gradients(0))
    with pytest.raises(ValueError, match=r"live|store"):
        trainer.optimizer.load_state_dict(plain.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr=-1"):
        trainer.optimizer.load_state_dict(saved)
    trainer.check(plain)
    trainer.close()


def test_step_with_a_closure(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    plain = PlainAdamW(initial_masters())

    def closure() -> float:
        assert torch.is_grad_enabled()
        trainer.backward(random_gradients(0))
        return 1.25

    with torch.no_grad():
        assert trainer.optimizer.step(closure) == 1.25
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.close()


# --- what goes wrong ----------------------------------------------------------------------------------------

Fault = Callable[[Trainer], None]


def _state(kind: str, slot_kind: str, shard: str = "layers.0", extent: str = "state") -> Fault:
    def arm(trainer: Trainer) -> None:
        name = f"{shard}/{extent}"
        active = trainer.store.active_slot(name)
        slot = active if slot_kind == "active" else 1 - active
        place = trainer.store.extent(name, slot)
        trainer.engine.fail(kind, place, OSError(errno.EIO, "broken"))  # type: ignore[attr-defined]

    return arm


def _spill(kind: str) -> Fault:
    def arm(trainer: Trainer) -> None:
        place = trainer.store.scratch("layers.0/gradient", trainer.layouts["layers.0"].gradient_bytes)
        trainer.engine.fail(kind, place, OSError(errno.ENOSPC, "full"))  # type: ignore[attr-defined]

    return arm


def _sync(trainer: Trainer) -> None:
    trainer.engine.fail_next("sync", "extents", OSError(errno.EIO, "broken"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("window", "fault"),
    [
        *((window, _state("read", "active")) for window in WINDOWS),
        *((window, _state("write", "other")) for window in WINDOWS),
        *((window, _state("write", "other", extent="weight")) for window in WINDOWS),
        *((window, _sync) for window in WINDOWS),
        ("forward", _spill("read")),
        ("forward", _spill("write")),
    ],
    ids=[
        *(f"{what}-{window}" for what in ("read", "write", "weight-write", "sync") for window in WINDOWS),
        "spill-read",
        "spill-write",
    ],
)
@pytest.mark.parametrize("resident", [(), ALL])
def test_an_io_error_stops_everything(
    window: Window, fault: Fault, resident: tuple[str, ...], lazy: LazyDrive, tmp_path: Path
) -> None:
    """The real OSError comes from every call from then on; the store stays whole at the step before."""
    spilled = ("layers.0", "layers.1") if window == "forward" else ()
    # Once resident, states are not read; so for their reads the first step is the one that fails.
    num_good = 0 if resident else 1
    trainer = Trainer(tmp_path / "s", lazy, window=window, spilled=spilled, resident=resident)
    plain = PlainAdamW(initial_masters())
    for step in range(num_good):
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
    trainer.optimizer.flush()
    fault(trainer)
    with pytest.raises(OSError, match=r"broken|full|Input|space") as caught:  # sooner or later
        for step in range(5, 8):
            trainer.train(random_gradients(step))
    assert caught.value.errno in (errno.EIO, errno.ENOSPC)
    assert caught.value.filename is not None
    for call in (trainer.optimizer.flush, trainer.optimizer.step):
        with pytest.raises(OSError, match=r"broken|full|Input|space"):
            call()
    with pytest.raises(OSError, match=r"broken|full|Input|space"):
        trainer.optimizer.acquire_gradient("prologue")
    step_on_drive = trainer.store.step
    # With the forward window the failing step may follow a good one that was committed on the way.
    assert num_good <= step_on_drive <= num_good + 1
    for step in range(5, 5 + step_on_drive - num_good):
        plain.step(random_gradients(step))
    trainer.close()
    again = Trainer(tmp_path / "s", lazy, window=window)
    assert again.optimizer.step_count == step_on_drive
    again.check(plain)
    again.train(random_gradients(9))
    plain.step(random_gradients(9))
    again.check(plain)
    again.close()


def test_a_refused_update_gives_weights_back_after_their_read(lazy: LazyDrive, tmp_path: Path) -> None:
    """After a failure nothing is updated; a read into the buffer may be under way all the same."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    trainer.train(random_gradients(0))
    trainer.optimizer._updater.fail(OSError(errno.EIO, "broken"))
    buffer, array, transfer = trainer._read("layers.0")
    was_done: list[bool] = []

    def on_done() -> None:
        was_done.append(transfer.done())
        buffer.release()

    job = trainer.optimizer.start_pending_update("layers.0", array, [transfer], on_done)
    with pytest.raises(OSError, match="broken"):
        job.wait()
    assert was_done == [True]
    trainer.close()


def test_weights_that_cannot_be_read_for_their_update(lazy: LazyDrive, tmp_path: Path) -> None:
    """The update never begins on them: the step is not committed."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    lazy.fail("read", trainer.store.extent("layers.0/weight", 0), OSError(errno.EIO, "broken"))
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output") as caught:
            trainer.optimizer.flush()
        assert caught.value.errno == errno.EIO
    assert trainer.store.step == 0
    trainer.close()
    again = Trainer(tmp_path / "s", lazy, window="forward")
    again.check(plain)
    again.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_gradient_that_never_arrives(window: Window, lazy: LazyDrive, tmp_path: Path) -> None:
    """Whatever the copy from the device raises comes out of step(); buffers come back."""
    trainer = Trainer(tmp_path / "s", lazy, window=window)
    gradient, next_one = (trainer.optimizer.acquire_gradient(shard) for shard in ("layers.1", "epilogue"))
    gradient.arrived.add("l1.bias")
    next_one.arrived.add("norm")
    given_back: list[int] = []

    def wait() -> None:
        raise RuntimeError("the device is gone")

    buffer, array, transfer = trainer._read("layers.1")
    transfer.wait()
    trainer.optimizer.gradient_complete(gradient, array, wait=wait, on_done=lambda: given_back.append(1))
    trainer.optimizer.gradient_complete(next_one, array, wait=lambda: None, on_done=lambda: given_back.append(2))
    for call in (trainer.optimizer.step, trainer.optimizer.flush, trainer.optimizer.zero_grad):
        with pytest.raises(RuntimeError, match="the device is gone"):
            call()
    buffer.release()
    assert given_back == {"backward": [1, 2], "mixed": [1], "forward": []}[window]
    assert trainer.optimizer.is_written("epilogue") == (window != "backward")
    assert not trainer.optimizer._jobs  # nothing is begun after a failure
    assert trainer.store.step == 0
    trainer.close()


def test_a_gradients_memory_does_not_wait_for_what_is_written(tmp_path: Path) -> None:
    """The next block's backward pass may have it as soon as the last record is computed; the weights' memory is in use."""
    engine = MockEngine(write_bytes_per_second=1e3)
    trainer = Trainer(tmp_path / "s", engine, window="backward", num_records=8)
    trainer.optimizer.begin_backward()
    given_back: list[int] = []
    gradient = trainer.optimizer.acquire_gradient("layers.1")
    gradient.array[:] = 0
    gradient.arrived.add("l1.bias")
    buffer, array, transfer = trainer._read("layers.1")
    transfer.wait()
    trainer.optimizer.gradient_complete(gradient, array, wait=lambda: None, on_done=lambda: given_back.append(1))
    # Virtual time stands still while nobody waits for a write.
    until(lambda: trainer.gradients.used_bytes == 0)
    assert trainer.gradients.used_bytes == 0
    assert engine.num_under_way > 0
    assert given_back == []
    engine.run_all()
    trainer.optimizer.step()
    trainer.optimizer.flush()
    assert given_back == [1]
    buffer.release()
    trainer.close()


def test_an_on_done_that_raises_wakes_whoever_waits(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="backward")

    def on_done() -> None:
        buffer.release()
        raise RuntimeError("no way back")

    gradient = trainer.optimizer.acquire_gradient("layers.1")
    gradient.array[:] = 0
    gradient.arrived.add("l1.bias")
    buffer, array, transfer = trainer._read("layers.1")
    transfer.wait()
    trainer.optimizer.gradient_complete(gradient, array, wait=lambda: None, on_done=on_done)
    trainer.optimizer.step()
    with pytest.raises(RuntimeError, match="no way back"):
        trainer.optimizer.flush()
    assert trainer.store.step == 0
    trainer.close()


def test_map_raises_only_when_nobody_works_any_more(lazy: LazyDrive, tmp_path: Path) -> None:
    """The memory that the others write into is about to be released."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward", num_workers=2)
    failed, ended = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item == 0:
            failed.set()
            raise ArithmeticError("one of them")
        failed.wait(20)
        time.sleep(0.2)  # as long as the other needs to get through, were it not waited for
        ended.set()
        return item

    with pytest.raises(ArithmeticError, match="one of them"):
        trainer.optimizer._updater.map(work, [0, 1])
    assert ended.is_set()
    assert trainer.optimizer._updater.map(lambda item: 2 * item, [1, 2, 3]) == [2, 4, 6]
    trainer.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_an_engine_that_takes_no_more_writes(
    window: Window, lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write of a chunk begins, the second is refused: their buffer stays until the first ends."""
    trainer = Trainer(tmp_path / "s", lazy, window=window)
    calls = 0
    write = lazy.write

    def refuse(extent: Any, array: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the engine is closed; make a new one")
        return write(extent, array)

    monkeypatch.setattr(lazy, "write", refuse)
    with pytest.raises(RuntimeError, match="the engine is closed"):  # sooner or later
        for step in range(3):
            trainer.train(random_gradients(step))
    trainer.close()


def test_gradients_that_do_not_fit_are_an_error_and_no_deadlock(lazy: LazyDrive, tmp_path: Path) -> None:
    """Held until step(), they fill the pool: nothing can come back."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward", gradient_bytes=2 << 16)
    with pytest.raises(BudgetError, match=r"no memory for the gradient of .*host_memory"):
        trainer.backward(random_gradients(0))
    trainer.close()


def test_a_record_that_does_not_fit_is_refused(lazy: LazyDrive, tmp_path: Path) -> None:
    """Beside resident states, for instance; before a thread is started."""
    before = frozenset(threading.enumerate())
    with pytest.raises(BudgetError, match="records"):
        Trainer(tmp_path / "s", lazy, window="backward", num_records=0.5)
    assert not own_threads(before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_an_update_is_being_submitted(
    when: str, lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is never committed without that shard, whatever is called then."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.optimizer.flush()
    trainer.train(random_gradients(1))
    submit = trainer.optimizer._updater.submit

    def interrupted(job: Any) -> None:
        if job.layout.name == "layers.0":
            if when == "after":
                submit(job)
            raise KeyboardInterrupt
        submit(job)

    monkeypatch.setattr(trainer.optimizer._updater, "submit", interrupted)
    trainer.load("prologue")
    buffer, array, transfer = trainer._read("layers.0")
    with pytest.raises(KeyboardInterrupt):
        trainer.start_update("layers.0", buffer, array, transfer)
    monkeypatch.undo()
    transfer.wait()
    for call in (trainer.optimizer.flush, trainer.optimizer.step):
        with pytest.raises(RuntimeError, match=r"interrupted .KeyboardInterrupt.* at step 1"):
            call()
    if when == "before":
        buffer.release()
    trainer.close()
    again = Trainer(tmp_path / "s", lazy, window="forward")
    assert again.optimizer.step_count == 1
    again.check(plain)
    again.close()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("place", ["_state_to_commit", "_submit_commit"])
def test_ctrl_c_inside_step(
    window: Window, place: str, lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-taken step is not taken again, and not committed."""
    trainer = Trainer(tmp_path / "s", lazy, window=window)
    plain = PlainAdamW(initial_masters())
    trainer.train(random_gradients(0))
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.backward(random_gradients(1))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.optimizer, place, interrupt)
    if window != "backward" and place == "_submit_commit":
        trainer.optimizer.step()  # it is the forward pass that submits the commit
        for shard in list(SHAPES)[:-1]:
            trainer.load(shard)
        buffer, array, transfer = trainer._read("epilogue")
        with pytest.raises(KeyboardInterrupt):
            trainer.start_update("epilogue", buffer, array, transfer)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.optimizer.step()
    monkeypatch.undo()
    for call in (trainer.optimizer.step, trainer.optimizer.flush):
        with pytest.raises(RuntimeError, match="interrupted"):
            call()
    gc.collect()  # gradients that the interrupted call had in hand
    trainer.optimizer.close()
    trainer.resident.clear()
    trainer.store.close()
    again = Trainer(tmp_path / "s", lazy, window=window)
    assert again.optimizer.step_count == 1
    again.check(plain)
    again.close()


def test_ctrl_c_while_waiting_loses_nothing(lazy: LazyDrive, tmp_path: Path) -> None:
    """Interrupted while gradients arrive, step() is called again, and it is the whole step."""
    trainer = Trainer(tmp_path / "s", lazy, window="forward")
    plain = PlainAdamW(initial_masters())
    gate = threading.Event()
    gradient = trainer.optimizer.acquire_gradient("epilogue")
    gradients = random_gradients(0)
    gradient.arrived.add("norm")

    def wait() -> None:
        gate.wait(20)
        gradient.array[:100] = gradients["norm"]

    trainer.optimizer.gradient_complete(gradient, wait=wait)
    trainer.backward(gradients, ["prologue", "layers.0", "layers.1"])
    submit = trainer.optimizer._intake._thread.submit
    futures: list[Any] = []

    class Interrupting:
        def __init__(self, future: Any) -> None:
            futures.append(future)

        def result(self) -> None:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.optimizer._intake._thread, "submit", lambda *a: Interrupting(submit(*a)), raising=True)
        with pytest.raises(KeyboardInterrupt):
            trainer.optimizer.step()
    gate.set()
    trainer.optimizer.step()
    plain.step(gradients)
    trainer.check(plain)
    trainer.close()


# --- closing, memory, the end of the process ----------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_calls_after_close(window: Window, lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window=window)
    trainer.train(random_gradients(0))
    trainer.close()
    trainer.optimizer.close()
    trainer.optimizer.zero_grad()
    for call in (
        trainer.optimizer.step,
        trainer.optimizer.flush,
        lambda: trainer.optimizer.state_of("embed"),
        lambda: trainer.optimizer.acquire_gradient("prologue"),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("spilled", [(), ALL])
def test_close_at_any_moment(window: Window, spilled: tuple[str, ...], lazy: LazyDrive, tmp_path: Path) -> None:
    """Gradients arriving, held, spilled, pending: buffers come back, threads end (Trainer.close looks)."""
    for moment in range(4):
        trainer = Trainer(tmp_path / f"s{moment}", lazy, window=window, spilled=spilled, resident=("epilogue",))
        trainer.train(random_gradients(0))
        if moment == 1:
            trainer.backward(random_gradients(1), ["layers.1", "epilogue"])
        if moment == 2:
            trainer.forward()
            trainer.backward(random_gradients(1))
        if moment == 3:
            trainer.train(random_gradients(1))
            if window == "forward":
                trainer.load("layers.1")
        trainer.close()
        with Store.open(tmp_path / f"s{moment}", engine=lazy) as store:
            assert store.verify() == []


@pytest.mark.parametrize("window", WINDOWS)
def test_nothing_keeps_released_memory_mapped(window: Window, engine: Engine, tmp_path: Path) -> None:
    """A pool's budget is real memory: after a step no array of it is kept, and it can all be unmapped."""
    trainer = Trainer(tmp_path / "s", engine, window=window, spilled=("layers.0",))
    for step in range(2):
        trainer.train(random_gradients(step))
    trainer.optimizer.flush()
    for pool in (trainer.weights, trainer.gradients):
        assert pool.used_bytes == 0
        pool.trim()
        assert pool.mappings
        assert all(mapping.memory.closed for mapping in pool.mappings), pool.name
    trainer.close()


def test_bookkeeping_does_not_grow(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    for step in range(8):
        trainer.train(random_gradients(step, ["norm", "l1.bias"]))
    trainer.optimizer.flush()
    optimizer = trainer.optimizer
    assert len(optimizer._barriers) <= 1
    assert len(optimizer._jobs) <= len(SHAPES)
    assert not optimizer._updater._unfinished
    trainer.close()


_SCRIPT = """
import sys
from pathlib import Path
from io_engine import PosixEngine
from tests.optim.harness import Trainer, random_gradients

trainer = Trainer(Path(sys.argv[1]), PosixEngine(2), window=sys.argv[2])
trainer.train(random_gradients(0))
trainer.forward()
trainer.backward(random_gradients(1))
if sys.argv[3] == "raise":
    raise SystemExit("a mistake of the user's")
"""


@pytest.mark.parametrize(
    ("window", "end"), [pytest.param("backward", "end", marks=pytest.mark.slow), ("forward", "raise")]
)
def test_a_program_that_forgets_to_close_ends(window: str, end: str, tmp_path: Path) -> None:
    """At once and without noise; what it had committed is there."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "s"), window, end],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == (1 if end == "raise" else 0), done.stderr
    assert done.stderr == ("a mistake of the user's\n" if end == "raise" else "")
    with PosixEngine(1) as engine, Store.open(tmp_path / "s", engine=engine) as store:
        assert store.step in (0, 1)
        assert store.verify() == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_are_compiled_before_the_first_step(
    dtype: str, lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(
        "optim.kernels.warm_up",
        lambda moments, narrow_gradients: called.append(f"{moments} {'narrow' if narrow_gradients else 'float32'}"),
    )
    monkeypatch.setattr("optim.norm.warm_up", lambda: called.append("norm"))
    trainer = Trainer(tmp_path / "s", lazy, window="forward", dtype=dtype)
    narrow = ["float32 narrow"] if dtype == "bfloat16" else []
    assert sorted(called) == sorted(["float32 float32", "norm", *narrow])
    assert isinstance(trainer.optimizer, OffloadedAdamW)
    trainer.close()
