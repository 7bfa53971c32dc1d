"""Random interleavings of everything, against a model in memory: the store, engines, reuse of buffers, failures."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from io_engine import Buffer, BufferPool, Engine, Extent, ExtentSpec, MockEngine, PosixEngine, Store, Transfer, checksum
from io_engine import striping as striping_module
from tests.io_engine.helpers import PAGE

STRIPE_PAGES = 2
NUM_PAGES = {"small": 1, "whole": 2, "striped": 7, "scratch": 6}
MAX_UNDER_WAY = 6


class Under:
    """A transfer under way: where its pages are in the model, and what must come of it."""

    def __init__(self, transfer: Transfer, buffer: Buffer, key: tuple[str, int], first: int, last: int) -> None:
        self.transfer, self.buffer = transfer, buffer
        self.key, self.first, self.last = key, first, last
        self.expected: list[bytes] | None = None  # of a read
        self.written: list[bytes] | None = None
        self.fails = False

    def overlaps(self, key: tuple[str, int], first: int, last: int) -> bool:
        return self.key == key and self.first < last and first < self.last


class IoMachine(RuleBasedStateMachine):
    """The model: for each slot, the bytes of its pages; None where a write failed, and anything may be."""

    make_engine: Callable[[], Engine]

    @initialize(
        num_directories=st.integers(1, 3), rates=st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=3, max_size=3)
    )
    def begin(self, num_directories: int, rates: list[float]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="io-machine-"))
        self.folders = [self.folder / str(index) for index in range(num_directories)]
        self.engine = type(self).make_engine()
        self.pool = BufferPool(MAX_UNDER_WAY * 16 * PAGE, name="machine")
        self.store = Store.create(
            self.folders, identity={}, engine=self.engine, directory_bytes_per_second=rates[:num_directories]
        )
        specs = [ExtentSpec(name, n * PAGE, 2) for name, n in NUM_PAGES.items() if name != "scratch"]
        self.store.allocate(specs, prewrite=False)
        zero = bytes(PAGE)
        self.model: dict[tuple[str, int], list[bytes | None]] = {
            (name, slot): [zero] * n for name, n in NUM_PAGES.items() if name != "scratch" for slot in (0, 1)
        }
        self.under_way: list[Under] = []
        self.step = -1
        self.num_written = self.num_read = 0

    def _extent(self, key: tuple[str, int]) -> Extent:
        name, slot = key
        return self.store.scratch(name, NUM_PAGES[name] * PAGE) if name == "scratch" else self.store.extent(name, slot)

    def _submit(self, kind: str, key: tuple[str, int], first: int, last: int, fill: int, fault: str | None) -> None:
        # The engine promises nothing of transfers that overlap, unless both read.
        clash = [
            u for u in self.under_way if u.overlaps(key, first, last) and (kind == "write" or u.written is not None)
        ]
        for other in clash:
            self._finish(other)
        part = self._extent(key).sub(first * PAGE, (last - first) * PAGE)
        buffer = self.pool.acquire(part.num_bytes, block=False)
        array = buffer.array[: part.num_bytes]
        if fault is not None:
            self._break(kind, part, fault)
        pages = self.model.setdefault(key, [None] * NUM_PAGES[key[0]])
        if kind == "write":
            for index in range(last - first):
                array[index * PAGE : (index + 1) * PAGE] = (fill + 17 * (first + index)) % 256
            under = Under(self.engine.write(part, array), buffer, key, first, last)
            under.written = [array[i * PAGE : (i + 1) * PAGE].tobytes() for i in range(last - first)]
        else:
            array.fill(0xEE)
            under = Under(self.engine.read(part, array), buffer, key, first, last)
            under.expected = pages[first:last]  # type: ignore[assignment]
        under.fails = fault is not None
        self.under_way.append(under)

    def _break(self, kind: str, part: Extent, fault: str) -> None:
        assert isinstance(self.engine, MockEngine)
        path = part.segments[-1].path
        # Of several segments in the file the first one takes the fault.
        if fault == "short":
            self.engine.short_next(kind, path, PAGE // 2)  # type: ignore[arg-type]
        else:
            self.engine.fail_next(kind, path, OSError(errno.EIO, "Input/output error"))  # type: ignore[arg-type]

    def _finish(self, under: Under) -> None:
        self.under_way.remove(under)
        if under.fails:
            with pytest.raises(OSError, match="short|Input/output error") as caught:
                under.transfer.wait()
            assert caught.value.errno == errno.EIO
            assert caught.value.filename in {s.path for s in under.transfer.extent.segments}
        else:
            under.transfer.wait()
        array = under.buffer.array
        pages = self.model[under.key]
        if under.written is not None:
            self.num_written += 0 if under.fails else under.transfer.num_bytes
            pages[under.first : under.last] = [None] * len(under.written) if under.fails else under.written
        elif not under.fails:
            self.num_read += under.transfer.num_bytes
            assert under.expected is not None
            for index, expected in enumerate(under.expected):
                if expected is not None:
                    assert array[index * PAGE : (index + 1) * PAGE].tobytes() == expected
        array.fill(0xDD)  # the next owner's business: nobody may still read or write it
        under.buffer.release()

    @precondition(lambda self: len(self.under_way) < MAX_UNDER_WAY)
    @rule(
        kind=st.sampled_from(["read", "write"]),
        name=st.sampled_from(list(NUM_PAGES)),
        slot=st.integers(0, 1),
        first=st.integers(0, 6),
        num_pages=st.integers(1, 7),
        fill=st.integers(0, 255),
        fault=st.sampled_from([None, None, None, "error", "short"]),
    )
    def transfer(
        self, kind: str, name: str, slot: int, first: int, num_pages: int, fill: int, fault: str | None
    ) -> None:
        first = min(first, NUM_PAGES[name] - 1)
        last = min(NUM_PAGES[name], first + num_pages)
        key = (name, 0 if name == "scratch" else slot)
        if name == "scratch" and key not in self.model:
            kind = "write"  # never-written scratch of the mock has no bytes to read
        self._submit(kind, key, first, last, fill, fault if isinstance(self.engine, MockEngine) else None)

    @precondition(lambda self: self.under_way)
    @rule(index=st.integers(0, MAX_UNDER_WAY - 1))
    def wait(self, index: int) -> None:
        self._finish(self.under_way[index % len(self.under_way)])

    @rule(seconds=st.sampled_from([1e-5, 1e-4, 1e-2]))
    def time_goes_by(self, seconds: float) -> None:
        if isinstance(self.engine, MockEngine):
            self.engine.advance(seconds)

    @rule(names=st.sets(st.sampled_from(["small", "whole", "striped"])))
    def commit(self, names: set[str]) -> None:
        while self.under_way:
            self._finish(self.under_way[0])
        slots = {name: self.store.inactive_slot(name) for name in names}
        sums = {}
        for name, slot in slots.items():
            pages = self.model[name, slot]
            if all(page is not None for page in pages):
                sums[name] = checksum(np.frombuffer(b"".join(page for page in pages if page is not None), np.uint8))
        self.step += 1
        self.store.commit(step=self.step, slots=slots, checksums=sums, state={"step": self.step})

    @rule()
    def reopen(self) -> None:
        while self.under_way:
            self._finish(self.under_way[0])
        self.store.close()
        self.model = {key: pages for key, pages in self.model.items() if key[0] != "scratch"}
        self.store = Store.open(self.folders, engine=self.engine)
        assert self.store.step == self.step
        assert self.store.notes == []

    @invariant()
    def buffers_out_are_those_under_way(self) -> None:
        if hasattr(self, "pool"):
            out = sum(max(PAGE, 1 << (u.transfer.num_bytes - 1).bit_length()) for u in self.under_way)
            assert self.pool.used_bytes == out

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            for under in list(self.under_way):
                self._finish(under)
            assert (self.engine.bytes_read, self.engine.bytes_written) == (self.num_read, self.num_written)
            for key, pages in self.model.items():
                array = self.pool.acquire(NUM_PAGES[key[0]] * PAGE).array[: NUM_PAGES[key[0]] * PAGE]
                self.engine.read(self._extent(key), array).wait()
                for index, page in enumerate(pages):
                    assert page is None or array[index * PAGE : (index + 1) * PAGE].tobytes() == page
        finally:
            self.store.close()
            self.engine.close()
            shutil.rmtree(self.folder)


ENGINES: dict[str, Callable[[], Engine]] = {
    "posix": lambda: PosixEngine(2, request_bytes=2 * PAGE),
    "mock fifo": MockEngine,
    "mock lifo": lambda: MockEngine(order="lifo"),
}


def _run(engine: str, monkeypatch: pytest.MonkeyPatch, max_examples: int, **more: Any) -> None:
    monkeypatch.setattr(striping_module, "STRIPE_BYTES", STRIPE_PAGES * PAGE)

    class Machine(IoMachine):
        make_engine = staticmethod(ENGINES[engine])

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_sample_of_interleavings(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(engine, monkeypatch, 25, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("engine", "max_examples"), [("posix", 600), ("mock fifo", 700), ("mock lifo", 700)])
def test_two_thousand_interleavings(engine: str, max_examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(engine, monkeypatch, max_examples)
