"""AdamW's arithmetic on one chunk of host memory: compiled, single-threaded, without the GIL.

The numbers are those of `torch.optim.AdamW(fused=True)` (or `Adam(fused=True)`) on CPU in float32, bit for
bit, on tensors whose length is a multiple of 64 (torch's scalar tail rounds differently). The kernels here
treat every element alike, so any cut of a tensor into chunks gives the same bits.

A float32 master may be stored split in two halves:

    high = (bits + 0x8000) >> 16     the bfloat16 weight, rounded half up: what the model computes with
    low  = bits & 0xFFFF             what high lost

`bits = (high << 16) + sign_extended(low)`, modulo 2**32: a low half of 0x8000 or more was rounded up.
Rounding half up turns the NaN 0x7FFFFFFF into -0 and the largest finite floats into infinity; the kernels tell
if there were such masters, so that the caller can refuse them.

Moments may also be kept in 16 or 8 bits: `optim.kernels_low_bit`, exported here with the rest. A gradient is
float32, or the bits of bfloat16 as uint16, which give the same as the float32 of the same value.

Legend: p master weight, m first moment, v second moment, g gradient; 1-D, contiguous, of one length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optim.kernels_compile import compiled, inlined
from optim.kernels_intrinsics import high_half, join_halves, low_half, max_magnitude, scratch, widen
from optim.kernels_low_bit import (
    adamw_float32_bfloat16,
    adamw_float32_int8,
    adamw_split_bfloat16,
    adamw_split_int8,
)
from optim.kernels_update import (
    INFINITY_BITS,
    OVERFLOWING_HIGH_BITS,
    TILE_ELEMENTS,
    AdamWScalars,
    Float32Array,
    UInt16Array,
    check_arrays,
    denominator,
    load_master,
    store_master,
    tiles,
    update_master,
    update_moments,
)
from optim.moments import (
    MOMENT_BLOCK_ELEMENTS,
    MOMENT_DTYPES,
    decode_moments_bfloat16,
    decode_moments_int8,
    encode_moments_bfloat16,
    encode_moments_int8,
    num_moment_blocks,
    stochastic_key,
)

__all__ = [
    "MOMENT_BLOCK_ELEMENTS",
    "MOMENT_DTYPES",
    "AdamWScalars",
    "adamw_float32",
    "adamw_float32_bfloat16",
    "adamw_float32_int8",
    "adamw_split",
    "adamw_split_bfloat16",
    "adamw_split_int8",
    "compiled",
    "decode_moments_bfloat16",
    "decode_moments_int8",
    "encode_moments_bfloat16",
    "encode_moments_int8",
    "join_master",
    "num_moment_blocks",
    "split_master",
    "stochastic_key",
    "warm_up",
    "widen_gradient",
]


@inlined
def _begin(
    masters: Any, m: Float32Array, v: Float32Array, g: Any, start: int, j: Any, denominators: Any, arguments: Any
) -> None:
    """Element j of the tile at `start`: its moments and denominator."""
    i, j = np.uintp(start + j), np.uintp(j)
    m[i], v[i] = update_moments(load_master(masters, i), m[i], v[i], widen(g[i]), *arguments[0])
    denominators[j] = denominator(np.sqrt(v[i]), *arguments[1])


@inlined
def _finish(masters: Any, m: Float32Array, start: int, j: Any, denominators: Any, arguments: Any, largest: Any) -> Any:
    """Element j of the tile at `start`, begun before: its master; returns the largest so far, as bits."""
    i, j = np.uintp(start + j), np.uintp(j)
    new_p = update_master(load_master(masters, i), m[i], denominators[j], *arguments[2])
    store_master(masters, i, new_p)
    return max_magnitude(largest, new_p)


@compiled
def _adamw(masters: Any, limit: Any, m: Float32Array, v: Float32Array, g: Any, arguments: Any) -> Any:
    largest = np.uint32(0)
    denominators = scratch(TILE_ELEMENTS)
    for first, size, last in tiles(m.size):
        for j in range(size):
            _begin(masters, m, v, g, first, j, denominators, arguments)
        for start in range(first + TILE_ELEMENTS, last + 1, TILE_ELEMENTS):
            for j in range(TILE_ELEMENTS):
                largest = _finish(masters, m, start - TILE_ELEMENTS, j, denominators, arguments, largest)
                _begin(masters, m, v, g, start, j, denominators, arguments)
        for j in range(size):
            largest = _finish(masters, m, last, j, denominators, arguments, largest)
    return largest >= limit


@compiled
def _split(p: Float32Array, high: UInt16Array, low: UInt16Array) -> Any:
    largest = np.uint32(0)
    for i in range(p.size):
        value = p[i]
        high[i] = high_half(value)
        low[i] = low_half(value)
        largest = max_magnitude(largest, value)
    return largest >= OVERFLOWING_HIGH_BITS


@compiled
def _join(high: UInt16Array, low: UInt16Array, p: Float32Array) -> None:
    for i in range(p.size):
        p[i] = join_halves(high[i], low[i])


def adamw_split(
    high: UInt16Array,
    low: UInt16Array,
    m: Float32Array,
    v: Float32Array,
    g: Float32Array | UInt16Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
) -> bool:
    """Update a split master and its moments in place; return whether new masters must be refused.

    high, low: uint16[n]; m, v: float32[n]; g: float32[n], or uint16[n] the bits of bfloat16; contiguous host
    memory that does not overlap; g is only read.
    The gradient is first multiplied by `gradient_scale` (clipping) in float32. Blocks the calling thread,
    without the GIL. Refused are masters that are NaN or infinite or whose high half would be: then the arrays
    hold no usable step, and the caller goes back to what it had. ValueError for another shape, dtype or
    layout.
    """
    check_arrays(high.size, (np.uint16,), high=high, low=low)
    check_arrays(high.size, (np.float32,), m=m, v=v)
    check_arrays(high.size, (np.float32, np.uint16), g=g)
    return bool(_adamw((high, low), OVERFLOWING_HIGH_BITS, m, v, g, scalars.kernel_arguments(gradient_scale)))


def adamw_float32(
    p: Float32Array,
    m: Float32Array,
    v: Float32Array,
    g: Float32Array | UInt16Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
) -> bool:
    """Update a float32 master and its moments in place; return whether a new master is NaN or infinite.

    p, m, v: float32[n]; otherwise as `adamw_split`.
    """
    check_arrays(p.size, (np.float32,), p=p, m=m, v=v)
    check_arrays(p.size, (np.float32, np.uint16), g=g)
    return bool(_adamw((p,), INFINITY_BITS, m, v, g, scalars.kernel_arguments(gradient_scale)))


def split_master(p: Float32Array, high: UInt16Array, low: UInt16Array) -> bool:
    """Split p: float32[n] into high, low: uint16[n]; return whether `adamw_split` would refuse one.

    `join_master` gives p back exactly, refused values too. Blocks, without the GIL. ValueError as in
    `adamw_split`.
    """
    check_arrays(p.size, (np.float32,), p=p)
    check_arrays(p.size, (np.uint16,), high=high, low=low)
    return bool(_split(p, high, low))


def join_master(high: UInt16Array, low: UInt16Array, p: Float32Array) -> None:
    """Write the float32[n] master that `split_master` took apart into p.

    Blocks, without the GIL. ValueError as in `adamw_split`.
    """
    check_arrays(p.size, (np.float32,), p=p)
    check_arrays(p.size, (np.uint16,), high=high, low=low)
    _join(high, low, p)


def widen_gradient(narrowed: UInt16Array) -> Float32Array:
    """The same values in new memory: uint16[n], the bits of bfloat16, -> float32[n]."""
    return np.left_shift(narrowed, 16, dtype=np.uint32).view(np.float32)


def warm_up(moment_dtype: str = "float32", *, narrow_gradients: bool = False) -> None:
    """Compile the kernels for such moments, or load them from numba's cache, so that no first step pays for it.

    For gradients in float32, with `narrow_gradients` for those in bfloat16. Takes seconds the first time on a machine. Never
    fails for want of a place to keep the machine code. ValueError for a format that is not in MOMENT_DTYPES.
    """
    n = MOMENT_BLOCK_ELEMENTS
    high, low = np.zeros(n, np.uint16), np.zeros(n, np.uint16)
    p = np.zeros(n, np.float32)
    g: Any = np.zeros(n, np.uint16 if narrow_gradients else np.float32)
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.0, step=1)
    split_master(p, high, low)
    join_master(high, low, p)
    m, v = np.zeros(n, np.float32), np.zeros(n, np.float32)
    if moment_dtype == "float32":
        adamw_split(high, low, m, v, g, scalars)
        adamw_float32(p, m, v, g, scalars)
    elif moment_dtype == "bfloat16":
        moments16 = encode_moments_bfloat16(m, v)
        adamw_split_bfloat16(high, low, *moments16, g, scalars)
        adamw_float32_bfloat16(p, *moments16, g, scalars)
    elif moment_dtype == "int8":
        moments8 = encode_moments_int8(m, v)
        adamw_split_int8(high, low, *moments8, g, scalars)
        adamw_float32_int8(p, *moments8, g, scalars)
    else:
        raise ValueError(f"moment_dtype is {moment_dtype!r}, but moments are kept as one of {', '.join(MOMENT_DTYPES)}")
