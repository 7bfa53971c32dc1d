"""One parameter's states in a record: updated by the kernel of their data types, read and edited as float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from io_engine import BufferPool, ByteArray, Engine, Extent, Store, combine_checksums, move_now, piece_digest
from optim import kernels
from optim.kernels import AdamWScalars
from optim.layout import ChunkViews, ParameterSlot, ShardLayout

Float32Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class ParameterState:
    """Copies of one parameter's optimizer state, in host memory, in the parameter's shape, float32."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int
    """Updates that the parameter has had."""


@dataclasses.dataclass(frozen=True)
class ParameterUpdate:
    """What one update of one parameter is made with, besides gradient and states."""

    scalars: AdamWScalars
    key: int
    """Of the random bits that round moments of less than float32."""


def update_part(
    weights: npt.NDArray[Any],
    part: ChunkViews,
    gradient: npt.NDArray[Any],
    update: ParameterUpdate,
    gradient_scale: float,
    *,
    first_element: int,
) -> bool:
    """Update elements `first_element` and following of a parameter in place; returns whether they must be refused.

    `weights`: float32 masters, or their high halves as uint16 where `part` has low ones; `gradient`: float32, or uint16 the
    bits of bfloat16. Blocks, without the GIL.
    """
    scalars, counter = update.scalars, (update.key, first_element)
    if part.m_scales is not None:
        assert part.v_scales is not None
        moments = (part.m, part.m_scales, part.v, part.v_scales)
        if part.low is None:
            return kernels.adamw_float32_int8(weights, *moments, gradient, scalars, gradient_scale, *counter)
        return kernels.adamw_split_int8(weights, part.low, *moments, gradient, scalars, gradient_scale, *counter)
    if part.m.dtype == np.uint16:
        if part.low is None:
            return kernels.adamw_float32_bfloat16(weights, part.m, part.v, gradient, scalars, gradient_scale, *counter)
        return kernels.adamw_split_bfloat16(
            weights, part.low, part.m, part.v, gradient, scalars, gradient_scale, *counter
        )
    if part.low is None:
        return kernels.adamw_float32(weights, part.m, part.v, gradient, scalars, gradient_scale)
    return kernels.adamw_split(weights, part.low, part.m, part.v, gradient, scalars, gradient_scale)


def get_master(weights: npt.NDArray[Any], part: ChunkViews) -> Float32Array:
    """A copy of the masters."""
    master = np.empty(weights.size, np.float32)
    if part.low is None:
        master[:] = weights
    else:
        kernels.join_master(weights, part.low, master)
    return master


def set_master(weights: npt.NDArray[Any], part: ChunkViews, master: Float32Array) -> bool:
    """Replace the masters; returns whether one is NaN, infinite or too large for the compute dtype."""
    if part.low is None:
        weights[:] = master
        return not np.isfinite(master).all()
    return kernels.split_master(master, weights, part.low)


def get_moments(part: ChunkViews) -> tuple[Float32Array, Float32Array]:
    """Copies of both moments."""
    if part.m_scales is not None:
        assert part.v_scales is not None
        return kernels.decode_moments_int8(part.m, part.m_scales, part.v, part.v_scales)
    if part.m.dtype == np.uint16:
        return kernels.decode_moments_bfloat16(part.m, part.v)
    return part.m.copy(), part.v.copy()


def set_moments(part: ChunkViews, m: Float32Array, v: Float32Array) -> None:
    """Replace both moments, rounded to the nearest values that their data types have."""
    if part.m_scales is not None:
        assert part.v_scales is not None
        part.m[:], part.m_scales[:], part.v[:], part.v_scales[:] = kernels.encode_moments_int8(m, v)
    elif part.m.dtype == np.uint16:
        part.m[:], part.v[:] = kernels.encode_moments_bfloat16(m, v)
    else:
        part.m[:], part.v[:] = m, v


class StateFiles:
    """Reads and rewrites single parameters on the drive, chunk by chunk; every call blocks, and nothing else may write."""

    def __init__(self, store: Store, engine: Engine, records: BufferPool) -> None:
        self._store, self._engine, self._records = store, engine, records

    def read(self, layout: ShardLayout, parameter: ParameterSlot, slot: int) -> tuple[Float32Array, ...]:
        """New flat float32 arrays (master, m, v) of a parameter in one slot of its shard."""
        values = tuple(np.empty(parameter.num_elements, np.float32) for _ in range(3))
        for chunk in range(layout.num_chunks):
            here, there = _overlap(layout, parameter, chunk)
            if here.start >= here.stop:
                continue
            weights, record = self._read_chunk(layout, chunk, slot)
            part = layout.views(record, chunk).part(here.start, here.stop)
            parts = (get_master(weights[here], part), *get_moments(part))
            for value, piece in zip(values, parts, strict=True):
                value[there] = piece
        return values

    def rewrite(
        self,
        layout: ShardLayout,
        parameter: ParameterSlot,
        from_slot: int,
        to_slot: int,
        values: Mapping[str, Float32Array],
    ) -> dict[str, str]:
        """Copy a shard to its other slot with a parameter's "master", "exp_avg" or "exp_avg_sq" replaced.

        Returns the new checksums by extent name, for the commit. ValueError for a master that the compute dtype cannot
        hold.
        """
        digests: dict[str, list[int]] = {layout.weight_name: [], layout.state_name: []}
        for chunk in range(layout.num_chunks):
            here, there = _overlap(layout, parameter, chunk)
            weights, record = self._read_chunk(layout, chunk, from_slot)
            if here.start < here.stop:
                part = layout.views(record, chunk).part(here.start, here.stop)
                if "master" in values and set_master(weights[here], part, values["master"][there]):
                    raise ValueError(f"master of {parameter.name}: too large for {layout.compute_dtype} in places")
                moments = zip(("exp_avg", "exp_avg_sq"), get_moments(part), strict=True)
                set_moments(part, *(values[field][there] if field in values else old for field, old in moments))
            for name, (offset, num_bytes), array in (
                (layout.weight_name, layout.weight_range(chunk), weights.view(np.uint8)),
                (layout.state_name, layout.state_range(chunk), record),
            ):
                with self._records.acquire(num_bytes) as buffer:
                    staged = buffer.array[:num_bytes]
                    staged[:] = array
                    digests[name].append(piece_digest(staged))
                    move_now(self._engine.write, self._store.extent(name, to_slot).sub(offset, num_bytes), staged)
        return {name: combine_checksums(pieces) for name, pieces in digests.items()}

    def _read_chunk(self, layout: ShardLayout, chunk: int, slot: int) -> tuple[npt.NDArray[Any], ByteArray]:
        """Copies of a chunk's weights (float32 or uint16, padding included) and of its record."""
        dtype = np.float32 if layout.compute_dtype == "float32" else np.uint16
        weights = self._store.extent(layout.weight_name, slot).sub(*layout.weight_range(chunk))
        record = self._store.extent(layout.state_name, slot).sub(*layout.state_range(chunk))
        return self._read(weights).view(dtype), self._read(record)

    def _read(self, extent: Extent) -> ByteArray:
        with self._records.acquire(extent.num_bytes) as buffer:
            move_now(self._engine.read, extent, buffer.array[: extent.num_bytes])
            return buffer.array[: extent.num_bytes].copy()


def _overlap(layout: ShardLayout, parameter: ParameterSlot, chunk: int) -> tuple[slice, slice]:
    """Where a chunk holds a part of a parameter: as a slice of the chunk, and of the parameter."""
    begin, end = layout.chunk_range(chunk)
    a, b = max(begin, parameter.start), min(end, parameter.stop)
    return slice(a - begin, b - begin), slice(a - parameter.start, b - parameter.start)


def checked_value(value: torch.Tensor, field: str, slot: ParameterSlot) -> npt.NDArray[np.float32]:
    """A value for a parameter's state as a flat array; ValueError if it cannot be one."""
    if tuple(value.shape) != slot.shape:
        raise ValueError(
            f"{field} has shape {tuple(value.shape)}, {slot.name} has {slot.shape}: give a tensor of that shape"
        )
    flat: npt.NDArray[np.float32] = value.detach().to("cpu", torch.float32).contiguous().flatten().numpy()
    if not np.isfinite(flat).all():
        raise ValueError(f"{field} of {slot.name} holds NaN or infinity, which no state may")
    if field == "exp_avg_sq" and (flat < 0).any():
        raise ValueError(f"exp_avg_sq of {slot.name} holds negative values: it is a mean of squares")
    return flat
