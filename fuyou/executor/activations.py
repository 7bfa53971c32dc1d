"""Tensors that pass from block to block, kept for the backward pass: in pooled host memory, or in scratch files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch

from fuyou.config import format_bytes
from fuyou.errors import PlanError
from fuyou.executor.device import Device, Ready, nothing_to_wait_for
from io_engine import BudgetError, Buffer, BufferPool, Engine, Extent, Transfer, round_up
from io_engine.buffers import size_class_bytes


class SavedTensor:
    """A tensor that was put away; `ActivationStore.load` brings it back."""

    def __init__(self, key: str, tensor: torch.Tensor) -> None:
        self.key = key
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.num_bytes = round_up(max(1, tensor.numel() * tensor.element_size()), 4096)
        self.buffer: Buffer | None = None
        self.extent: Extent | None = None
        self.transfer: Transfer | None = None
        self.ready: Ready = nothing_to_wait_for


class ActivationStore:
    """Keeps saved tensors within the pool's budget and spills the rest to the store's scratch files.

    The backward pass uses them in the reverse of the order in which they were saved. Tensors may differ in size in
    any order: where no buffer is free, what will be needed last makes room.
    """

    NUM_STAGING_BUFFERS = 2
    """Buffers left free for tensors on their way to and from the drive."""

    def __init__(
        self, *, pool: BufferPool, engine: Engine, scratch: Callable[[str, int], Extent], device: Device
    ) -> None:
        self._pool, self._engine, self._scratch, self._device = pool, engine, scratch, device
        self._kept: list[SavedTensor] = []  # in memory only, in the order in which they were saved
        self._writing: list[SavedTensor] = []
        self._ahead: list[SavedTensor] = []  # on the drive and read back, not yet asked for
        self.bytes_spilled = 0

    def save(self, key: str, tensor: torch.Tensor) -> SavedTensor:
        """Put a tensor away; it may be freed when this returns. Blocks only while staging buffers are in use.

        PlanError if the pool cannot hold it even alone.
        """
        saved = SavedTensor(key, tensor)
        room = self._pool.budget_bytes - self._pool.used_bytes
        keep = room >= (1 + self.NUM_STAGING_BUFFERS) * size_class_bytes(saved.num_bytes)
        if not keep:
            self._finish_writes(limit=1)
        saved.buffer = self._acquire(saved)
        saved.ready = self._device.download(tensor.detach(), self._view(saved))
        if keep:
            self._kept.append(saved)
        else:
            self._spill(saved)
        return saved

    def prefetch(self, saved: SavedTensor) -> None:
        """Begin reading a spilled tensor back, if a buffer is free; never blocks."""
        room = self._pool.budget_bytes - self._pool.used_bytes
        # One buffer stays free for `load`, which would otherwise have to give this one up again.
        if saved.extent is None or saved.buffer is not None or room < 2 * size_class_bytes(saved.num_bytes):
            return
        try:
            saved.buffer = self._pool.acquire(saved.num_bytes, block=False)
        except BudgetError:
            return
        saved.transfer = self._engine.read(saved.extent, saved.buffer.array[: saved.num_bytes])
        self._ahead.append(saved)

    def load(self, saved: SavedTensor) -> torch.Tensor:
        """The tensor, on the device; blocks until it is there. `free` it after use."""
        self._finish_writes(limit=0)
        if saved in self._kept:
            self._kept.remove(saved)
        if saved in self._ahead:
            self._ahead.remove(saved)
        if saved.extent is not None:
            if saved.buffer is None:
                saved.buffer = self._acquire(saved)
                saved.transfer = self._engine.read(saved.extent, saved.buffer.array[: saved.num_bytes])
            assert saved.transfer is not None
            saved.transfer.wait()
        saved.ready()
        tensor, saved.ready = self._device.upload(self._view(saved))
        return tensor

    def free(self, saved: SavedTensor) -> None:
        """Forget a saved tensor, also one whose transfer failed. Idempotent."""
        for owned in (self._kept, self._ahead, self._writing):
            if saved in owned:
                owned.remove(saved)
        if saved.buffer is not None:
            if saved.transfer is not None:
                # Only its end matters: who needed the bytes has seen the error.
                with contextlib.suppress(Exception):
                    saved.transfer.wait()
            saved.ready()
            saved.buffer.release()
            saved.buffer = None

    def _acquire(self, saved: SavedTensor) -> Buffer:
        """A buffer for `saved`; waits for writes under way, then lets go of what is needed last."""
        while True:
            try:
                return self._pool.acquire(saved.num_bytes, block=False)
            except BudgetError as error:
                if self._writing:
                    self._finish_writes(limit=len(self._writing) - 1)
                elif self._ahead:
                    # The newest was asked for last.
                    self._let_go(self._ahead.pop())
                elif self._kept:
                    self._spill(self._kept.pop(0))
                else:
                    raise PlanError(
                        f"a tensor between two blocks takes {format_bytes(saved.num_bytes)} "
                        f"(shape {tuple(saved.shape)}), and the {format_bytes(self._pool.budget_bytes)} that the plan has "
                        "for them do not suffice: use a smaller micro_batch_size or shorter sequences, or raise host_memory"
                    ) from error

    def _spill(self, saved: SavedTensor) -> None:
        """Start to write a tensor that is in memory to its scratch extent; its buffer goes back when that is done."""
        assert saved.buffer is not None
        saved.ready()
        saved.extent = self._scratch(f"activation/{saved.key}", saved.num_bytes)
        saved.transfer = self._engine.write(saved.extent, saved.buffer.array[: saved.num_bytes])
        self.bytes_spilled += saved.num_bytes
        self._writing.append(saved)

    def _finish_writes(self, limit: int) -> None:
        """Wait until at most `limit` spilled tensors are still on their way out; their buffers go back."""
        while len(self._writing) > limit:
            self._let_go(self._writing.pop(0))

    def _let_go(self, saved: SavedTensor) -> None:
        """Give the buffer of a tensor that is on the drive, or on its way there, back."""
        assert saved.transfer is not None and saved.buffer is not None
        try:
            saved.transfer.wait()
        finally:
            saved.buffer.release()
            saved.buffer, saved.transfer = None, None

    def _view(self, saved: SavedTensor) -> torch.Tensor:
        assert saved.buffer is not None
        num_bytes = saved.shape.numel() * saved.dtype.itemsize
        flat = torch.from_numpy(saved.buffer.array[:num_bytes].view(np.uint8))
        return flat.view(saved.dtype).view(saved.shape)
