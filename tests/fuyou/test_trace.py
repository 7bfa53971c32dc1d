"""Spans, lanes, and the engine that records its transfers."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from fuyou.trace import LANES, StepTrace, Trace, TracingEngine
from io_engine import BufferPool, Extent, PosixEngine


def test_overlapping_spans_of_a_lane_count_once() -> None:
    """Lanes are busy while at least one span is open."""
    trace = Trace()
    for started, ended in ((0.0, 2.0), (1.0, 3.0), (1.5, 1.75), (5.0, 6.0)):
        trace.record("ssd_read", "read", started, ended, 10)
    trace.record("cpu", "adam", 0.0, 3.5)
    step = trace.end_step(1, 0.0, 6.0)
    assert step.lane_seconds() == dict.fromkeys(LANES, 0.0) | {"ssd_read": 4.0, "cpu": 3.5}
    assert step.limiting_lane() == "ssd_read"


def test_steps_take_their_spans_and_old_ones_go() -> None:
    """A span belongs to the step that ends after it was recorded; a bounded number of steps is kept."""
    trace = Trace(num_steps_kept=2)
    for number in range(4):
        trace.record("gpu", f"span {number}", number, number + 1)
        trace.end_step(number, number, number + 1)
    assert [step.step for step in trace.steps] == [2, 3]
    assert [[span.name for span in step.spans] for step in trace.steps] == [["span 2"], ["span 3"]]


def test_json_counts_from_the_step() -> None:
    """Times in seconds from the step's start."""
    trace = Trace()
    trace.record("h2d", "h2d", 10.5, 11.0, 4096)
    step = trace.end_step(7, 10.0, 12.0)
    assert json.loads(json.dumps(step.to_json())) == {
        "step": 7,
        "seconds": 2.0,
        "spans": [{"lane": "h2d", "name": "h2d", "start": 0.5, "end": 1.0, "bytes": 4096}],
    }


def test_an_empty_step() -> None:
    """Nothing was busy."""
    step = StepTrace(0, 0.0, 1.0, ())
    assert set(step.lane_seconds().values()) == {0.0}


def test_threads_lose_no_span() -> None:
    """Workers record beside the main thread that ends steps."""
    trace = Trace(num_steps_kept=10_000)
    threads = [
        threading.Thread(target=lambda: [trace.record("cpu", "x", 0.0, 1.0) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for number in range(50):
        trace.end_step(number, 0.0, 1.0)
    for thread in threads:
        thread.join()
    trace.end_step(50, 0.0, 1.0)
    assert sum(len(step.spans) for step in trace.steps) == 2000


def test_transfers_are_recorded_with_their_bytes(tmp_path: Path) -> None:
    """Failed ones too, since they took their time; everything else is the engine's own."""
    trace = Trace()
    (tmp_path / "file").write_bytes(bytes(8192))
    with PosixEngine() as inner, BufferPool(2 * 2**20, name="test") as pool, pool.acquire(4096) as buffer:
        engine = TracingEngine(inner, trace)
        extent = Extent(str(tmp_path / "file"), 0, 4096)
        array = buffer.array[:4096]
        engine.write(extent, array).wait()
        engine.read(extent, array).wait()
        with pytest.raises(OSError, match="missing"):
            engine.read(Extent(str(tmp_path / "missing"), 0, 4096), array).wait()
        assert engine.bytes_read == inner.bytes_read
    spans = trace.end_step(0, 0.0, 1.0).spans
    assert [(span.lane, span.num_bytes) for span in spans][:2] == [("ssd_write", 4096), ("ssd_read", 4096)]
    assert all(span.ended_seconds >= span.started_seconds for span in spans)
