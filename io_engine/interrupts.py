"""Ctrl-C at a better moment: what must not be torn apart runs to its end first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from io_engine.buffers import ByteArray
from io_engine.engine import Transfer
from io_engine.extents import Extent

_Handler = Callable[[int, FrameType | None], Any]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class InterruptsDeferred:
    """A context in which SIGINT and SIGTERM wait: their handlers are called at its end, which may raise.

    For the moments between the start of a transfer and the note of who owns its memory: a KeyboardInterrupt there would
    leave memory that is being read into, and that nobody gives back, or that somebody gives to a new owner. Nothing
    inside may take long. Handlers that are not Python's keep their effect at once. Only the main thread runs handlers;
    elsewhere this does nothing. Takes some 10 us.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, _Handler] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    # Known before it is replaced: a signal may arrive between any two lines from here on.
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._arrived:
            number, frame = self._arrived[0]
            self._handlers[number](number, frame)

    def _restore(self) -> None:
        try:
            self._restore_one(signal.SIGTERM)
        finally:  # whatever the first handler makes of a signal that arrives right behind its return
            self._restore_one(signal.SIGINT)

    def _restore_one(self, number: int) -> None:
        if number in self._handlers:
            signal.signal(number, self._handlers[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))


def move_now(start: Callable[[Extent, ByteArray], Transfer], extent: Extent, array: ByteArray) -> None:
    """Start a transfer (`engine.read` or `engine.write`) and block until it has ended, by Ctrl-C too.

    The array is the caller's again whatever is raised: the OSError of a failed transfer, ValueError, KeyboardInterrupt.
    """
    transfers: list[Transfer] = []
    try:
        with InterruptsDeferred():
            transfers.append(start(extent, array))
        transfers[0].wait()
    finally:
        for transfer in transfers:
            if not transfer.done():
                transfer.wait()
