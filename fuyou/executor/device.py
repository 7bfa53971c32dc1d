"""Where blocks are computed, behind one small interface: the host itself, or a CUDA device with copy streams.

On the host the weights that were read are the weights that are computed with, and gradients are summed where the
optimizer reads them: `upload` and `download` move nothing. On CUDA both are asynchronous copies on streams of their
own; events order them with compute, and nothing waits for the device but the thread that needs the bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
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

    def upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """A device copy of pinned host memory, usable by compute issued after this call; returns at once.

        `host` must stay unchanged until the Ready returns.
        """
        ...

    def download(self, device: torch.Tensor, host: torch.Tensor) -> Ready:
        """Copy what compute issued so far leaves in `device` into pinned `host`; returns at once."""
        ...

    def gradient_sum(self, host: torch.Tensor) -> torch.Tensor:
        """Flat float32 memory on the device in which to sum a gradient that goes to `host`."""
        ...

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Kernels that name no device run on this one inside the context."""
        ...

    def synchronize(self) -> None:
        """Block until all compute issued so far is done."""
        ...

    def peak_bytes(self) -> int:
        """Most device memory taken since the last call; 0 on the host."""
        ...


class HostDevice:
    """Compute on the CPU: no copies."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """`host` itself."""
        return host, nothing_to_wait_for

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


class CudaDevice:
    """Compute on a CUDA device; one stream for each direction of copies."""

    LEAST_IN_FLIGHT_BYTES = 64 * 2**20
    """Small copies (activations) may be this far ahead in all."""

    def __init__(self, device: str, trace: Trace) -> None:
        self.torch_device = torch.device(device if ":" in device else f"{device}:{torch.cuda.current_device()}")
        self._trace = trace
        self._h2d = torch.cuda.Stream(self.torch_device)
        self._d2h = torch.cuda.Stream(self.torch_device)
        self._uploads, self._downloads = _InFlight(self.LEAST_IN_FLIGHT_BYTES), _InFlight(self.LEAST_IN_FLIGHT_BYTES)
        self._uploaded_bytes = 0

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
            device.copy_(host, non_blocking=True)
            end.record(self._h2d)
        compute.wait_event(end)
        # The allocator may hand this memory to the h2d stream again only when compute has passed this use.
        device.record_stream(compute)
        return device, self._ready("h2d", begin, end, host.nbytes)

    def download(self, device: torch.Tensor, host: torch.Tensor) -> Ready:
        """Copy on the d2h stream once compute has written `device`."""
        compute = torch.cuda.current_stream(self.torch_device)
        self._downloads.make_room(host.nbytes)
        self._d2h.wait_stream(compute)
        with torch.cuda.stream(self._d2h):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self._d2h)
            host.copy_(device, non_blocking=True)
            end.record(self._d2h)
        device.record_stream(self._d2h)
        self._downloads.add(end, host.nbytes)
        return self._ready("d2h", begin, end, host.nbytes)

    def gradient_sum(self, host: torch.Tensor) -> torch.Tensor:
        """Memory of the device, from torch's caching allocator."""
        return torch.empty(host.shape, dtype=torch.float32, device=self.torch_device)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """As torch.cuda.device; autograd's own thread may have another current device."""
        return torch.cuda.device(self.torch_device)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.torch_device)

    def peak_bytes(self) -> int:
        """Peak of torch's allocator since the last call."""
        peak = int(torch.cuda.max_memory_reserved(self.torch_device))
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return peak

    def _ready(self, lane: str, begin: torch.cuda.Event, end: torch.cuda.Event, num_bytes: int) -> Ready:
        seen = False

        def ready() -> None:
            nonlocal seen
            end.synchronize()
            if not seen:
                seen = True
                ended = time.perf_counter()
                self._trace.record(lane, lane, ended - begin.elapsed_time(end) / 1e3, ended, num_bytes)

        return ready


def make_device(device: str, trace: Trace) -> Device:
    """The device of a config's name."""
    return HostDevice() if device == "cpu" else CudaDevice(device, trace)
