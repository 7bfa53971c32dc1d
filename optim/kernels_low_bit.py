"""AdamW on moments of 16 or 8 bits: decoded, updated in float32, and encoded by chance, in one pass over memory.

Formats: `optim.moments`. A tile at a time (of 8-bit moments a block, whose scale needs its largest element) is
updated into the first-level cache and encoded from there. The rounding draws 32 bits an element, 16 for each moment,
from the parameter's key and the element's index in its parameter alone, so that no cut, thread or order changes a
bit. For bfloat16 they are a hash of the two; for 8 bits, the hash of the key and the index in the block, xor the hash
of the key and the block: less work, and every element's bits still go through all values, over the keys and over the
blocks. Both roundings keep the expectation of m and of v: to the nearest, an average
would stop where its change in a step is below half a code (m in bfloat16 stops at 0.98 of a steady gradient with
beta1 0.9, at 0.78 with 0.99; v at once).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from optim.kernels_compile import compiled, inlined
from optim.kernels_intrinsics import (
    bits_of_float,
    float_of_bits,
    high_random,
    keep_above_zero,
    low_random,
    max_bits,
    max_magnitude,
    mix,
    random_bits,
    round_root,
    round_to_bfloat16,
    round_to_int8,
    scratch,
    widen,
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
    fold_gradient,
    load_master,
    store_master,
    tiles,
    update_master,
)
from optim.moments import (
    M_CODE_LIMIT,
    MIN_M_SCALE,
    MIN_V_SCALE,
    MOMENT_BLOCK_ELEMENTS,
    MOMENT_LIMIT,
    V_CODE_LIMIT,
    num_moment_blocks,
)

Int8Array = NDArray[np.int8]
UInt8Array = NDArray[np.uint8]

_LIMIT_BITS: Final = np.float32(MOMENT_LIMIT).view(np.uint32)
_M_CODE_LIMIT: Final = np.float32(M_CODE_LIMIT)
_V_CODE_LIMIT: Final = np.float32(V_CODE_LIMIT)
_MIN_M_SCALE: Final = np.float32(MIN_M_SCALE)
_MIN_V_SCALE: Final = np.float32(MIN_V_SCALE)
_ZERO: Final = np.float32(0.0)
# A trifle below one code, so that the largest magnitude's quotient is not rounded to above the largest code; of m
# with 16 binary places.
_V_UNIT: Final = np.float32(1.0 - 2.0**-22)
_M_UNIT: Final = np.float32(65536.0 * (1.0 - 2.0**-22))


@inlined
def _begin_bfloat16(
    masters: Any, m: UInt16Array, v: UInt16Array, g: Any, start: int, j: Any, new: Any, arguments: Any
) -> None:
    """Element j of the tile at `start`: its moments, not rounded, and its denominator."""
    i, j = np.uintp(start + j), np.uintp(j)
    new_m, new_v, denominators = new
    decayed_m, decayed_v = widen(m[i]) * arguments[3][0], widen(v[i]) * arguments[3][1]
    new_m[j], new_v[j] = fold_gradient(load_master(masters, i), decayed_m, decayed_v, widen(g[i]), *arguments[0])
    denominators[j] = denominator(np.sqrt(new_v[j]), *arguments[1])


@inlined
def _finish_bfloat16(
    masters: Any, m: UInt16Array, v: UInt16Array, start: int, j: Any, new: Any, key: Any,
    first_element: int, arguments: Any, largest: Any, largest_moment: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Element j of the tile at `start`, begun before: its master and its moments; returns the largest, as bits."""
    random = random_bits(key, first_element + start, j)
    i, j = np.uintp(start + j), np.uintp(j)
    new_m, new_v, denominators = new
    new_p = update_master(load_master(masters, i), new_m[j], denominators[j], *arguments[2])
    store_master(masters, i, new_p)
    m[i] = round_to_bfloat16(new_m[j], low_random(random))
    v[i] = keep_above_zero(round_to_bfloat16(new_v[j], high_random(random)), new_v[j])
    largest_moment = max_bits(max_magnitude(largest_moment, new_m[j]), new_v[j])
    return max_magnitude(largest, new_p), largest_moment


@compiled
def _adamw_bfloat16(
    masters: Any, limit: Any, m: UInt16Array, v: UInt16Array, g: Any, key: Any, first_element: int, arguments: Any
) -> Any:
    largest, largest_moment = np.uint32(0), np.uint32(0)
    new = (scratch(TILE_ELEMENTS), scratch(TILE_ELEMENTS), scratch(TILE_ELEMENTS))
    for first, size, last in tiles(m.size):
        for j in range(size):
            _begin_bfloat16(masters, m, v, g, first, j, new, arguments)
        for start in range(first + TILE_ELEMENTS, last + 1, TILE_ELEMENTS):
            before = start - TILE_ELEMENTS
            for j in range(TILE_ELEMENTS):
                largest, largest_moment = _finish_bfloat16(
                    masters, m, v, before, j, new, key, first_element, arguments, largest, largest_moment
                )
                _begin_bfloat16(masters, m, v, g, start, j, new, arguments)
        for j in range(size):
            largest, largest_moment = _finish_bfloat16(
                masters, m, v, last, j, new, key, first_element, arguments, largest, largest_moment
            )
    return largest >= limit or largest_moment >= _LIMIT_BITS


@inlined
def _decode_and_update(
    masters: Any, m: Int8Array, m_scale: Any, v: UInt8Array, v_scale: Any, g: Any, start: int, j: Any,
    new: Any, arguments: Any, m_bits: Any, v_bits: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Element j of the block at `start`: its moments in float32; returns the largest so far, as bits.

    The scales have been multiplied with what their moments are multiplied with in a step.
    """
    i, j = np.uintp(start + j), np.uintp(j)
    decayed_m, decayed_root = np.float32(m[i]) * m_scale, np.float32(v[i]) * v_scale
    new_m, new_v = new
    new_m[j], new_v[j] = fold_gradient(
        load_master(masters, i), decayed_m, decayed_root * decayed_root, widen(g[i]), *arguments[0]
    )
    return max_magnitude(m_bits, new_m[j]), max_bits(v_bits, new_v[j])


@inlined
def _take_root(j: Any, new: Any, waiting: Any) -> None:
    """Element j of the same block: its m and root, put where `_update_master` and `_encode` find them."""
    j = np.uintp(j)
    waiting[0][j], waiting[1][j] = new[0][j], np.sqrt(new[1][j])


@inlined
def _update_master(masters: Any, start: int, j: Any, waiting: Any, arguments: Any, largest: Any) -> Any:
    """Element j of the block at `start`, waiting since: its master; returns the largest so far, as bits."""
    i, j = np.uintp(start + j), np.uintp(j)
    divisor = denominator(waiting[1][j], *arguments[1])
    new_p = update_master(load_master(masters, i), waiting[0][j], divisor, *arguments[2])
    store_master(masters, i, new_p)
    return max_magnitude(largest, new_p)


@inlined
def _bits_of_block(key: Any, start: int) -> Any:
    """What the random bits of a block's elements have in common, of the block at `start` in the parameter.

    Counted from -1 downwards, so that no block shares the hash of an index inside blocks: xor would give zero.
    """
    return random_bits(key, -1, -(start // TILE_ELEMENTS))


@inlined
def _encode(m: Int8Array, v: UInt8Array, start: int, j: Any, waiting: Any, factors: Any, table: Any, bits: Any) -> None:
    """Element j of the block at `start`, waiting since: its codes.

    It is v, not its root, whose expectation is kept: otherwise v would grow by the variance of every rounding. A root
    above zero is no less than 2**-75, its factor no less than 2**-56: the product is never zero.
    """
    i, j = np.uintp(start + j), np.uintp(j)
    random = mix(bits_of_float(table[j]) ^ bits)
    m[i] = round_to_int8(waiting[0][j] * factors[0], low_random(random))
    v[i] = round_root(waiting[1][j] * factors[1], high_random(random))


@inlined
def _rescale(m_scales: Float32Array, v_scales: Float32Array, block: int, m_bits: Any, v_bits: Any) -> tuple[Any, bool]:
    """Set a block's scales; returns what its m and roots are multiplied with to be codes, and if it is refused.

    Nobody reads the codes of a refused block: those of a NaN are not defined.
    """
    largest_m, largest_root = float_of_bits(m_bits), np.sqrt(float_of_bits(v_bits))
    m_scale = max(largest_m / _M_CODE_LIMIT, _MIN_M_SCALE) if largest_m > _ZERO else _ZERO
    v_scale = max(largest_root / _V_CODE_LIMIT, _MIN_V_SCALE) if largest_root > _ZERO else _ZERO
    m_factor = _M_UNIT / m_scale if largest_m > _ZERO else _ZERO
    v_factor = _V_UNIT / v_scale if largest_root > _ZERO else _ZERO
    m_scales[block], v_scales[block] = m_scale, v_scale
    return (m_factor, v_factor), m_bits >= _LIMIT_BITS or v_bits >= _LIMIT_BITS


@compiled
def _adamw_int8(
    masters: Any,
    limit: Any,
    m: Int8Array,
    m_scales: Float32Array,
    v: UInt8Array,
    v_scales: Float32Array,
    g: Any,
    key: Any,
    first_element: int,
    arguments: Any,
) -> Any:
    new = (scratch(TILE_ELEMENTS), scratch(TILE_ELEMENTS))
    waiting = (scratch(TILE_ELEMENTS), scratch(TILE_ELEMENTS))
    table = scratch(TILE_ELEMENTS)
    for j in range(TILE_ELEMENTS):
        table[np.uintp(j)] = float_of_bits(random_bits(key, 0, j))
    largest, is_refused = np.uint32(0), False
    for first, size, last in tiles(m.size):
        if size == 0:
            continue
        block = first // TILE_ELEMENTS
        m_scale, v_scale = m_scales[block] * arguments[3][0], v_scales[block] * arguments[3][2]
        m_bits, v_bits = np.uint32(0), np.uint32(0)
        for j in range(size):
            m_bits, v_bits = _decode_and_update(
                masters, m, m_scale, v, v_scale, g, first, j, new, arguments, m_bits, v_bits
            )
            _take_root(j, new, waiting)
        factors, overflows = _rescale(m_scales, v_scales, block, m_bits, v_bits)
        is_refused |= overflows
        for start in range(first + TILE_ELEMENTS, last + 1, TILE_ELEMENTS):
            block, before = start // TILE_ELEMENTS, start - TILE_ELEMENTS
            m_scale, v_scale = m_scales[block] * arguments[3][0], v_scales[block] * arguments[3][2]
            bits = _bits_of_block(key, first_element + before)
            m_bits, v_bits = np.uint32(0), np.uint32(0)
            # Two loops, each with one of the two long waits and half of the instructions.
            for j in range(TILE_ELEMENTS):
                largest = _update_master(masters, before, j, waiting, arguments, largest)
                m_bits, v_bits = _decode_and_update(
                    masters, m, m_scale, v, v_scale, g, start, j, new, arguments, m_bits, v_bits
                )
            for j in range(TILE_ELEMENTS):
                _encode(m, v, before, j, waiting, factors, table, bits)
                _take_root(j, new, waiting)
            factors, overflows = _rescale(m_scales, v_scales, block, m_bits, v_bits)
            is_refused |= overflows
        bits = _bits_of_block(key, first_element + last)
        for j in range(size):
            largest = _update_master(masters, last, j, waiting, arguments, largest)
            _encode(m, v, last, j, waiting, factors, table, bits)
    return largest >= limit or is_refused


def adamw_split_bfloat16(
    high: UInt16Array,
    low: UInt16Array,
    m: UInt16Array,
    v: UInt16Array,
    g: Float32Array | UInt16Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
    key: int = 0,
    first_element: int = 0,
) -> bool:
    """Update a split master and bfloat16 moments in place; return whether new values must be refused.

    high, low, m, v: uint16[n]; g: float32[n], or uint16[n] the bits of bfloat16; otherwise as `adamw_split`.
    `key` is this parameter's `stochastic_key` of this step, `first_element` the index in its parameter of the
    slices' first element: the same two give the same bits however the parameter is cut. Refused are masters
    as in `adamw_split`, and moments that are NaN or from 2**127 on. ValueError also for a key of more than 32
    bits and a negative first_element.
    """
    check_arrays(high.size, (np.uint16,), high=high, low=low, m=m, v=v)
    check_arrays(high.size, (np.float32, np.uint16), g=g)
    return bool(
        _adamw_bfloat16(
            (high, low),
            OVERFLOWING_HIGH_BITS,
            m,
            v,
            g,
            *_last_arguments(scalars, gradient_scale, key, first_element),
        )
    )


def adamw_float32_bfloat16(
    p: Float32Array,
    m: UInt16Array,
    v: UInt16Array,
    g: Float32Array | UInt16Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
    key: int = 0,
    first_element: int = 0,
) -> bool:
    """Update a float32 master and bfloat16 moments in place; p: float32[n], otherwise as `adamw_split_bfloat16`.

    Of masters, those that are NaN or infinite are refused.
    """
    check_arrays(p.size, (np.float32,), p=p)
    check_arrays(p.size, (np.uint16,), m=m, v=v)
    check_arrays(p.size, (np.float32, np.uint16), g=g)
    return bool(
        _adamw_bfloat16(
            (p,),
            INFINITY_BITS,
            m,
            v,
            g,
            *_last_arguments(scalars, gradient_scale, key, first_element),
        )
    )


def adamw_split_int8(
    high: UInt16Array,
    low: UInt16Array,
    m: Int8Array,
    m_scales: Float32Array,
    v: UInt8Array,
    v_scales: Float32Array,
    g: Float32Array | UInt16Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
    key: int = 0,
    first_element: int = 0,
) -> bool:
    """Update a split master and 8-bit moments in place; return whether new values must be refused.

    high, low: uint16[n]; m: int8[n]; v: uint8[n]; m_scales, v_scales: float32[ceil(n / 256)]; otherwise as
    `adamw_split_bfloat16`. Slices start where one of the parameter's blocks does: `first_element` is a
    multiple of 256, and only the parameter's last slice may end inside a block. The codes of a
    block with moments that must be refused are not defined.
    """
    check_arrays(high.size, (np.uint16,), high=high, low=low)
    _check_int8(high.size, m, m_scales, v, v_scales, g, first_element)
    return bool(
        _adamw_int8(
            (high, low), OVERFLOWING_HIGH_BITS, m, m_scales, v, v_scales, g,
            *_last_arguments(scalars, gradient_scale, key, first_element),
        )
    )  # fmt: skip


def adamw_float32_int8(
    p: Float32Array,
    m: Int8Array,
    m_scales: Float32Array,
    v: UInt8Array,
    v_scales: Float32Array,
    g: Float32Array | UInt16Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
    key: int = 0,
    first_element: int = 0,
) -> bool:
    """Update a float32 master and 8-bit moments in place; p: float32[n], otherwise as `adamw_split_int8`.

    Of masters, those that are NaN or infinite are refused.
    """
    check_arrays(p.size, (np.float32,), p=p)
    _check_int8(p.size, m, m_scales, v, v_scales, g, first_element)
    return bool(
        _adamw_int8(
            (p,),
            INFINITY_BITS,
            m,
            m_scales,
            v,
            v_scales,
            g,
            *_last_arguments(scalars, gradient_scale, key, first_element),
        )
    )


def _check_int8(
    num_elements: int,
    m: Int8Array,
    m_scales: Float32Array,
    v: UInt8Array,
    v_scales: Float32Array,
    g: Float32Array | UInt16Array,
    first_element: int,
) -> None:
    check_arrays(num_elements, (np.int8,), m=m)
    check_arrays(num_elements, (np.uint8,), v=v)
    check_arrays(num_elements, (np.float32, np.uint16), g=g)
    check_arrays(num_moment_blocks(num_elements), (np.float32,), m_scales=m_scales, v_scales=v_scales)
    if first_element % MOMENT_BLOCK_ELEMENTS != 0:
        raise ValueError(
            f"first_element is {first_element}, inside a block, whose scale covers {MOMENT_BLOCK_ELEMENTS} elements: "
            f"cut parameters at multiples of {MOMENT_BLOCK_ELEMENTS}"
        )


def _last_arguments(
    scalars: AdamWScalars, gradient_scale: float, key: int, first_element: int
) -> tuple[np.uint32, int, tuple[tuple[np.float32 | None, ...], ...]]:
    if not 0 <= key < 2**32:
        raise ValueError(f"key is {key}, but the hash takes 32 bits: pass what stochastic_key returns")
    if first_element < 0:
        raise ValueError(f"first_element is {first_element}, but elements are counted from 0: pass at least 0")
    return np.uint32(key), first_element, scalars.folded_arguments(gradient_scale)
