"""AdamW on moments of 16 or 8 bits: decoded, updated in float32, and encoded by chance, in one pass over memory.

Formats: `optim.moments`. Of 8-bit moments a block at a time is updated into the first-level cache and encoded from
there, since its scale needs its largest element. The rounding draws 32 bits an element from a hash of the
parameter's key and the element's index in its parameter, 16 for each moment, so that no cut, thread or order changes
a bit. Both roundings keep the expectation of m and of v: to the nearest, an average would stop where its change in a
step is below half a code (m in bfloat16 stops at 0.98 of a steady gradient with beta1 0.9, at 0.78 with 0.99; v at
once).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from optim.kernels_compile import compiled, inlined
from optim.kernels_intrinsics import (
    count_from,
    float_of_bits,
    high_random,
    keep_above_zero,
    low_random,
    max_magnitude,
    random_bits,
    round_root,
    round_to_bfloat16,
    round_to_int8,
    widen,
    window,
)
from optim.kernels_update import (
    INFINITY_BITS,
    OVERFLOWING_HIGH_BITS,
    AdamWScalars,
    Float32Array,
    UInt16Array,
    check_arrays,
    load_master,
    store_master,
    update,
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
_ROOT_LIMIT_BITS: Final = np.sqrt(np.float32(MOMENT_LIMIT)).view(np.uint32)
_M_CODE_LIMIT: Final = np.float32(M_CODE_LIMIT)
_V_CODE_LIMIT: Final = np.float32(V_CODE_LIMIT)
_MIN_M_SCALE: Final = np.float32(MIN_M_SCALE)
_MIN_V_SCALE: Final = np.float32(MIN_V_SCALE)
_ZERO: Final = np.float32(0.0)
# A trifle below one code, so that the largest magnitude's quotient is not rounded to above the largest code; of m
# with 16 binary places.
_V_UNIT: Final = np.float32(1.0 - 2.0**-22)
_M_UNIT: Final = np.float32(65536.0 * (1.0 - 2.0**-22))


@compiled
def _adamw_bfloat16(
    masters: Any, limit: Any, m: UInt16Array, v: UInt16Array, g: Any, key: Any, first_element: int, arguments: Any
) -> Any:
    num_refused, largest = np.int32(0), np.uint32(0)
    for i in range(m.size):
        new_p, new_m, new_v, _ = update(load_master(masters, i), widen(m[i]), widen(v[i]), widen(g[i]), *arguments)
        random = random_bits(key, first_element, i)
        store_master(masters, i, new_p)
        m[i] = round_to_bfloat16(new_m, low_random(random))
        v[i] = keep_above_zero(round_to_bfloat16(new_v, high_random(random)), new_v)
        num_refused = count_from(num_refused, new_p, limit)
        largest = max_magnitude(max_magnitude(largest, new_m), new_v)
    return num_refused + (1 if largest >= _LIMIT_BITS else 0)


@inlined
def _update_block(
    masters: Any,
    limit: Any,
    start: int,
    m: Int8Array,
    m_scale: Any,
    v: UInt8Array,
    v_scale: Any,
    g: Any,
    new_m: Float32Array,
    new_root: Float32Array,
    arguments: Any,
) -> tuple[Any, Any, Any]:
    """Write a block's new masters, m and roots of v; return masters to refuse, largest m, largest root (as bits)."""
    num_refused, m_bits, root_bits = np.int32(0), np.uint32(0), np.uint32(0)
    for i in range(m.size):
        old_root = np.float32(v[i]) * v_scale
        old_p, old_m = load_master(masters, start + i), np.float32(m[i]) * m_scale
        p, block_m, _, root = update(old_p, old_m, old_root * old_root, widen(g[i]), *arguments)
        store_master(masters, start + i, p)
        new_m[i] = block_m
        new_root[i] = root
        num_refused = count_from(num_refused, p, limit)
        m_bits = max_magnitude(m_bits, block_m)
        root_bits = max_magnitude(root_bits, root)
    return num_refused, m_bits, root_bits


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
) -> int:
    num_refused = 0
    new_m, new_root = np.empty(MOMENT_BLOCK_ELEMENTS, np.float32), np.empty(MOMENT_BLOCK_ELEMENTS, np.float32)
    for block in range(m_scales.size):
        start = block * MOMENT_BLOCK_ELEMENTS
        stop = min(start + MOMENT_BLOCK_ELEMENTS, m.size)
        block_m, block_v, block_g = window(m, start, stop), window(v, start, stop), window(g, start, stop)
        num_refused_masters, m_bits, root_bits = _update_block(
            masters, limit, start, block_m, m_scales[block], block_v, v_scales[block], block_g,
            new_m, new_root, arguments,
        )  # fmt: skip
        num_refused += num_refused_masters
        if m_bits >= _LIMIT_BITS or root_bits >= _ROOT_LIMIT_BITS:
            # Nobody will read this block, and the code of a NaN is not defined.
            num_refused += 1
            continue
        m_scales[block], v_scales[block] = _encode_block(
            new_m, new_root, float_of_bits(m_bits), float_of_bits(root_bits), block_m, block_v,
            key, first_element + start,
        )  # fmt: skip
    return num_refused


@inlined
def _encode_block(
    new_m: Float32Array,
    new_root: Float32Array,
    largest_m: Any,
    largest_root: Any,
    m: Int8Array,
    v: UInt8Array,
    key: Any,
    first_element: int,
) -> tuple[Any, Any]:
    """Write a block's codes; return its scales for m and for the roots of v.

    It is v, not its root, whose expectation is kept: otherwise v would grow by the variance of every rounding.
    """
    m_scale = max(largest_m / _M_CODE_LIMIT, _MIN_M_SCALE) if largest_m > _ZERO else _ZERO
    v_scale = max(largest_root / _V_CODE_LIMIT, _MIN_V_SCALE) if largest_root > _ZERO else _ZERO
    m_factor = _M_UNIT / m_scale if largest_m > _ZERO else _ZERO
    v_factor = _V_UNIT / v_scale if largest_root > _ZERO else _ZERO
    for i in range(m.size):
        random = random_bits(key, first_element, i)
        m[i] = round_to_int8(new_m[i] * m_factor, low_random(random))
        v[i] = round_root(new_root[i] * v_factor, new_root[i], high_random(random))
    return m_scale, v_scale


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
) -> int:
    """Update a split master and bfloat16 moments in place; return how many new values must be refused.

    high, low, m, v: uint16[n]; g: float32[n], or uint16[n] the bits of bfloat16; otherwise as `adamw_split`.
    `key` is this parameter's `stochastic_key` of this step, `first_element` the index in its parameter of the
    slices' first element: the same two give the same bits however the parameter is cut. Counted are masters
    as in `adamw_split`, and moments that are NaN or from 2**127 on. ValueError also for a key of more than 32
    bits and a negative first_element.
    """
    check_arrays(high.size, (np.uint16,), high=high, low=low, m=m, v=v)
    check_arrays(high.size, (np.float32, np.uint16), g=g)
    return int(
        _adamw_bfloat16(
            (high, low),
            OVERFLOWING_HIGH_BITS,
            m,
            v,
            g,
            *_counter(key, first_element),
            scalars.kernel_arguments(gradient_scale),
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
) -> int:
    """Update a float32 master and bfloat16 moments in place; p: float32[n], otherwise as `adamw_split_bfloat16`.

    Of masters, those that are NaN or infinite are counted.
    """
    check_arrays(p.size, (np.float32,), p=p)
    check_arrays(p.size, (np.uint16,), m=m, v=v)
    check_arrays(p.size, (np.float32, np.uint16), g=g)
    return int(
        _adamw_bfloat16(
            (p,), INFINITY_BITS, m, v, g, *_counter(key, first_element), scalars.kernel_arguments(gradient_scale)
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
) -> int:
    """Update a split master and 8-bit moments in place; return how many values and blocks must be refused.

    high, low: uint16[n]; m: int8[n]; v: uint8[n]; m_scales, v_scales: float32[ceil(n / 256)]; otherwise as
    `adamw_split_bfloat16`. Slices start where one of the parameter's blocks does: `first_element` is a
    multiple of 256, and only the parameter's last slice may end inside a block. A block with moments that must
    be refused counts once and keeps its old codes.
    """
    check_arrays(high.size, (np.uint16,), high=high, low=low)
    _check_int8(high.size, m, m_scales, v, v_scales, g, first_element)
    return int(
        _adamw_int8(
            (high, low), OVERFLOWING_HIGH_BITS, m, m_scales, v, v_scales, g,
            *_counter(key, first_element), scalars.kernel_arguments(gradient_scale),
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
) -> int:
    """Update a float32 master and 8-bit moments in place; p: float32[n], otherwise as `adamw_split_int8`.

    Of masters, those that are NaN or infinite are counted.
    """
    check_arrays(p.size, (np.float32,), p=p)
    _check_int8(p.size, m, m_scales, v, v_scales, g, first_element)
    return int(
        _adamw_int8(
            (p,),
            INFINITY_BITS,
            m,
            m_scales,
            v,
            v_scales,
            g,
            *_counter(key, first_element),
            scalars.kernel_arguments(gradient_scale),
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


def _counter(key: int, first_element: int) -> tuple[np.uint32, int]:
    if not 0 <= key < 2**32:
        raise ValueError(f"key is {key}, but the hash takes 32 bits: pass what stochastic_key returns")
    if first_element < 0:
        raise ValueError(f"first_element is {first_element}, but elements are counted from 0: pass at least 0")
    return np.uint32(key), first_element
