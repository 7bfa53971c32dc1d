"""Copies on CUDA's streams, played on the CPU: work of each stream runs late, in any order that events allow."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fuyou.executor.device import CudaDevice, _WeightSlots
from fuyou.executor.weights import NUM_ON_DEVICE
from fuyou.trace import Trace

SIZES = (4096, 3072, 2048, 2048, 1024, 2048, 4096, 1024)
"""Of blocks, in the order in which they are visited."""


class FakeCuda:
    """What of torch.cuda a device uses. Nothing runs before `run`, or before somebody waits for an event."""

    def __init__(self, choose: random.Random, forgotten: str | None = None) -> None:
        self.choose, self.forgotten = choose, forgotten
        self.streams: list[FakeStream] = []
        self.compute = FakeStream(self, "compute")
        self.current = self.compute
        self.milliseconds = 0.0

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Run queued work of randomly chosen streams, each in its order, until nothing is left."""
        while not until():
            ready = [stream for stream in self.streams if stream.can_go_on()]
            if not ready:
                assert not any(stream.queue for stream in self.streams), "streams wait for each other"
                return
            self.milliseconds += 1.0
            self.choose.choice(ready).queue.popleft()[1]()

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        outer, self.current = self.current, stream
        yield
        self.current = outer


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.queue: deque[tuple[FakeEvent | None, Callable[[], Any]]] = deque()
        cuda.streams.append(self)

    def can_go_on(self) -> bool:
        return bool(self.queue) and (self.queue[0][0] is None or self.queue[0][0].passed)

    def wait_event(self, event: FakeEvent) -> None:
        if self.cuda.forgotten != self.name:
            self.queue.append((event, lambda: None))

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent(self.cuda)
        event.record(other)
        self.wait_event(event)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.passed, self.at_milliseconds = cuda, False, 0.0

    def record(self, stream: FakeStream) -> None:
        stream.queue.append((None, self._pass))

    def _pass(self) -> None:
        self.passed, self.at_milliseconds = True, self.cuda.milliseconds

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.cuda.run(lambda: self.passed)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.passed
        assert other.passed
        return other.at_milliseconds - self.at_milliseconds


class FakeDevice(CudaDevice):
    """The device's own code; its copies are queued on the fake's current stream."""

    cuda: FakeCuda

    @classmethod
    def _copy(cls, to: torch.Tensor, of: torch.Tensor) -> None:  # type: ignore[override]
        cls.cuda.current.queue.append((None, lambda: to.copy_(of)))


def played(
    monkeypatch: pytest.MonkeyPatch, seed: int, forgotten: str | None = None, trace: Trace | None = None
) -> tuple[FakeDevice, FakeCuda]:
    cuda = FakeCuda(random.Random(seed), forgotten)
    made = iter(("h2d", "d2h"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: FakeStream(cuda, next(made)))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_options: FakeEvent(cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: cuda.current)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: cuda.run())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _tensor, _stream: None)
    monkeypatch.setattr(FakeDevice, "cuda", cuda, raising=False)
    return FakeDevice("cpu:0", trace or Trace()), cuda


def wrong_blocks(device: FakeDevice, cuda: FakeCuda, num_passes: int = 3) -> int:
    """Visit blocks as a forward and backward pass do; how often compute, or a download, saw another block's bytes."""
    wrong: list[int] = []
    downloads: list[tuple[Callable[[], None], torch.Tensor, int]] = []
    device.reserve_weights(sorted(SIZES, reverse=True)[:NUM_ON_DEVICE])
    for turn in range(num_passes):
        order = list(enumerate(SIZES))
        for number, size in order if turn % 2 == 0 else reversed(order):
            value = 10 * turn + number + 1
            host = torch.full((size // 4,), float(value))
            weights, _ready = device.upload_weights(host)
            gradient = torch.zeros(16)

            def compute(weights: Any = weights, gradient: Any = gradient, value: int = value) -> None:
                if not bool((weights == value).all()):
                    wrong.append(value)
                gradient.fill_(value)

            cuda.compute.queue.append((None, compute))
            device.release_weights(weights)
            to = torch.zeros(16)
            downloads.append((device.download(gradient, to), to, value))
    for ready, to, value in downloads:
        ready()
        if not bool((to == value).all()):
            wrong.append(value)
    cuda.run()
    return len(wrong)


@pytest.mark.parametrize("seed", range(20))
def test_compute_sees_its_block_whatever_runs_first(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    device, cuda = played(monkeypatch, seed)
    assert wrong_blocks(device, cuda) == 0


@pytest.mark.parametrize("forgotten", ["h2d", "compute", "d2h"])
def test_each_missing_wait_is_found_out(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """h2d would write over what compute still reads, compute begin before its weights, d2h before the gradient."""
    found = [wrong_blocks(*played(monkeypatch, seed, forgotten)) for seed in range(5)]
    assert all(found)


def test_a_step_like_the_one_before_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda = played(monkeypatch, 0)
    allocated: list[int] = []
    allocate = device._slots._allocate

    def count(num_bytes: int) -> torch.Tensor:
        allocated.append(num_bytes)
        return allocate(num_bytes)

    device._slots = _WeightSlots(count)
    assert wrong_blocks(device, cuda) == 0
    assert allocated == [4096, 4096, 3072]


def test_more_blocks_at_once_get_one_more_slot_which_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda = played(monkeypatch, 0)
    device.reserve_weights([1024])
    for _ in range(2):
        taken = [device.upload_weights(torch.full((256,), value))[0] for value in (1.0, 2.0)]
        cuda.run()
        assert [float(weights[0]) for weights in taken] == [1.0, 2.0]
        for weights in taken:
            device.release_weights(weights)
        assert len(device._slots._free) == 2


def test_lanes_are_measured_by_the_device_not_by_who_issues(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace()
    device, cuda = played(monkeypatch, 0, trace=trace)
    device.reserve_weights([1024])
    begun = cuda.milliseconds
    for step in range(2):
        with device.timing("layer 0 forward") as measured:
            assert measured
            cuda.compute.queue.extend([(None, lambda: None)] * 7)
        weights, _ready = device.upload_weights(torch.zeros(256))
        device.release_weights(weights)
        device.collect_spans()  # nothing has run yet
        assert trace.end_step(step, 0.0, 1.0).spans == ()
        cuda.run()
        device.collect_spans()
        spans = {span.lane: span for span in trace.end_step(step, 0.0, 1.0).spans}
        assert spans.keys() == {"gpu", "h2d"}
        assert spans["h2d"].num_bytes == 1024
        seconds = spans["gpu"].ended_seconds - spans["gpu"].started_seconds
        assert 0.0075 < seconds < 1e-3 * (cuda.milliseconds - begun)
        device.collect_spans()
        assert trace.end_step(step, 0.0, 1.0).spans == ()
