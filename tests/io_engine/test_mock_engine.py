"""The mock's own promises: virtual time, and that every race is lost."""

from __future__ import annotations

import errno
import threading

import numpy as np
import pytest

from io_engine import Extent, MockEngine
from io_engine.mock_engine import POISON_BYTE
from tests.io_engine.helpers import PAGE, aligned


def _ones(value: int = 1) -> np.ndarray:
    return aligned(PAGE, np.full(PAGE, value, np.uint8))


def test_nothing_completes_by_itself() -> None:
    with MockEngine() as engine:
        engine.files["a"] = bytearray(_ones())
        array = _ones(7)
        read = engine.read(Extent("a", 0, PAGE), array)
        assert not read.done()
        assert (array == POISON_BYTE).all()  # who does not wait gets poison
        engine.run_until(read)
        assert (array == 1).all()


def test_a_write_takes_the_bytes_when_it_completes() -> None:
    with MockEngine() as engine:
        array = _ones(1)
        write = engine.write(Extent("a", 0, PAGE), array)
        array.fill(2)  # reuse of the buffer without waiting
        write.wait()
        assert engine.files["a"] == bytes([2]) * PAGE


def test_virtual_time_adds_up() -> None:
    engine = MockEngine(read_bytes_per_second=PAGE, write_bytes_per_second=2 * PAGE, latency_seconds=0.5)
    engine.files["a"] = bytearray(2 * PAGE)
    reads = [engine.read(Extent("a", i * PAGE, PAGE), aligned(PAGE)) for i in range(2)]
    write = engine.write(Extent("b", 0, PAGE), aligned(PAGE))
    engine.advance(0.75)
    assert [t.done() for t in (*reads, write)] == [False, False, False]
    engine.advance(0.25)  # the write: 0.5 + 0.5, beside the first read
    assert [t.done() for t in (*reads, write)] == [False, False, True]
    engine.advance(0.5)
    assert [t.done() for t in (*reads, write)] == [True, False, True]
    reads[1].wait()
    assert engine.now_seconds == pytest.approx(3.0)
    assert reads[1].started_seconds == pytest.approx(1.5)
    assert reads[1].ended_seconds == pytest.approx(3.0)
    assert reads[1].seconds == pytest.approx(1.5)
    assert engine.read_seconds == pytest.approx(3.0)
    assert engine.write_seconds == pytest.approx(1.0)
    engine.advance(10)
    assert engine.read_seconds == pytest.approx(3.0)
    with pytest.raises(ValueError, match="negative"):
        engine.advance(-1)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("fifo", [0, 1, 2, 3]), ("lifo", [3, 2, 1, 0]), (lambda waiting: len(waiting) // 2, [2, 1, 3, 0])],
)
def test_the_order_is_chosen(order: object, expected: list[int]) -> None:
    engine = MockEngine(order=order)  # type: ignore[arg-type]
    done: list[int] = []
    for index in range(4):
        transfer = engine.write(Extent("a", index * PAGE, PAGE), aligned(PAGE))
        transfer.add_done_callback(lambda _, index=index: done.append(index))  # type: ignore[misc]
    assert engine.num_under_way == 4
    engine.run_all()
    assert done == expected
    assert engine.num_under_way == 0


def test_waiting_for_one_does_not_complete_the_other_kind() -> None:
    engine = MockEngine(read_bytes_per_second=1e6, write_bytes_per_second=1e3)
    engine.files["a"] = bytearray(PAGE)
    write = engine.write(Extent("b", 0, PAGE), aligned(PAGE))
    engine.read(Extent("a", 0, PAGE), aligned(PAGE)).wait()
    assert not write.done()


def test_a_wait_with_timeout_moves_the_clock_only_so_far() -> None:
    engine = MockEngine(latency_seconds=5)
    write = engine.write(Extent("a", 0, PAGE), aligned(PAGE))
    with pytest.raises(TimeoutError, match="still under way after 2 s"):
        write.wait(timeout_seconds=2)
    assert engine.now_seconds == 2
    write.wait(timeout_seconds=4)
    assert write.done()


def test_chosen_failures() -> None:
    engine = MockEngine()
    engine.files["dir/a"] = bytearray(_ones())
    engine.fail_next("write", "a", OSError(errno.ENOSPC, "No space left on device"), num_to_skip=1)
    engine.fail_next("sync", "dir/a", OSError(errno.EIO, "Input/output error"))
    engine.short_next("read", "dir/", 100)
    first, other, second = (engine.write(Extent(p, 0, PAGE), _ones(5)) for p in ("dir/a", "dir/b", "dir/a"))
    first.wait()
    other.wait()
    with pytest.raises(OSError, match="write of 4096 bytes at offset 0") as caught:
        second.wait()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "dir/a")
    array = aligned(PAGE)
    with pytest.raises(OSError, match="short read: only 100 bytes") as caught:
        engine.read(Extent("dir/a", 0, PAGE), array).wait()
    assert caught.value.errno == errno.EIO
    assert (array[:100] == 5).all()
    assert (array[100:] == POISON_BYTE).all()
    with pytest.raises(OSError, match="fdatasync"):
        engine.sync("dir/a")
    engine.sync("dir/a")
    engine.read(Extent("dir/a", 0, PAGE), array).wait()
    assert engine.transfers == [
        f"write dir/a 0 {PAGE}",
        f"write dir/b 0 {PAGE}",
        "sync dir/a",
        f"read dir/a 0 {PAGE}",
    ]


def test_a_short_write() -> None:
    engine = MockEngine()
    engine.short_next("write", "a", 10)
    with pytest.raises(OSError, match="short write: only 10 bytes"):
        engine.write(Extent("a", 0, PAGE), _ones()).wait()
    assert engine.files["a"] == bytes([1]) * 10


def test_power_loss_takes_what_was_not_synced() -> None:
    engine = MockEngine()
    engine.write(Extent("a", 0, PAGE), _ones(1)).wait()
    engine.sync("a")
    engine.write(Extent("a", 0, PAGE), _ones(2)).wait()
    engine.write(Extent("b", 0, PAGE), _ones(3)).wait()
    engine.lose_unsynced()
    assert engine.files == {"a": bytearray(_ones(1))}


def test_threads_that_wait_move_the_clock_together() -> None:
    engine = MockEngine(order="lifo")
    engine.files["a"] = bytearray(PAGE * 40)
    transfers = [engine.read(Extent("a", i * PAGE, PAGE), aligned(PAGE)) for i in range(40)]
    threads = [threading.Thread(target=lambda part=transfers[i::4]: [t.wait() for t in part]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(transfer.done() for transfer in transfers)
    assert engine.bytes_read == 40 * PAGE


def test_a_callback_may_submit_the_next_transfer() -> None:
    engine = MockEngine()
    second = []
    first = engine.write(Extent("a", 0, PAGE), _ones(1))
    first.add_done_callback(lambda _: second.append(engine.write(Extent("a", PAGE, PAGE), _ones(2))))
    engine.run_all()
    assert engine.files["a"] == bytes([1]) * PAGE + bytes([2]) * PAGE
    assert second[0].done()


def test_directories_are_drives_that_work_side_by_side() -> None:
    engine = MockEngine(
        read_bytes_per_second=PAGE, latency_seconds=0, directory_bytes_per_second={"fast": 4 * PAGE, "slow": PAGE / 2}
    )
    for path in ("fast/x", "slow/x", "other/x"):
        engine.files[path] = bytearray(_ones())
    reads = {path: engine.read(Extent(path, 0, PAGE), aligned(PAGE)) for path in ("slow/x", "other/x", "fast/x")}
    array = aligned(3 * PAGE)
    striped = engine.read(Extent.join(Extent(path, 0, PAGE) for path in ("slow/x", "fast/x", "other/x")), array)
    assert engine.num_under_way == 6
    striped.wait()
    assert (array == 1).all()
    assert {path: read.ended_seconds for path, read in reads.items()} == {"fast/x": 0.25, "other/x": 1.0, "slow/x": 2.0}
    assert (striped.started_seconds, striped.ended_seconds) == (0.25, 4.0)
    assert engine.bytes_read == 6 * PAGE


def test_foreign_transfers_are_refused() -> None:
    transfer = MockEngine().write(Extent("a", 0, PAGE), _ones())
    with pytest.raises(ValueError, match="not a transfer of this engine"):
        MockEngine().run_until(transfer)
