from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from io_engine import BudgetError, BufferPool, EngineError
from io_engine.buffers import HUGE_PAGE_BYTES, size_class_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("num_bytes", "taken_bytes"),
    [
        (1, 4096),
        (4096, 4096),
        (4097, 8192),
        (12289, 16384),
        (MIB - 1, MIB),
        (MIB, 2 * MIB),
        (2 * MIB + 1, 4 * MIB),
    ],
)
def test_size_classes(num_bytes: int, taken_bytes: int) -> None:
    assert size_class_bytes(num_bytes) == taken_bytes


@pytest.mark.parametrize("num_bytes", [1, 4096, 5000, 100_000, MIB, 5 * MIB + 3])
def test_buffers_are_aligned_writable_and_long_enough(num_bytes: int) -> None:
    with BufferPool(16 * MIB, name="test") as pool, pool.acquire(num_bytes) as buffer:
        array = buffer.array
        assert array.dtype == np.uint8
        assert array.shape == (-(-num_bytes // 4096) * 4096,)
        assert buffer.num_bytes == array.size
        assert buffer.address == array.ctypes.data
        assert buffer.address % (HUGE_PAGE_BYTES if num_bytes >= MIB else 4096) == 0
        array[:] = 7
        assert int(array.sum(dtype=np.int64)) == 7 * array.size


def test_a_freed_buffer_is_used_again() -> None:
    with BufferPool(8 * MIB, name="test") as pool:
        first = pool.acquire(2 * MIB)
        address = first.address
        first.release()
        with pool.acquire(2 * MIB - 5) as second:
            assert second.address == address
        assert pool.mapped_bytes == pool.peak_bytes == 2 * MIB
        assert pool.used_bytes == 0


def test_free_buffers_of_other_classes_make_room() -> None:
    calls: list[tuple[str, int]] = []
    pool = BufferPool(
        8 * MIB,
        name="test",
        register=lambda address, num_bytes: calls.append(("register", address)),
        unregister=lambda address: calls.append(("unregister", address)),
    )
    small = [pool.acquire(2 * MIB) for _ in range(4)]
    addresses = [buffer.address for buffer in small]
    for buffer in small:
        buffer.release()
    assert pool.mapped_bytes == 8 * MIB
    with pool.acquire(4 * MIB) as big:
        assert pool.mapped_bytes == 8 * MIB
        # The two that were free longest went, each unregistered before its memory was given back.
        assert calls == [("register", a) for a in addresses] + [("unregister", a) for a in addresses[:2]] + [
            ("register", big.address)
        ]
    pool.close()
    assert pool.mapped_bytes == 0
    assert pool.peak_bytes == 8 * MIB
    assert sorted(a for what, a in calls if what == "register") == sorted(
        a for what, a in calls if what == "unregister"
    )


def test_more_than_the_budget_is_refused_at_once() -> None:
    with (
        BufferPool(4 * MIB, name="gradients") as pool,
        pytest.raises(BudgetError, match=rf"'gradients'.*takes {6 * MIB}.*budget of {4 * MIB}"),
    ):
        pool.acquire(5 * MIB)


def test_without_blocking_a_full_pool_refuses() -> None:
    with BufferPool(4 * MIB, name="weights") as pool, pool.acquire(2 * MIB):
        with pytest.raises(BudgetError, match=r"'weights'.*in use by 1 buffers"):
            pool.acquire(4 * MIB, block=False)
        with pytest.raises(TimeoutError, match="nobody released enough"):
            pool.acquire(4 * MIB, timeout_seconds=0.01)
        with pool.acquire(2 * MIB, block=False):
            assert pool.used_bytes == 4 * MIB


def test_acquire_waits_for_a_release_of_another_thread() -> None:
    with BufferPool(4 * MIB, name="test") as pool:
        held = [pool.acquire(2 * MIB), pool.acquire(2 * MIB)]
        got: list[int] = []

        def take_all() -> None:
            with pool.acquire(4 * MIB) as buffer:
                got.append(buffer.num_bytes)

        thread = threading.Thread(target=take_all)
        thread.start()
        held[0].release()  # not enough for 4 MiB yet
        assert not got
        held[1].release()
        thread.join(30)
        assert got == [4 * MIB]


def test_many_threads_never_exceed_the_budget_nor_share_a_buffer() -> None:
    pool = BufferPool(6 * MIB, name="test")
    seen_wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(60):
            with pool.acquire(int(random.choice([5000, 70_000, 2 * MIB, 4 * MIB]))) as buffer:
                buffer.array[::4096] = seed
                if pool.mapped_bytes > pool.budget_bytes or (buffer.array[::4096] != seed).any():
                    seen_wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not seen_wrong
    assert pool.used_bytes == 0
    assert pool.peak_bytes <= 6 * MIB
    pool.close()


def test_release_twice_and_use_after_release_raise() -> None:
    with BufferPool(4 * MIB, name="test") as pool:
        buffer = pool.acquire(100)
        buffer.release()
        with pytest.raises(RuntimeError, match="released twice"):
            buffer.release()
        with pytest.raises(RuntimeError, match="already released"):
            _ = buffer.array
        with pool.acquire(100) as released_inside:
            released_inside.release()


def test_close_with_buffers_out() -> None:
    pool = BufferPool(4 * MIB, name="activations")
    buffer = pool.acquire(3 * MIB)
    with pytest.raises(EngineError, match="'activations' cannot close: 1 buffers"):
        pool.close()
    pool.close(force=True)
    buffer.array[:] = 1  # still the owner's
    assert pool.mapped_bytes == 4 * MIB
    buffer.release()
    assert pool.mapped_bytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        pool.acquire(1)


def test_close_wakes_those_who_wait() -> None:
    pool = BufferPool(4096, name="test")
    buffer = pool.acquire(1)
    errors: list[str] = []

    def wait() -> None:
        try:
            pool.acquire(1)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    pool.close(force=True)
    thread.join(30)
    buffer.release()
    assert "closed" in errors[0]


def test_a_view_that_outlives_the_pool_keeps_its_memory() -> None:
    pool = BufferPool(8 * MIB, name="test")
    buffer = pool.acquire(2 * MIB)
    buffer.array[:] = 42
    view = buffer.array[100:200]
    address = buffer.address
    buffer.release()
    with pool.acquire(8 * MIB) as other:  # evicts the first one, which cannot be unmapped
        other.array[:] = 1
        assert not other.address <= address < other.address + other.num_bytes
    pool.close()
    assert view.tolist() == [42] * 100
    view[:] = 3
    del view
    gc.collect()


def test_a_register_that_fails_leaves_the_budget_free() -> None:
    def refuse(address: int, num_bytes: int) -> None:
        raise OSError(12, "cannot register")

    pool = BufferPool(4 * MIB, name="test", register=refuse)
    for _ in range(3):
        with pytest.raises(OSError, match="cannot register"):
            pool.acquire(4 * MIB)
    assert pool.mapped_bytes == pool.used_bytes == 0
    pool.close()


def test_trim_gives_free_memory_back() -> None:
    with BufferPool(8 * MIB, name="test") as pool, pool.acquire(2 * MIB):
        pool.acquire(4 * MIB).release()
        pool.trim()
        assert pool.mapped_bytes == pool.used_bytes == 2 * MIB


def _flags_at(address: int) -> list[str]:
    """VmFlags of the mapping around an address, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc/self/smaps")
@pytest.mark.parametrize("num_bytes", [4096, 4 * MIB])
def test_forked_children_do_not_get_the_memory(num_bytes: int) -> None:
    with BufferPool(8 * MIB, name="test") as pool, pool.acquire(num_bytes) as buffer:
        flags = _flags_at(buffer.address)
        assert "dc" in flags  # "do not copy on fork"
        assert "sh" not in flags  # private: huge pages are not given to shared mappings
        if num_bytes >= MIB and os.path.exists("/sys/kernel/mm/transparent_hugepage"):
            assert "hg" in flags


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # other tests may have left threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_that_drops_a_pool_unmaps_nothing_of_its_own(tmp_path: Path) -> None:
    pool = BufferPool(64 * MIB, name="test")
    buffer = pool.acquire(32 * MIB)
    process_id = os.fork()
    if process_id == 0:
        # The child maps into the hole that DONTFORK left, then drops the pool. Were the parent's mapping
        # objects collected here, their munmap would take this memory away.
        code = 1
        try:
            own = [np.ones(32 * MIB, np.uint8) for _ in range(8)]
            del buffer, pool
            gc.collect()
            code = 0 if sum(int(array[::4096].sum()) for array in own) == 8 * 32 * MIB // 4096 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(process_id, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    buffer.release()
    pool.close()


@pytest.mark.parametrize("budget_bytes", [0, -1])
def test_an_empty_budget_is_refused(budget_bytes: int) -> None:
    with pytest.raises(ValueError, match="not positive"):
        BufferPool(budget_bytes, name="test")


def test_an_empty_buffer_is_refused() -> None:
    with BufferPool(4096, name="test") as pool, pytest.raises(ValueError, match="not positive"):
        pool.acquire(0)
