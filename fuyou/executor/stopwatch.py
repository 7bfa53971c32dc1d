"""Spans of the thread that issues compute: what it computes, and what it waits for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from fuyou.executor.device import Device
from fuyou.trace import WAIT_LANE, Trace

LEAST_WAIT_SECONDS = 1e-3
"""Shorter waits are left out of traces."""


class Stopwatch:
    """Records them in a trace."""

    def __init__(self, device: Device, trace: Trace) -> None:
        self._device, self._trace = device, trace

    @contextlib.contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """What is issued inside is a span of this name on the gpu lane."""
        started = time.perf_counter()
        with self._device.timing(name) as measured:
            yield
        if not measured:
            self._trace.record("gpu", name, started, time.perf_counter())

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Whatever compute loses inside, it loses to waiting for `what`."""
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        if ended - started >= LEAST_WAIT_SECONDS:
            self._trace.record(WAIT_LANE, what, started, ended)
