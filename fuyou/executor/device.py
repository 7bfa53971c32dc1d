"""Where blocks are computed, behind one small interface: the host itself, or a CUDA device with copy streams.

On the host the weights that were read are the weights that are computed with, and gradients are summed where the
optimizer reads them: `upload` and `download` move nothing. On CUDA both are asynchronous copies on streams of their
own; events order them with compute, and nothing waits for the device but the thread that needs the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

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

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def peak_bytes(self) -> int:
        """0."""
        return 0


class CudaDevice:
    """Compute on a CUDA device; one stream for each direction of copies."""

    def __init__(self, device: str, trace: Trace) -> None:
        self.torch_device = torch.device(device if ":" in device else f"{device}:{torch.cuda.current_device()}")
        self._trace = trace
        self._h2d = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._d2h = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        """Copy on the h2d stream; the compute stream waits for it, the host does not."""
        compute = torch.cuda.current_stream(self.torch_device)
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
        self._d2h.wait_stream(compute)
        with torch.cuda.stream(self._d2h):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self._d2h)
            host.copy_(device, non_blocking=True)
            end.record(self._d2h)
        device.record_stream(self._d2h)
        return self._ready("d2h", begin, end, host.nbytes)

    def gradient_sum(self, host: torch.Tensor) -> torch.Tensor:
        """Memory of the device, from torch's caching allocator."""
        return torch.empty(host.shape, dtype=torch.float32, device=self.torch_device)

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
