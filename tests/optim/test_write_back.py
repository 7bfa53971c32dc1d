"""OffloadedAdamW with `commit_every_steps`: the same bits, nothing on the drive's lanes between commits, and what a crash
leaves is a step that was committed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from io_engine import Buffer, ByteArray, Engine, PosixEngine, Transfer
from optim import NonFiniteUpdateError
from tests.optim.harness import SHAPES, LazyDrive, PlainAdamW, Trainer, initial_masters, random_gradients

pytestmark = pytest.mark.timeout(60)

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


class Kept:
    """A buffer that its users do not give back."""

    def release(self) -> None:
        pass


class MemoryTrainer(Trainer):
    """Keeps all weights in memory, as fuyou's executor does with such a plan."""

    def __init__(self, folder: Path, engine: Engine, every: int, **options: Any) -> None:
        self.kept: dict[str, tuple[Buffer, ByteArray, Transfer]] = {}
        super().__init__(folder, engine, window="forward", resident=ALL, commit_every_steps=every, **options)

    def _read(self, shard: str) -> tuple[Any, ByteArray, Transfer]:
        self.optimizer.wait_written(shard)
        if shard not in self.kept:
            self.kept[shard] = super()._read(shard)
        _, array, transfer = self.kept[shard]
        return Kept(), array, transfer

    def _drop(self) -> None:
        super()._drop()
        while self.kept:
            buffer, _, transfer = self.kept.popitem()[1]
            transfer.wait()
            buffer.release()

    def close(self) -> None:
        """Without a flush: what only memory has is lost, as in a crash."""
        self.optimizer.close()
        self._drop()
        super().close()


def plain_after(num_steps: int, max_grad_norm: float | None = None) -> PlainAdamW:
    plain = PlainAdamW(initial_masters(), max_grad_norm)
    for step in range(num_steps):
        plain.step(random_gradients(step))
    return plain


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_same_bits_as_torch(
    max_grad_norm: float | None, dtype: str, every: int, engine: Engine, tmp_path: Path
) -> None:
    trainer = MemoryTrainer(tmp_path, engine, every, dtype=dtype, max_grad_norm=max_grad_norm)
    plain = PlainAdamW(initial_masters(), max_grad_norm)
    for step in range(7):
        # Some steps in several backward passes; some shards without a gradient, in steps that are written and others.
        parts = [random_gradients(10 * step + n) for n in range(1 + step % 2)]
        if step in (2, 4):
            parts = [{name: g for name, g in part.items() if not name.startswith("l1.")} for part in parts]
        trainer.train(*parts)
        plain.step(*parts)
    trainer.check(plain)
    trainer.close()


def test_nothing_moves_between_commits(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = MemoryTrainer(tmp_path, lazy, 4, max_grad_norm=0.5)
    moved: list[int] = []
    committed: list[int] = []
    for step in range(12):
        before = lazy.num_submitted
        trainer.train(random_gradients(step))
        trainer.forward()  # where the step's updates are made
        for name in ALL:
            trainer.optimizer.wait_written(name)
        moved.append(lazy.num_submitted - before)
        committed.append(trainer.store.step)
    # Weights and states are read once; then each commit writes them.
    assert [number for number, count in enumerate(moved) if count] == [0, 3, 7, 11]
    assert committed[:3] == [0, 0, 0]
    assert committed[4:7] == [4, 4, 4]
    assert committed[8:11] == [8, 8, 8]
    trainer.optimizer.flush()
    assert trainer.store.step == 12
    trainer.check_store(plain_after(12, 0.5))
    trainer.close()


@pytest.mark.parametrize("num_steps", [1, 3, 4, 5, 7])
def test_what_was_not_committed_is_made_again(num_steps: int, engine: Engine, tmp_path: Path) -> None:
    """Closed without a flush after any number of steps, the run goes on bit for bit from its last commit."""
    trainer = MemoryTrainer(tmp_path, engine, 3)
    for step in range(num_steps):
        trainer.train(random_gradients(step))
    trainer.close()
    trainer = MemoryTrainer(tmp_path, engine, 3)
    # A step is committed on the way through the next forward pass, which the last one did not get.
    assert trainer.optimizer.step_count == (num_steps - 1) // 3 * 3
    trainer.check_store(plain_after(trainer.optimizer.step_count))
    for step in range(trainer.optimizer.step_count, 8):
        trainer.train(random_gradients(step))
    trainer.check(plain_after(8))
    trainer.close()


def test_a_flush_commits_the_last_step_and_its_extra(engine: Engine, tmp_path: Path) -> None:
    trainer = MemoryTrainer(tmp_path, engine, 100)
    for step in range(5):
        trainer.optimizer.commit_extra({"rows": step})
        trainer.train(random_gradients(step))
    trainer.optimizer.flush()
    assert (trainer.store.step, trainer.store.state["optimizer"]["extra"]) == (5, {"rows": 4})
    written = trainer.store.checksums
    trainer.optimizer.flush()
    assert trainer.store.checksums == written
    trainer.check_store(plain_after(5))
    trainer.close()


@pytest.mark.parametrize("skipped", [1, 2, 3])
def test_a_skipped_step_is_committed_with_all_that_came_before(skipped: int, engine: Engine, tmp_path: Path) -> None:
    """Its manifest may not be published without the updates of the steps that only memory had."""
    trainer = MemoryTrainer(tmp_path, engine, 3)
    plain = PlainAdamW(initial_masters())
    for step in range(3):
        gradients = random_gradients(step)
        if step + 1 == skipped:
            gradients["norm"] = np.full_like(gradients["norm"], np.nan)
        else:
            plain.step(gradients)
        trainer.train(gradients)
    trainer.forward()
    trainer.optimizer.flush()
    assert (trainer.store.step, trainer.optimizer.num_skipped) == (3, 1)
    trainer.close()
    trainer = MemoryTrainer(tmp_path, engine, 3)
    assert trainer.optimizer.num_skipped == 1
    trainer.check(plain)
    trainer.close()


def test_gradients_given_up_change_nothing(engine: Engine, tmp_path: Path) -> None:
    trainer = MemoryTrainer(tmp_path, engine, 100, max_grad_norm=0.5)
    for step in range(4):
        trainer.forward()
        trainer.backward(random_gradients(100 + step))
        trainer.optimizer.zero_grad()
        trainer.train(random_gradients(step))
    trainer.check(plain_after(4, 0.5))
    trainer.close()


def test_states_edited_between_commits(engine: Engine, tmp_path: Path) -> None:
    trainer = MemoryTrainer(tmp_path, engine, 100)
    plain = plain_after(2)
    for step in range(2):
        trainer.train(random_gradients(step))
    master = torch.linspace(-1, 1, 100)
    trainer.optimizer.set_state("norm", master=master)
    with torch.no_grad():
        plain.masters["norm"][:100] = master
    for step in range(2, 4):
        trainer.train(random_gradients(step))
        plain.step(random_gradients(step))
    trainer.check(plain)
    trainer.close()


def test_an_update_that_overflows_is_refused_between_commits(engine: Engine, tmp_path: Path) -> None:
    masters = initial_masters()
    masters["l0.bias"][3] = np.uint32(0x7F7E0000).view(np.float32)  # 3.376e38, exact in bfloat16
    trainer = MemoryTrainer(tmp_path, engine, 3, masters=masters)
    plain = PlainAdamW(masters)
    for step in range(4):
        trainer.train(random_gradients(step))
        if step < 3:
            plain.step(random_gradients(step))
    trainer.optimizer.param_groups[1]["lr"] = 1e37
    trainer.train({name: -np.abs(g) for name, g in random_gradients(0).items()})
    with pytest.raises(NonFiniteUpdateError, match=r"step 5 would make l0.bias .* stays at step 3"):
        trainer.optimizer.flush()
    trainer.close()
    trainer = MemoryTrainer(tmp_path, engine, 3)
    trainer.check(plain)
    trainer.close()


def test_a_failed_flush_leaves_the_last_commit(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = MemoryTrainer(tmp_path, lazy, 3)
    for step in range(5):
        trainer.train(random_gradients(step))
    trainer.forward()
    layout = trainer.layouts["layers.1"]
    target = trainer.store.extent(layout.weight_name, 1 - trainer.store.active_slot(layout.weight_name))
    lazy.fail("write", target, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        trainer.optimizer.flush()
    assert trainer.store.step == 3
    trainer.close()
    trainer = MemoryTrainer(tmp_path, lazy, 3)
    for step in range(3, 5):
        trainer.train(random_gradients(step))
    trainer.check(plain_after(5))
    trainer.close()


def test_weights_that_only_memory_had_are_never_read_from_the_drive(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = MemoryTrainer(tmp_path, lazy, 100)
    trainer.train(random_gradients(0))
    trainer.forward()
    with pytest.raises(RuntimeError, match=r"layers.0 were in host memory alone .* stands at\s+step 0"):
        trainer.optimizer.slot_of("layers.0")
    trainer.optimizer.flush()
    assert trainer.optimizer.slot_of("layers.0") == trainer.store.active_slot(trainer.layouts["layers.0"].weight_name)
    trainer.close()


@pytest.mark.parametrize(
    ("every", "resident", "window", "message"),
    [
        (0, ALL, "forward", "above zero"),
        (2, ALL[1:], "forward", "1 shards have no resident state .*prologue"),
        (2, ALL, "mixed", "2 are early .*layers.1"),
    ],
)
def test_what_could_lose_a_step_is_refused(
    every: int, resident: tuple[str, ...], window: Any, message: str, lazy: LazyDrive, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(tmp_path, lazy, window=window, resident=resident, commit_every_steps=every)
