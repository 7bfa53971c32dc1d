"""How Adam's moments are stored: float32, the bits of bfloat16, or one byte each in blocks that share a scale.

bfloat16  m and v as uint16[n]: the upper halves of float32.
int8      blocks of 256 elements, the last one may be shorter; n elements have ceil(n / 256) scales a moment.
          m: int8[n], m = code * m_scale, codes from -127 to 127.
          v: uint8[n], v = (code * v_scale) ** 2: what is stored is the square root, since the update divides by
          it. A v above zero never has code 0: its element would take a step without bound.

All zeros decode to zeros, in every format. Here is the way by nearest numbers, for reading and editing states;
in training `optim.kernels` rounds by chance, without which a slow average stops where its change is below half
a code (of 2,000 decays by 0.999, bfloat16 to the nearest takes none).
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

MOMENT_DTYPES: Final = ("float32", "bfloat16", "int8")
"""Names of the formats, most exact first."""

MOMENT_BLOCK_ELEMENTS: Final = 256
"""Elements of a parameter that share a scale; blocks are counted from the parameter's first element."""

MOMENT_LIMIT: Final = 2.0**127
"""Low-bit moments stay below, so that rounding up gives no infinity."""

M_CODE_LIMIT: Final = 127
V_CODE_LIMIT: Final = 255

MIN_M_SCALE: Final = 2.0**-110
"""65,536 times its reciprocal is finite in float32."""
MIN_V_SCALE: Final = 2.0**-63
"""The square of this one is the smallest normal float32, so that code 1 never decodes to zero."""

Float32Array = NDArray[np.float32]


def stochastic_key(seed: int, step: int, name: str) -> int:
    """The key of one parameter's random roundings in one step: 32 bits that depend on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()[:4], "little")


def num_moment_blocks(num_elements: int) -> int:
    """Scales that int8 moments of that many elements have, for each moment."""
    return -(-num_elements // MOMENT_BLOCK_ELEMENTS)


def decode_moments_bfloat16(m: NDArray[np.uint16], v: NDArray[np.uint16]) -> tuple[Float32Array, Float32Array]:
    """uint16[n] each -> new float32[n] each, exactly; host memory, blocks."""
    widened = ((moment.astype(np.uint32) << 16).view(np.float32) for moment in (m, v))
    return next(widened), next(widened)


def encode_moments_bfloat16(m: Float32Array, v: Float32Array) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """float32[n] each -> new uint16[n] each, the nearest bfloat16, ties to even; host memory, blocks.

    A v above zero stays above zero. What `decode_moments_bfloat16` gave comes back exactly. ValueError as in
    `encode_moments_int8`.
    """
    _check_moments(m, v)
    m_bits, v_bits = (_nearest_bfloat16(moment) for moment in (m, v))
    return m_bits, np.maximum(v_bits, (v > 0).astype(np.uint16))


def decode_moments_int8(
    m: NDArray[np.int8], m_scales: Float32Array, v: NDArray[np.uint8], v_scales: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """int8[n], float32[ceil(n / 256)], uint8[n], float32[ceil(n / 256)] -> new float32[n] each; blocks.

    ValueError for scales of another length.
    """
    for name, codes, scales in (("m", m, m_scales), ("v", v, v_scales)):
        if scales.shape != (num_moment_blocks(codes.size),):
            raise ValueError(
                f"{name}_scales has shape {scales.shape} for {codes.size} codes, but every "
                f"{MOMENT_BLOCK_ELEMENTS} codes share one scale: pass {num_moment_blocks(codes.size)} of them"
            )
    root = v.astype(np.float32) * _for_each(v_scales, v.size)
    return m.astype(np.float32) * _for_each(m_scales, m.size), root * root


def encode_moments_int8(
    m: Float32Array, v: Float32Array
) -> tuple[NDArray[np.int8], Float32Array, NDArray[np.uint8], Float32Array]:
    """float32[n] each -> new (m codes, m_scales, v codes, v_scales), the nearest codes; host memory, blocks.

    A v above zero gets code 1 at least. ValueError for moments that are not float32, 1-D, of one length and
    below 2**127, and for a negative v.
    """
    _check_moments(m, v)
    m_scales = _scales(np.abs(m), M_CODE_LIMIT, MIN_M_SCALE)
    root = np.sqrt(v)
    v_scales = _scales(root, V_CODE_LIMIT, MIN_V_SCALE)
    m_codes, v_codes = (
        np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))
        for values, scale in ((m, _for_each(m_scales, m.size)), (root, _for_each(v_scales, v.size)))
    )
    m_codes = np.clip(m_codes, -M_CODE_LIMIT, M_CODE_LIMIT).astype(np.int8)
    v_codes = np.clip(v_codes, v > 0, V_CODE_LIMIT).astype(np.uint8)
    return m_codes, m_scales, v_codes, v_scales


def _nearest_bfloat16(values: Float32Array) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _scales(magnitudes: Float32Array, code_limit: int, min_scale: float) -> Float32Array:
    """A scale a block: its largest magnitude gets the largest code; 0.0 for a block of zeros."""
    padded = np.zeros(num_moment_blocks(magnitudes.size) * MOMENT_BLOCK_ELEMENTS, np.float32)
    padded[: magnitudes.size] = magnitudes
    largest = padded.reshape(-1, MOMENT_BLOCK_ELEMENTS).max(axis=1)
    scales = np.maximum(largest / np.float32(code_limit), np.float32(min_scale))
    return np.where(largest > 0, scales, np.float32(0.0))


def _for_each(scales: Float32Array, num_elements: int) -> Float32Array:
    return np.repeat(scales, MOMENT_BLOCK_ELEMENTS)[:num_elements]


def _check_moments(m: Float32Array, v: Float32Array) -> None:
    for name, moment in (("m", m), ("v", v)):
        if moment.dtype != np.float32 or moment.ndim != 1 or moment.size != m.size:
            raise ValueError(
                f"{name} is {moment.dtype}{list(moment.shape)} beside an m of {m.size}, but moments are stored "
                f"element by element: pass flat float32 arrays of one length"
            )
        if not bool(np.all(np.abs(moment) < MOMENT_LIMIT)):
            raise ValueError(
                f"{name} holds NaN, infinity or magnitudes from 2**127 on, which low-bit formats cannot store: "
                f"pass finite moments"
            )
    if bool(np.any(v < 0)):
        raise ValueError("v holds negative numbers, but it averages squares: pass values of at least 0")
