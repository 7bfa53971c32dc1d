"""Ctrl-C while memory and transfer belong to nobody yet: it waits, and is not lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from io_engine import BufferPool, Extent, InterruptsDeferred, PosixEngine, Transfer, move_now

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """What the handlers of these tests raise."""


def stop(number: int, _frame: Any) -> None:
    raise Stop(number)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == [stop, stop]
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_the_end(number: int) -> None:
    reached = []
    with pytest.raises(Stop) as raised:
        with InterruptsDeferred():
            signal.raise_signal(number)
            with InterruptsDeferred():
                signal.raise_signal(number)
                reached.append("inner")
            reached.append("outer")
        reached.append("behind")
    assert raised.value.args == (number,)
    assert reached == ["inner", "outer"]


def test_an_error_inside_is_the_context_of_the_interrupt() -> None:
    with pytest.raises(Stop) as raised, InterruptsDeferred():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("inside")
    assert isinstance(raised.value.__context__, ValueError)
    with pytest.raises(ValueError, match="inside"), InterruptsDeferred():
        raise ValueError("inside")


def test_handlers_that_are_not_pythons_are_left_alone() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with InterruptsDeferred():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, stop)


def test_other_threads_leave_the_handlers_alone() -> None:
    found = []

    def look() -> None:
        with InterruptsDeferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [stop]


class Interrupting(PosixEngine):
    """Ctrl-C right before or right behind the moment at which a transfer begins, inside of `read` and `write`."""

    def __init__(self, when: str) -> None:
        super().__init__(num_threads=1)
        self.when = when
        self.begun: list[Transfer] = []

    def _submit(self, kind: Any, extent: Extent, array: Any) -> Transfer:
        if self.when == "before":
            signal.raise_signal(signal.SIGINT)
        self.begun.append(super()._submit(kind, extent, array))
        if self.when == "behind":
            signal.raise_signal(signal.SIGINT)
        return self.begun[-1]


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_buffer_goes_back_when_nothing_reads_into_it_any_more(when: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x07" * 4096)
    with Interrupting(when) as engine, BufferPool(4096, name="test") as pool:
        with pytest.raises(Stop), pool.acquire(4096) as buffer:
            move_now(engine.read, Extent(str(path), 0, 4096), buffer.array)
        assert [transfer.done() for transfer in engine.begun] == [True]
        assert pool.used_bytes == 0
