"""How low-bit moments are stored: by definition, to the nearest, and what cannot be stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from optim.moments import (
    decode_moments_bfloat16,
    decode_moments_int8,
    encode_moments_bfloat16,
    encode_moments_int8,
    num_moment_blocks,
    stochastic_key,
)

SIZES = [0, 1, 255, 256, 257, 1000]


def moments(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Heavy-tailed, with zeros and denormals."""
    rng = np.random.default_rng(size)
    m = (rng.standard_normal(size) * 10.0 ** rng.uniform(-9, 0, size)).astype(np.float32)
    v = (10.0 ** rng.uniform(-20, 2, size)).astype(np.float32)
    m[rng.random(size) < 0.1] = 0.0
    v[rng.random(size) < 0.1] = 0.0
    v[rng.random(size) < 0.1] = 1e-44
    return m, v


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_the_nearest(size: int) -> None:
    m, v = moments(size)
    v = np.maximum(v, np.float32(1e-30))
    m_bits, v_bits = encode_moments_bfloat16(m, v)
    for moment, encoded in ((m, m_bits), (v, v_bits)):
        expected = torch.from_numpy(moment).to(torch.bfloat16)
        np.testing.assert_array_equal(encoded.view(np.int16), expected.view(torch.int16).numpy())
    for decoded, encoded in zip(decode_moments_bfloat16(m_bits, v_bits), (m_bits, v_bits), strict=True):
        assert decoded.dtype == np.float32
        expected = torch.from_numpy(encoded.view(np.int16)).view(torch.bfloat16)
        np.testing.assert_array_equal(decoded, expected.float().numpy())


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_within_half_a_code_of_every_block(size: int) -> None:
    m, v = moments(size)
    m_codes, m_scales, v_codes, v_scales = encode_moments_int8(m, v)
    assert (m_codes.dtype, v_codes.dtype) == (np.int8, np.uint8)
    assert m_scales.shape == v_scales.shape == (num_moment_blocks(size),)
    new_m, new_v = decode_moments_int8(m_codes, m_scales, v_codes, v_scales)
    for block in range(num_moment_blocks(size)):
        part = slice(256 * block, 256 * (block + 1))
        m_scale = np.abs(m[part]).max() / 127
        v_scale = np.sqrt(v[part].astype(np.float64)).max() / 255
        assert np.abs(new_m[part] - m[part]).max() <= 0.5001 * m_scale
        # The smallest ones are rounded up to code 1.
        assert np.abs(np.sqrt(new_v[part]) - np.sqrt(v[part])).max() <= 1.0001 * v_scale
        large = np.sqrt(v[part]) >= v_scale
        assert np.abs(np.sqrt(new_v[part]) - np.sqrt(v[part]))[large].max() <= 0.5001 * v_scale


@pytest.mark.parametrize("size", SIZES)
def test_what_was_decoded_is_encoded_to_the_same(size: int) -> None:
    for encode, decode in (
        (encode_moments_bfloat16, decode_moments_bfloat16),
        (encode_moments_int8, decode_moments_int8),
    ):
        once = decode(*encode(*moments(size)))
        twice = decode(*encode(*once))
        for first, second in zip(once, twice, strict=True):
            np.testing.assert_allclose(second, first, rtol=1e-6, atol=0)


def test_only_zero_decodes_to_zero_in_v() -> None:
    m, v = moments(5000)
    for _, new_v in (
        decode_moments_bfloat16(*encode_moments_bfloat16(m, v)),
        decode_moments_int8(*encode_moments_int8(m, v)),
        # A block of nothing but denormals.
        decode_moments_int8(*encode_moments_int8(m, np.where(v > 0, np.float32(1e-44), v))),
    ):
        np.testing.assert_array_equal(new_v == 0, v == 0)


def test_zeros_are_zero_codes_and_scales() -> None:
    zeros = np.zeros(300, np.float32)
    for stored in (*encode_moments_bfloat16(zeros, zeros), *encode_moments_int8(zeros, zeros)):
        assert not stored.any()
    no_scales = np.zeros(2, np.float32)
    decoded = decode_moments_int8(np.zeros(300, np.int8), no_scales, np.zeros(300, np.uint8), no_scales)
    for moment in (*decoded, *decode_moments_bfloat16(np.zeros(300, np.uint16), np.zeros(300, np.uint16))):
        np.testing.assert_array_equal(moment, zeros)


@pytest.mark.parametrize("encode", [encode_moments_bfloat16, encode_moments_int8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**127])
def test_moments_that_no_low_bit_format_can_hold_are_refused(encode: object, value: float) -> None:
    assert callable(encode)
    bad, good = np.array([1.0, value], np.float32), np.ones(2, np.float32)
    with pytest.raises(ValueError, match="m holds NaN, infinity or magnitudes from"):
        encode(bad, good)
    with pytest.raises(ValueError, match="v holds NaN, infinity or magnitudes from"):
        encode(good, bad)
    with pytest.raises(ValueError, match="v holds negative numbers"):
        encode(good, -good)
    with pytest.raises(ValueError, match=r"v is float32\[3\] beside an m of 2"):
        encode(good, np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"m is float64"):
        encode(np.ones(2), good)


def test_scales_of_another_length_are_refused() -> None:
    m, v, scales = np.zeros(257, np.int8), np.zeros(257, np.uint8), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"v_scales has shape \(1,\) for 257 codes"):
        decode_moments_int8(m, scales, v, scales[:1])


def test_the_key_depends_on_seed_step_and_name_alone() -> None:
    # A constant: a stored run must go on with the same roundings under every version.
    assert stochastic_key(0, 1, "model.weight") == 0x9E2E2D99
    keys = {stochastic_key(seed, step, name) for seed in range(3) for step in range(1, 50) for name in ("a", "b")}
    assert len(keys) == 3 * 49 * 2
    assert all(0 <= key < 2**32 for key in keys)
