"""Tensors that wait for the backward pass: on the device, in pooled host memory, or in scratch files."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from fuyou.config import format_bytes
from fuyou.errors import PlanError
from fuyou.executor.device import Device, Ready, nothing_to_wait_for
from io_engine import BudgetError, Buffer, BufferPool, Engine, Extent, InterruptsDeferred, Transfer, round_up
from io_engine.buffers import size_class_bytes


def stretch_elements(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a tensor's first to its last in memory, with what lies between them."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class SavedTensor:
    """A tensor that was put away; `ActivationStore.load` or `take` brings it back.

    What is kept is the stretch of memory that its elements lie in, so that it comes back with the strides that it had.
    """

    def __init__(self, key: str, tensor: torch.Tensor) -> None:
        self.key = key
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.num_elements = stretch_elements(self.shape, self.stride)
        self.num_bytes = round_up(max(1, self.num_elements * self.dtype.itemsize), 4096)
        self.on_device: torch.Tensor | None = None
        self.buffer: Buffer | None = None
        self.extent: Extent | None = None
        self.transfer: Transfer | None = None
        self.ready: Ready = nothing_to_wait_for

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements of a tensor of this shape and stride, and what lies between them, in the order of memory."""
        return tensor.as_strided((self.num_elements,), (1,))

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor over what `flat` gave."""
        return flat.as_strided(self.shape, self.stride)


class ActivationStore:
    """Keeps saved tensors where they were told to wait.

    Those on the device are bounded by the plan alone. Those in host memory stay within the pool's budget; what does not
    fit goes to scratch files, as do those that are to wait there. Tensors may differ in size in any order: where no
    buffer is free, what will be needed last makes room. A scratch extent belongs to a key and is used again by it.
    """

    NUM_STAGING_BUFFERS = 2
    """Buffers left free for tensors on their way to and from the drive."""

    def __init__(
        self, *, pool: BufferPool, engine: Engine, scratch: Callable[[str, int], Extent], device: Device
    ) -> None:
        self._pool, self._engine, self._scratch, self._device = pool, engine, scratch, device
        # Dicts for their order; a step may have thousands of saved tensors.
        self._kept: dict[SavedTensor, None] = {}  # in host memory only, in the order in which they were saved
        self._writing: dict[SavedTensor, None] = {}
        self._ahead: dict[SavedTensor, None] = {}  # on the drive and read back, not yet asked for
        self._leaving: dict[SavedTensor, None] = {}  # taken, their upload under way
        self._places: dict[str, Extent] = {}
        self._upcoming: deque[SavedTensor] = deque()
        self._largest_upcoming = 0
        self.device_bytes = 0
        """Memory of tensors that wait on the device."""
        self.bytes_spilled = 0

    def save(self, key: str, tensor: torch.Tensor, place: str = "host") -> SavedTensor:
        """Put a tensor away: "keep" it on the device, in "host" memory where there is room, or on "ssd".

        It may be freed when this returns; before it is written to, `settle` it. Blocks only while staging buffers are in
        use. PlanError if the pool cannot hold it even alone.
        """
        saved = SavedTensor(key, tensor)
        if place == "keep":
            # Not the tensor itself, which autograd will tie to the graph that made it.
            saved.on_device = tensor.detach()
            self.device_bytes += saved.on_device.untyped_storage().nbytes()
            return saved
        room = self._pool.budget_bytes - self._pool.used_bytes
        stays = place == "host" and room >= (1 + self.NUM_STAGING_BUFFERS) * size_class_bytes(saved.num_bytes)
        if not stays:
            self._finish_writes(limit=self.NUM_STAGING_BUFFERS - 1)
        saved.buffer = self._acquire(saved)
        saved.ready = self._device.download(saved.flat(tensor.detach()), self._view(saved))
        if stays:
            self._kept[saved] = None
        else:
            self._spill(saved)
        return saved

    def settle(self, saved: SavedTensor) -> None:
        """The memory that was saved may be written to from here on. Blocks while a copy of it is under way."""
        if saved.on_device is not None:
            self.device_bytes -= saved.on_device.untyped_storage().nbytes()
            saved.on_device = saved.shaped(saved.flat(saved.on_device).clone())
            self.device_bytes += saved.on_device.untyped_storage().nbytes()
        else:
            saved.ready()

    def announce(self, order: Iterable[SavedTensor]) -> None:
        """What will be asked for, in order; begins to read back what is on the drive. Replaces what was announced."""
        # What is on its way out stays in memory as well: it was saved last, and is needed first.
        self._ahead |= self._writing
        self._writing.clear()
        self._upcoming = deque(saved for saved in order if saved.extent is not None)
        self._largest_upcoming = max((size_class_bytes(saved.num_bytes) for saved in self._upcoming), default=0)
        self._prefetch()

    def load(self, saved: SavedTensor) -> torch.Tensor:
        """The tensor, on the device; blocks until it is there. `free` it after use."""
        if saved.on_device is not None:
            return saved.on_device
        flat, _is_copy = self._load_flat(saved)
        self._prefetch()
        return saved.shaped(flat)

    def take(self, saved: SavedTensor) -> torch.Tensor:
        """The tensor in memory of its own on the device, which is the caller's; what was saved is given up."""
        if saved.on_device is not None:
            tensor = saved.on_device
            self.free(saved)
            return tensor
        flat, is_copy = self._load_flat(saved)
        if is_copy:
            # Its buffer is free when the upload has arrived, which nobody waits for now.
            self._leaving[saved] = None
            while len(self._leaving) > self.NUM_STAGING_BUFFERS:
                self.free(next(iter(self._leaving)))
        else:
            flat = flat.clone()
            self.free(saved)
        self._prefetch()
        return saved.shaped(flat)

    def free(self, saved: SavedTensor) -> None:
        """Forget a saved tensor, also one whose transfer failed. Idempotent."""
        for owned in (self._kept, self._ahead, self._writing, self._leaving):
            owned.pop(saved, None)
        if saved.on_device is not None:
            self.device_bytes -= saved.on_device.untyped_storage().nbytes()
            saved.on_device = None
        if saved.buffer is not None:
            if saved.transfer is not None:
                # Only its end matters: who needed the bytes has seen the error.
                with contextlib.suppress(Exception):
                    saved.transfer.wait()
            saved.ready()
            saved.buffer.release()
            saved.buffer = None
        saved.extent = None

    def finish(self) -> None:
        """A backward pass is over: give up what was taken, and forget what was announced."""
        self._upcoming.clear()
        while self._leaving:
            self.free(next(iter(self._leaving)))

    def _load_flat(self, saved: SavedTensor) -> tuple[torch.Tensor, bool]:
        """The tensor's elements on the device, and whether they have memory of their own there."""
        self._finish_writes(limit=0)
        self._kept.pop(saved, None)
        self._ahead.pop(saved, None)
        if saved.extent is not None:
            if saved.buffer is None:
                saved.buffer = self._acquire(saved)
                with InterruptsDeferred():
                    saved.transfer = self._engine.read(saved.extent, saved.buffer.array[: saved.num_bytes])
            assert saved.transfer is not None
            saved.transfer.wait()
        saved.ready()
        view = self._view(saved)
        flat, saved.ready = self._device.upload(view)
        return flat, flat.data_ptr() != view.data_ptr()

    def _prefetch(self) -> None:
        """Begin to read what is needed next, in order, as far as buffers are free; never blocks."""
        while self._upcoming:
            saved = self._upcoming[0]
            if saved.buffer is None and saved.extent is not None:  # neither there nor given up
                # One buffer stays free for `load`, which would otherwise have to give one of these up again.
                needed = size_class_bytes(saved.num_bytes) + self._largest_upcoming
                if self._pool.budget_bytes - self._pool.used_bytes < needed:
                    return
                with InterruptsDeferred():
                    saved.buffer = self._pool.acquire(saved.num_bytes, block=False)
                    saved.transfer = self._engine.read(saved.extent, saved.buffer.array[: saved.num_bytes])
                    self._ahead[saved] = None
            self._upcoming.popleft()

    def _acquire(self, saved: SavedTensor) -> Buffer:
        """A buffer for `saved`; waits for copies under way, then lets go of what is needed last."""
        while True:
            try:
                return self._pool.acquire(saved.num_bytes, block=False)
            except BudgetError as error:
                if self._leaving:
                    self.free(next(iter(self._leaving)))
                elif self._writing:
                    self._finish_writes(limit=len(self._writing) - 1)
                elif self._ahead:
                    # The newest was asked for last.
                    self._let_go(self._ahead.popitem()[0])
                elif self._kept:
                    oldest = next(iter(self._kept))
                    del self._kept[oldest]
                    self._spill(oldest)
                else:
                    raise PlanError(
                        f"a tensor that waits for the backward pass takes {format_bytes(saved.num_bytes)} "
                        f"(shape {tuple(saved.shape)}), and the {format_bytes(self._pool.budget_bytes)} that the plan has "
                        "for them do not suffice: use a smaller micro_batch_size or shorter sequences, or raise host_memory"
                    ) from error

    def _spill(self, saved: SavedTensor) -> None:
        """Start to write a tensor that is in memory to its scratch extent; its buffer goes back when that is done."""
        assert saved.buffer is not None
        saved.ready()
        place = self._places.get(saved.key)
        if place is None or place.num_bytes < saved.num_bytes:
            # Powers of two: sequences that grow bit by bit leave few places behind. Asked for once: the store answers
            # only between commits.
            place = self._scratch(f"activation/{saved.key}", 1 << (saved.num_bytes - 1).bit_length())
            self._places[saved.key] = place
        with InterruptsDeferred():
            saved.extent = place.sub(0, saved.num_bytes)
            saved.transfer = self._engine.write(saved.extent, saved.buffer.array[: saved.num_bytes])
        self.bytes_spilled += saved.num_bytes
        self._writing[saved] = None

    def _finish_writes(self, limit: int) -> None:
        """Wait until at most `limit` spilled tensors are still on their way out; their buffers go back."""
        while len(self._writing) > limit:
            oldest = next(iter(self._writing))
            del self._writing[oldest]
            self._let_go(oldest)

    def _let_go(self, saved: SavedTensor) -> None:
        """Give the buffer of a tensor that is on the drive, or on its way there, back."""
        assert saved.transfer is not None
        assert saved.buffer is not None
        try:
            saved.transfer.wait()
        finally:
            saved.buffer.release()
            saved.buffer, saved.transfer = None, None

    def _view(self, saved: SavedTensor) -> torch.Tensor:
        assert saved.buffer is not None
        flat = torch.from_numpy(saved.buffer.array[: saved.num_elements * saved.dtype.itemsize].view(np.uint8))
        return flat.view(saved.dtype)
