"""Every read, write, sync and reservation of a short run fails once, each in turn: said clearly, and nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from io_engine import EngineChoice, Extent, PosixEngine, Store, Transfer
from tests.fuyou.tiny_run import assert_same, exported, open_model, train

NUM_STEPS = 3
FAULTS = {"read": ("EIO", "short"), "write": ("EIO", "ENOSPC", "short"), "sync": ("EIO",), "preallocate": ("ENOSPC",)}


class FailingEngine(PosixEngine):
    """An engine of which one call fails: the one numbered `at` of all four kinds."""

    def __init__(self, at: int | None, fault: str) -> None:
        super().__init__(num_threads=2)
        self.kinds: list[str] = []
        self._at, self._fault, self._count_lock = at, fault, threading.Lock()

    def _is_next(self, kind: str) -> bool:
        with self._count_lock:
            self.kinds.append(kind)
            return len(self.kinds) - 1 == self._at

    def _submit(self, kind: Any, extent: Extent, array: Any) -> Transfer:
        if not self._is_next(kind):
            return super()._submit(kind, extent, array)
        text = self._fault
        if self._fault == "short":
            # A part is moved, and no error number comes from the drive.
            part = extent.sub(0, 4096)
            super()._submit(kind, part, array[:4096]).wait()
            text = "EIO"
        number = getattr(errno, text)
        transfer = Transfer(kind, extent, array, 0.0)
        transfer.mark_done(
            OSError(number, f"{os.strerror(number)} ({kind} at {extent.offset_bytes})", extent.path), 0.0
        )
        return transfer

    def sync(self, path: str) -> None:
        if self._is_next("sync"):
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} (fdatasync)", path)
        super().sync(path)

    def preallocate(self, path: str, num_bytes: int) -> None:
        if self._is_next("preallocate"):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (preallocation)", path)
        super().preallocate(path, num_bytes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Updates in both windows, gradients in memory and spilled, one block's weights kept."""
    model = open_model(tmp_path_factory.mktemp("plan") / "store")
    model.fuyou.close()
    return dataclasses.replace(
        model.fuyou.plan,
        host_memory_bytes=2**28,
        gradient_pool_bytes=2**25,
        max_clipped_share=1.0,
        blocks=tuple(
            dataclasses.replace(
                block,
                update_window="forward" if i % 3 == 0 else "backward",
                states_in_host=False,
                weights_in_host=i == 2,
                gradient="spill" if i % 2 else "host",
            )
            for i, block in enumerate(model.fuyou.plan.blocks)
        ),
    ).to_json()


def run_with(engine: PosixEngine, store: Path, plan: Any) -> dict[int, float]:
    """Three steps with clipping; the engine is what the model is opened with."""
    losses: dict[int, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuyou.opening.choose_engine", lambda *_, **__: EngineChoice(engine, "of the test"))
        train(store, 1.0, until=NUM_STEPS, on_step=losses.__setitem__, plan=plan)
    return losses


@pytest.fixture(scope="module")
def undisturbed(plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses, weights, and the kinds of calls in their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    engine = FailingEngine(None, "EIO")
    losses = run_with(engine, folder / "store", plan)
    weights = exported(folder / "store", folder / "out")
    torch.set_num_threads(threads)
    return losses, weights, engine.kinds


def check(at: int, fault: str, folder: Path, plan: Any, undisturbed: Any) -> bool:
    """Let one call fail, resume, and compare; whether the failure came to light."""
    losses, weights, _ = undisturbed
    store, engine, raised = folder / "store", FailingEngine(at, fault), None
    try:
        run_with(engine, store, plan)
    except OSError as error:
        raised = error
    if raised is not None:
        assert str(folder) in str(raised.filename), raised
        assert raised.errno in (errno.EIO, errno.ENOSPC)
    committed = Store.peek(store).step if Store.exists(store) else 0
    rest = run_with(FailingEngine(None, ""), store, plan)
    # What was committed is not done again, and what follows is the same to the bit.
    assert rest == {step: loss for step, loss in losses.items() if step >= committed}
    assert_same(exported(store, folder / "out"), weights)
    assert fuyou.verify_store(store) == []
    return raised is not None


def all_cases(kinds: list[str]) -> list[tuple[int, str]]:
    return [(at, fault) for at, kind in enumerate(kinds) for fault in FAULTS[kind]]


def test_a_sample_of_all_failures(plan: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Two of each kind of call and of failure."""
    kinds = undisturbed[2]
    choose = random.Random(8)
    for kind, faults in FAULTS.items():
        numbers = [at for at, other in enumerate(kinds) if other == kind]
        for fault in faults:
            for at in choose.sample(numbers, 1 if kind == "preallocate" else 2):
                check(at, fault, tmp_path / f"{at}-{fault}", plan, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_failures(plan: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Every call of the run. One that nobody waited for may fail unseen: a read ahead that was not needed."""
    cases = all_cases(undisturbed[2])
    told = [check(at, fault, tmp_path / f"{at}-{fault}", plan, undisturbed) for at, fault in cases]
    assert sum(told) > 0.9 * len(cases)
