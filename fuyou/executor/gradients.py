"""Gradients on their way out: summed in float32 on the device over all micro-batches, then handed to the optimizer.

Where there is one micro-batch in bfloat16 nothing is summed, and bfloat16 holds every bit: half of the bytes to copy, to measure,
to spill and to read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from fuyou.blocks import Block
from fuyou.building import StreamedParameter
from fuyou.errors import ModelError
from fuyou.executor.bound import BoundWeights
from fuyou.executor.device import Device
from fuyou.executor.stopwatch import Stopwatch
from optim import OffloadedAdamW, ShardGradient, ShardLayout


class _OpenGradient:
    """A shard's gradient while it is being summed on the device, flat."""

    def __init__(self, gradient: ShardGradient, device: Device) -> None:
        self.gradient, self._device = gradient, device
        self.flat = device.gradient_sum(self.host)

    @property
    def host(self) -> torch.Tensor:
        """Where it goes."""
        host = torch.from_numpy(self.gradient.array)
        return host if host.dtype == torch.float32 else host.view(torch.bfloat16)

    def widen(self) -> None:
        """Make it float32, with the same values."""
        if self.flat.dtype == torch.float32:
            return
        narrow = self.flat
        self.gradient.widen()
        self.flat = self._device.gradient_sum(self.host)
        if self._device.has_own_memory:
            self.flat.copy_(narrow)


class GradientSums:
    """Takes each parameter's gradient as autograd finishes it, so that none waits in `p.grad`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, ShardLayout],
        blocks: Mapping[str, Block],
        bound: BoundWeights,
        device: Device,
        stopwatch: Stopwatch,
    ) -> None:
        self._parameters, self._layouts, self._blocks = parameters, dict(layouts), blocks
        self._bound, self._device, self._stopwatch = bound, device, stopwatch
        self._borrowed = {shard for block in blocks.values() for shard in block.borrows}
        self._slots = {slot.name: (name, slot) for name, layout in layouts.items() for slot in layout.parameters}
        self._adapters: dict[str, tuple[ShardLayout, ...]] = {}
        """By block, shards of trained parameters in its modules that are not streamed."""
        self._watched: set[str] = set()
        self._open: dict[str, _OpenGradient] = {}
        self.optimizer: OffloadedAdamW | None = None
        self.watch(parameters)

    def __len__(self) -> int:
        return len(self._open)

    def watch(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the gradients of those that require one now; what is watched already stays so."""
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in self._watched:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, name))
                self._watched.add(name)

    def train_adapters(
        self, adapters: Mapping[str, Sequence[ShardLayout]], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Hand over the gradients of these shards too: by block, of parameters that are always in memory."""
        self._adapters = {block: tuple(layouts) for block, layouts in adapters.items()}
        for layout in (layout for layouts in adapters.values() for layout in layouts):
            self._layouts[layout.name] = layout
            for slot in layout.parameters:
                self._slots[slot.name] = (layout.name, slot)
        self.watch(parameters)

    def has_trained(self, block: str) -> bool:
        """Whether something in the block is trained: weights that are streamed, or adapters."""
        assert self.optimizer is not None
        return self.optimizer.trains(block) or block in self._adapters

    def has_adapters(self, block: str) -> bool:
        """Whether adapters in the block are trained."""
        return block in self._adapters

    def open(self, block_name: str, *, once: bool) -> None:
        """Make room to sum the gradients of a block's trainable parameters, borrowed ones included.

        `once`: each of them, if it is not borrowed, will come once, of one micro-batch. (More may come, at a price.)
        """
        assert self.optimizer is not None
        block = self._blocks[block_name]
        for shard in (block_name, *block.borrows, *(layout.name for layout in self._adapters.get(block_name, ()))):
            if shard not in self._layouts or shard in self._open or not self.optimizer.trains(shard):
                continue
            narrow = once and shard not in self._borrowed and self._layouts[shard].compute_dtype == "bfloat16"
            with self._stopwatch.waiting(f"memory for the gradient of {shard}"):
                gradient = self.optimizer.acquire_gradient(shard, np.uint16 if narrow else np.float32)
            self._open[shard] = _OpenGradient(gradient, self._device)
            # Behind it: Ctrl-C may come here, and what is open is given back then.
            self._bound.stream.read_ahead()
        self.optimizer.expect_gradient(block_name)

    def complete(self, name: str) -> None:
        """All micro-batches are through: the shard's gradient and its weights go to the optimizer."""
        assert self.optimizer is not None
        for layout in self._adapters.get(name, ()):
            self.complete(layout.name)
        if name not in self._open:
            return
        early = self.optimizer.updates_early(name)
        if early and name not in self._bound:
            self._bound.bind(name)  # before anything is taken from `_open`: if it fails, `drop` gives the gradient back
        open_ = self._open.pop(name)
        wait = self._device.download(open_.flat, open_.host)
        if not early:
            self.optimizer.gradient_complete(open_.gradient, wait=wait)
            return
        shard = self._bound.hand_over(name)

        def arrived() -> None:
            # The update writes into the memory that the weights were uploaded from.
            shard.uploaded()
            wait()

        self.optimizer.gradient_complete(
            open_.gradient, shard.array, wait=arrived, on_done=lambda: self._bound.stream.end_use(shard)
        )

    def scale(self, factor: float) -> None:
        """Multiply everything that has arrived."""
        for name, open_ in self._open.items():
            for slot in self._layouts[name].parameters:
                if slot.name in open_.gradient.arrived:
                    open_.widen()
                    open_.flat[slot.start : slot.stop] *= factor

    def drop(self) -> None:
        """Give up what is being summed."""
        for open_ in self._open.values():
            open_.gradient.buffer.release()
        self._open.clear()

    def _arrived(self, name: str, parameter: torch.Tensor) -> None:
        """A parameter's gradient is whole for one micro-batch: add it to the sum and free it."""
        self._bound.stream.read_ahead()
        shard, slot = self._slots[name]
        open_ = self._open.get(shard)
        assert isinstance(parameter, StreamedParameter)
        gradient = parameter.take_gradient()
        assert gradient is not None
        if open_ is None or (shard not in self._bound and name in self._parameters):
            raise ModelError(
                f"{name} got a gradient while its weights were on the drive: this model uses it outside of the block that "
                "owns it, which cannot be streamed"
            )
        is_first = name not in open_.gradient.arrived
        if not is_first or gradient.dtype != open_.flat.dtype:  # torch's `grad_dtype`
            open_.widen()
        total = open_.flat[slot.start : slot.stop].view(slot.shape)
        if is_first:
            total.copy_(gradient)
            open_.gradient.arrived.add(name)
        else:
            total.add_(gradient)
