"""Weights under the model's parameters: bound while a block is computed, placeholders otherwise.

Graphs that outlive their block's visit hold references to weights, not views: by the time of the backward pass the memory
under them is another block's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fuyou.blocks import Block
from fuyou.building import placeholder
from fuyou.errors import ModelError
from fuyou.executor.stopwatch import Stopwatch
from fuyou.executor.weights import LoadedShard, WeightStream
from fuyou.memory import FreedMemory
from optim import ShardLayout


@dataclasses.dataclass(frozen=True)
class _WeightView:
    """What a graph keeps instead of a view of weights, whose memory is not theirs for long."""

    shard: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class BoundWeights:
    """The shards whose weights the parameters hold now, each counted as often as it was bound."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, ShardLayout],
        blocks: Mapping[str, Block],
        stopwatch: Stopwatch,
        freed: FreedMemory,
    ) -> None:
        self._parameters, self._layouts, self._blocks = parameters, dict(layouts), blocks
        self._stopwatch, self._freed = stopwatch, freed
        self.stream: WeightStream
        """Where they come from."""
        self._bound: dict[str, tuple[LoadedShard, int]] = {}

    def __contains__(self, shard: str) -> bool:
        return shard in self._bound

    def __len__(self) -> int:
        return len(self._bound)

    def shards_of(self, block_name: str) -> list[str]:
        """What a block computes with, in the order in which it is bound: what it borrows, then its own."""
        block = self._blocks[block_name]
        return [shard for shard in (*block.borrows, block_name) if shard in self._layouts]

    @contextlib.contextmanager
    def block(self, name: str) -> Iterator[None]:
        """The block's parameters, and those that it borrows, hold their weights inside this context."""
        bound: list[str] = []
        try:
            for shard in self.shards_of(name):
                self.bind(shard)
                bound.append(shard)
            yield
        finally:
            for shard in bound:
                self._unbind(shard)
            self._freed.return_excess()

    def bind(self, name: str) -> None:
        """Once more; blocks until the weights are there."""
        if name in self._bound:
            shard, count = self._bound[name]
            self._bound[name] = (shard, count + 1)
            return
        with self._stopwatch.waiting(f"weights of {name}"):
            shard = self.stream.acquire(name)
        assert shard.device_weights is not None
        for slot in shard.layout.parameters:
            self._parameters[slot.name].data = shard.device_weights[slot.start : slot.stop].view(slot.shape)
        self._bound[name] = (shard, 1)

    def _unbind(self, name: str) -> None:
        if name not in self._bound:  # handed over to the optimizer
            return
        shard, count = self._bound[name]
        if count > 1:
            self._bound[name] = (shard, count - 1)
            return
        self._placeholders(shard.layout)
        del self._bound[name]
        self.stream.release(shard)

    def _placeholders(self, layout: ShardLayout) -> None:
        for slot in layout.parameters:
            parameter = self._parameters[slot.name]
            parameter.data = placeholder(slot.shape, parameter.dtype, parameter.device)

    def hand_over(self, name: str) -> LoadedShard:
        """Bound once, the shard goes to an update that writes into its weights; the update's end calls `stream.end_use`."""
        shard, _count = self._bound.pop(name)
        self._placeholders(shard.layout)
        self.stream.hand_over(shard)
        return shard

    def reset(self) -> None:
        """After a Ctrl-C, which may have come between taking weights and noting it; nothing may be running."""
        while self._bound:
            shard, _count = self._bound.popitem()[1]
            self._placeholders(shard.layout)
        self.stream.reset()

    def drop(self) -> None:
        """Let everything go, however often it was bound."""
        for name in list(self._bound):
            shard, _count = self._bound.pop(name)
            self._placeholders(shard.layout)
            self.stream.release(shard)

    def not_kept(self) -> contextlib.AbstractContextManager[Any]:
        """Graphs made inside hold no memory of weights, which are bound anew, elsewhere, for the backward pass.

        Autograd would keep views of them (a linear layer's transposed weight), and use what has come into that memory since.
        """
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _WeightView:
        address = tensor.untyped_storage().data_ptr()
        for name, (shard, _count) in self._bound.items():
            weights = shard.device_weights
            if (
                weights is not None
                and weights.untyped_storage().data_ptr() == address
                and weights.dtype == tensor.dtype
            ):
                return _WeightView(name, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def _unpack(self, packed: torch.Tensor | _WeightView) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if packed.shard not in self._bound:
            raise ModelError(
                f"weights of {packed.shard} are needed in the backward pass while they are on the drive: this model uses them "
                "outside of the block that owns them, which cannot be streamed"
            )
        weights = self._bound[packed.shard][0].device_weights
        assert weights is not None
        return weights.as_strided(packed.shape, packed.stride, packed.offset)
