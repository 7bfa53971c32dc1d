"""Where blocks are computed, behind one small interface: the host itself, or a CUDA device with copy streams.

On the host the weights that were read are the weights that are computed with, and gradients are summed where the
optimizer reads them: uploads and downloads move nothing. On CUDA both are asynchronous copies on streams of their own;
events order them with compute, and nothing waits for the device but the thread that needs the bytes. Weights go in turn
into slots of device memory that are allocated once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from fuyou.trace import Trace

Ready = Callable[[], None]
"""Blocks until a copy has arrived."""


def nothing_to_wait_for() -> None:
    """The `Ready` of what is there already."""


class Device(Protocol):
    """What the executor asks of the place where blocks are computed."""

    torch_device: torch.device
    has_own_memory: bool
    """Whether what is uploaded is a copy, which outlives the host's memory that it was made from."""

    def upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """A device copy of pinned host memory, usable by compute issued after this call; returns at once.

        `host` must stay unchanged until the Ready returns.
        """
        ...

    def reserve_weights(self, num_bytes: Sequence[int]) -> None:
        """Make room for weights of these sizes at once, in place of what was reserved before; none may be in use."""
        ...

    def upload_weights(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """As `upload`, into memory reserved for weights; give it back with `release_weights`."""
        ...

    def release_weights(self, device: torch.Tensor) -> None:
        """Compute issued so far is the last to use these weights; their memory may be another block's now."""
        ...

    def download(self, device: torch.Tensor, host: torch.Tensor) -> Ready:
        """Copy what compute issued so far leaves in `device` into pinned `host`; returns at once."""
        ...

    def gradient_sum(self, host: torch.Tensor) -> torch.Tensor:
        """Flat memory on the device, of the same data type, in which to sum a gradient that goes to `host`."""
        ...

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Kernels that name no device run on this one inside the context."""
        ...

    def synchronize(self) -> None:
        """Block until all compute issued so far is done."""
        ...

    def timing(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Gives True if the device itself measures what is issued inside, for the trace's gpu lane."""
        ...

    def collect_spans(self) -> None:
        """Record in the trace what the device has measured and ended."""
        ...

    def peak_bytes(self) -> int:
        """Most device memory taken since the last call; 0 on the host."""
        ...


class HostDevice:
    """Compute on the CPU: no copies."""

    has_own_memory = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """`host` itself."""
        return host, nothing_to_wait_for

    def reserve_weights(self, num_bytes: Sequence[int]) -> None:
        """Weights are computed with where they were read."""

    def upload_weights(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """`host` itself."""
        return host, nothing_to_wait_for

    def release_weights(self, device: torch.Tensor) -> None:
        """Nothing was taken."""

    def download(self, device: torch.Tensor, host: torch.Tensor) -> Ready:
        """Copies unless `device` is `host`'s memory."""
        if device.data_ptr() != host.data_ptr():
            host.copy_(device)
        return nothing_to_wait_for

    def gradient_sum(self, host: torch.Tensor) -> torch.Tensor:
        """`host` itself."""
        return host

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to choose."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def timing(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """What is computed has been computed when it was issued: the caller measures."""
        return contextlib.nullcontext(False)

    def collect_spans(self) -> None:
        """Nothing measures here."""

    def peak_bytes(self) -> int:
        """0."""
        return 0


class _InFlight:
    """Bounds the bytes of copies whose device memory cannot be taken again yet.

    The host issues work far ahead of the device. Without a bound, uploads would fill the device with blocks whose turn is
    still to come, and downloads would keep what was computed long ago.
    """

    def __init__(self, least_bytes: int) -> None:
        self._limit_bytes = least_bytes
        self._entries: deque[tuple[torch.cuda.Event, int]] = deque()
        self._num_bytes = 0

    def make_room(self, num_bytes: int) -> None:
        """Block until `num_bytes` more are within the bound: two copies of the largest size seen."""
        self._limit_bytes = max(self._limit_bytes, 2 * num_bytes)
        while self._entries and self._num_bytes + num_bytes > self._limit_bytes:
            event, released = self._entries.popleft()
            event.synchronize()
            self._num_bytes -= released

    def add(self, event: torch.cuda.Event, num_bytes: int) -> None:
        """`num_bytes` are free again once `event` has passed."""
        self._entries.append((event, num_bytes))
        self._num_bytes += num_bytes


class _Timeline:
    """Spans between events of the device, in the host's time. From any thread."""

    def __init__(self, trace: Trace, now: torch.cuda.Event) -> None:
        now.synchronize()
        self._trace = trace
        self._base, self._base_seconds = now, time.perf_counter()
        self._open: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event, int]] = []
        self._lock = threading.Lock()

    def add(self, lane: str, name: str, begin: torch.cuda.Event, end: torch.cuda.Event, num_bytes: int = 0) -> None:
        """A span that ends when the device has passed `end`."""
        with self._lock:
            self._open.append((lane, name, begin, end, num_bytes))

    def collect(self) -> None:
        """Record the spans that have ended; waits for nothing."""
        with self._lock:
            flags = [span[3].query() for span in self._open]
            ended = [span for span, passed in zip(self._open, flags, strict=True) if passed]
            self._open = [span for span, passed in zip(self._open, flags, strict=True) if not passed]
            latest, latest_seconds = self._base, self._base_seconds
            for lane, name, begin, end, num_bytes in ended:
                end_seconds = self._base_seconds + self._base.elapsed_time(end) / 1e3
                begin_seconds = end_seconds - begin.elapsed_time(end) / 1e3
                self._trace.record(lane, name, begin_seconds, end_seconds, num_bytes)
                if end_seconds > latest_seconds:
                    latest, latest_seconds = end, end_seconds
            # Events tell float32 milliseconds: from a base long ago they would be coarse.
            self._base, self._base_seconds = latest, latest_seconds


class _WeightSlots:
    """Device memory for the weights of a few blocks, taken in turn: the one let go longest ago comes first.

    While compute uses one, copies into the others go on. More blocks at once than there are slots for get one more, which
    stays, so that a step like the one before allocates nothing.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._free: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._taken: dict[int, torch.Tensor] = {}

    def reserve(self, num_bytes: Sequence[int]) -> None:
        """Slots of these sizes in place of all others, none of which may be taken."""
        assert not self._taken
        self._free.clear()
        self._free.extend((self._allocate(size), None) for size in num_bytes)

    def take(self, num_bytes: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Memory of `num_bytes`, and what must have passed before it is written to."""
        found = next((slot for slot in self._free if slot[0].nbytes >= num_bytes), None)
        if found is None:
            found = (self._allocate(num_bytes), None)
        else:
            self._free.remove(found)
        memory, released = found
        self._taken[memory.data_ptr()] = memory
        return memory[:num_bytes], released

    def give_back(self, address: int, released: torch.cuda.Event) -> None:
        """The memory at `address` may be taken; who writes to it waits for `released`."""
        self._free.append((self._taken.pop(address), released))


class CudaDevice:
    """Compute on a CUDA device; one stream for each direction of copies."""

    has_own_memory = True
    LEAST_IN_FLIGHT_BYTES = 64 * 2**20
    """Small copies (activations) may be this far ahead in all."""

    def __init__(self, device: str, trace: Trace) -> None:
        self.torch_device = torch.device(device if ":" in device else f"{device}:{torch.cuda.current_device()}")
        self._h2d = torch.cuda.Stream(self.torch_device)
        self._d2h = torch.cuda.Stream(self.torch_device)
        self._uploads, self._downloads = _InFlight(self.LEAST_IN_FLIGHT_BYTES), _InFlight(self.LEAST_IN_FLIGHT_BYTES)
        self._uploaded_bytes = 0
        now = torch.cuda.Event(enable_timing=True)
        now.record(torch.cuda.current_stream(self.torch_device))
        self._timeline = _Timeline(trace, now)
        self._slots = _WeightSlots(
            lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        )

    def upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """Copy on the h2d stream; the compute stream waits for it, the host does not."""
        compute = torch.cuda.current_stream(self.torch_device)
        # What was uploaded before is used up, at the earliest, when compute has passed what is issued until now.
        issued = torch.cuda.Event()
        issued.record(compute)
        self._uploads.add(issued, self._uploaded_bytes)
        self._uploads.make_room(host.nbytes)
        self._uploaded_bytes = host.nbytes
        with torch.cuda.stream(self._h2d):
            device = torch.empty(host.shape, dtype=host.dtype, device=self.torch_device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self._h2d)
            self._copy(device, host)
            end.record(self._h2d)
        compute.wait_event(end)
        # The allocator may hand this memory to the h2d stream again only when compute has passed this use.
        device.record_stream(compute)
        return device, self._ready("h2d", begin, end, host.nbytes)

    def reserve_weights(self, num_bytes: Sequence[int]) -> None:
        """Waits for the device, if there were others before."""
        self.synchronize()
        self._slots.reserve(num_bytes)

    def upload_weights(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """Copy on the h2d stream, behind the last use of the slot; the compute stream waits for it, the host does not."""
        memory, released = self._slots.take(host.nbytes)
        device = memory.view(host.dtype)
        if released is not None:
            self._h2d.wait_event(released)
        else:  # new memory: the allocator may have got it back from compute that is under way
            self._h2d.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._h2d):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self._h2d)
            self._copy(device, host)
            end.record(self._h2d)
        torch.cuda.current_stream(self.torch_device).wait_event(end)
        return device, self._ready("h2d", begin, end, host.nbytes)

    def release_weights(self, device: torch.Tensor) -> None:
        """The next copy into this slot waits for compute to have passed this point."""
        released = torch.cuda.Event()
        released.record(torch.cuda.current_stream(self.torch_device))
        self._slots.give_back(device.data_ptr(), released)

    @staticmethod
    def _copy(to: torch.Tensor, of: torch.Tensor) -> None:
        """On the current stream."""
        to.copy_(of, non_blocking=True)

    def download(self, device: torch.Tensor, host: torch.Tensor) -> Ready:
        """Copy on the d2h stream once compute has written `device`."""
        compute = torch.cuda.current_stream(self.torch_device)
        self._downloads.make_room(host.nbytes)
        self._d2h.wait_stream(compute)
        with torch.cuda.stream(self._d2h):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self._d2h)
            self._copy(host, device)
            end.record(self._d2h)
        device.record_stream(self._d2h)
        self._downloads.add(end, host.nbytes)
        return self._ready("d2h", begin, end, host.nbytes)

    def gradient_sum(self, host: torch.Tensor) -> torch.Tensor:
        """Memory of the device, from torch's caching allocator."""
        return torch.empty(host.shape, dtype=host.dtype, device=self.torch_device)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """As torch.cuda.device; autograd's own thread may have another current device."""
        return torch.cuda.device(self.torch_device)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.torch_device)

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[bool]:
        """Between two events on the compute stream: what the host takes to issue work is not counted."""
        compute = torch.cuda.current_stream(self.torch_device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(compute)
        yield True
        end.record(compute)
        self._timeline.add("gpu", name, begin, end)

    def collect_spans(self) -> None:
        """Of compute and of copies; what is still under way is left for the next call."""
        self._timeline.collect()

    def peak_bytes(self) -> int:
        """Peak of torch's allocator since the last call."""
        peak = int(torch.cuda.max_memory_reserved(self.torch_device))
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return peak

    def _ready(self, lane: str, begin: torch.cuda.Event, end: torch.cuda.Event, num_bytes: int) -> Ready:
        self._timeline.add(lane, lane, begin, end, num_bytes)
        return end.synchronize


def make_device(device: str, trace: Trace) -> Device:
    """The device of a config's name."""
    return HostDevice() if device == "cpu" else CudaDevice(device, trace)
