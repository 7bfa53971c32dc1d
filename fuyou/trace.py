"""Spans of work on the lanes of a step, measured: who was busy when, with how many bytes."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fuyou.html import lanes_picture
from io_engine import Engine, Extent, Transfer

LANES = ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu")
"""gpu: forward and backward compute, on whichever device; cpu: the optimizer's arithmetic."""
WAIT_LANE = "wait"
"""No lane of work: what issues compute waits here, each span named by what for. Lies in the gaps of gpu, or on a GPU beside
what was issued before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one lane, in seconds of time.perf_counter."""

    lane: str
    name: str
    started_seconds: float
    ended_seconds: float
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """All spans of one optimizer step, from its first forward pass to the next step's."""

    step: int
    started_seconds: float
    ended_seconds: float
    spans: tuple[Span, ...]

    def lane_seconds(self) -> dict[str, float]:
        """Per lane, the seconds in which at least one span was open."""
        return {lane: _busy(s for s in self.spans if s.lane == lane) for lane in LANES}

    def limiting_lane(self) -> str:
        """The lane that was busy longest."""
        seconds = self.lane_seconds()
        return max(LANES, key=lambda lane: seconds[lane])

    def _repr_html_(self) -> str:
        begin, end = self.started_seconds, self.ended_seconds
        spans: dict[str, list[tuple[float, float, str]]] = {}
        for s in self.spans:
            spans.setdefault(s.lane, []).append(
                (max(s.started_seconds, begin) - begin, min(s.ended_seconds, end) - begin, s.name)
            )
        waiting = {WAIT_LANE: _busy(s for s in self.spans if s.lane == WAIT_LANE)}
        return lanes_picture(f"step {self.step}", end - begin, spans, self.lane_seconds() | waiting)

    def to_json(self) -> dict[str, Any]:
        """The trace as JSON, times in seconds from the step's start."""
        return {
            "step": self.step,
            "seconds": self.ended_seconds - self.started_seconds,
            "spans": [
                {
                    "lane": s.lane,
                    "name": s.name,
                    "start": s.started_seconds - self.started_seconds,
                    "end": s.ended_seconds - self.started_seconds,
                    "bytes": s.num_bytes,
                }
                for s in self.spans
            ],
        }


def _busy(spans: Iterable[Span]) -> float:
    total, until = 0.0, float("-inf")
    for start, end in sorted((s.started_seconds, s.ended_seconds) for s in spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


class Trace:
    """Collects spans from any thread and keeps those of the last `num_steps_kept` steps."""

    def __init__(self, num_steps_kept: int = 4) -> None:
        self.steps: deque[StepTrace] = deque(maxlen=num_steps_kept)
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def _repr_html_(self) -> str:
        return self.steps[-1]._repr_html_() if self.steps else "no step was taken yet"

    def record(self, lane: str, name: str, started: float, ended: float, num_bytes: int = 0) -> None:
        """Add a span; callable from any thread."""
        with self._lock:
            self._spans.append(Span(lane, name, started, ended, num_bytes))

    def end_step(self, step: int, started: float, ended: float) -> StepTrace:
        """Close a step: the spans recorded since the last one become its trace."""
        with self._lock:
            spans, self._spans = self._spans, []
        self.steps.append(StepTrace(step, started, ended, tuple(spans)))
        return self.steps[-1]


class TracingEngine:
    """An engine that records every transfer of another one in a trace; otherwise that engine."""

    def __init__(self, engine: Engine, trace: Trace) -> None:
        self._engine, self._trace = engine, trace

    def read(self, extent: Extent, array: npt.NDArray[np.uint8]) -> Transfer:
        """See `Engine.read`."""
        transfer = self._engine.read(extent, array)
        transfer.add_done_callback(self._done)
        return transfer

    def write(self, extent: Extent, array: npt.NDArray[np.uint8]) -> Transfer:
        """See `Engine.write`."""
        transfer = self._engine.write(extent, array)
        transfer.add_done_callback(self._done)
        return transfer

    def _done(self, transfer: Transfer) -> None:
        lane = "ssd_read" if transfer.kind == "read" else "ssd_write"
        self._trace.record(lane, transfer.kind, transfer.started_seconds, transfer.ended_seconds, transfer.num_bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
