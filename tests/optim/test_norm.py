"""The gradient norm against a second computation of its definition, bit for bit, and against torch."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optim.norm import (
    TILE_ELEMENTS,
    clip_coefficient,
    global_norm,
    parameter_sum,
    tile_sums,
    warm_up,
)


def sums_by_definition(g: NDArray[np.float32]) -> list[float]:
    """Tile sums by numpy's cumsum, which adds one element after the other."""
    sums = []
    for start in range(0, g.size, 65_536):
        tile = g[start : start + 65_536].astype(np.float64)
        rows = np.zeros((-(-tile.size // 32), 32))
        rows.reshape(-1)[: tile.size] = tile * tile
        lanes = np.cumsum(rows, axis=0)[-1]
        sums.append(float(np.cumsum(lanes)[-1]))
    return sums


def gradient_of(num_elements: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(num_elements) * 10.0 ** rng.integers(-25, 10, num_elements)).astype(np.float32)


@pytest.mark.parametrize(
    "num_elements",
    [0, 1, 31, 32, 33, 65_503, 65_535, 65_536, 65_537, 65_567, 65_568, 65_569, 4 * 65_536 + 17],
)
def test_tile_sums_have_the_bits_of_the_definition(num_elements: int) -> None:
    gradient = gradient_of(num_elements, seed=num_elements)
    result = tile_sums(gradient)
    assert result.dtype == np.float64
    assert result.tolist() == sums_by_definition(gradient)


@settings(max_examples=50, deadline=None)
@given(num_elements=st.integers(0, 3000), seed=st.integers(0, 2**32))
def test_short_tensors_have_the_bits_of_the_definition(num_elements: int, seed: int) -> None:
    gradient = gradient_of(num_elements, seed)
    assert tile_sums(gradient).tolist() == sums_by_definition(gradient)


@pytest.mark.parametrize("num_elements", [0, 1, 31, 32, 33, 65_536, 65_537, 65_568, 65_569, 2 * 65_536 + 17])
def test_a_gradient_in_bfloat16_has_the_sums_of_its_values(num_elements: int) -> None:
    bits = np.random.default_rng(num_elements).integers(0, 0x7F80, num_elements, np.uint16)  # all that are finite
    bits |= np.random.default_rng(1).integers(0, 2, num_elements, np.uint16) << 15
    values = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    assert tile_sums(bits).tolist() == sums_by_definition(values)
    # Anywhere in memory.
    assert tile_sums(np.concatenate([bits[:1], bits])[1:]).tolist() == sums_by_definition(values)


def test_parts_cut_at_tiles_give_the_whole() -> None:
    gradient = gradient_of(5 * TILE_ELEMENTS + 1000, seed=5)
    edges = [0, 2 * TILE_ELEMENTS, 3 * TILE_ELEMENTS, gradient.size]
    parts = [tile_sums(gradient[start:stop]) for start, stop in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), tile_sums(gradient))


def test_padding_by_zeros_changes_nothing() -> None:
    gradient = gradient_of(TILE_ELEMENTS - 7, seed=6)
    padded = np.concatenate([gradient, np.zeros(57, np.float32)])
    assert tile_sums(padded).size == 2
    assert parameter_sum(tile_sums(padded)) == parameter_sum(tile_sums(gradient))


def test_denormals_count() -> None:
    assert tile_sums(np.full(1, 1e-45, np.float32)).tolist() == [float(np.float32(1e-45)) ** 2]


def test_parameter_sum_adds_one_tile_after_the_other() -> None:
    # Neither a pairwise nor a compensated sum gives this.
    values = np.array([1.0] + [2.0**-53] * 1000)
    assert parameter_sum(values) == 1.0
    assert math.fsum(values) > 1.0
    assert parameter_sum(np.empty(0)) == 0.0


def test_global_norm_adds_in_the_order_of_names() -> None:
    tiny = {f"b{i:04}": 2.0**-53 for i in range(1000)}
    large_first, large_last = {**tiny, "a": 1.0}, {**tiny, "c": 1.0}
    assert global_norm(large_first) == 1.0
    assert global_norm(large_last) == math.sqrt(1.0 + 1000 * 2.0**-53) > 1.0
    assert global_norm(dict(reversed(large_last.items()))) == global_norm(large_last)
    assert global_norm({}) == 0.0


def test_agrees_with_torch() -> None:
    rng = np.random.default_rng(8)
    gradients = {f"p{n}": rng.standard_normal(n).astype(np.float32) for n in (7, 70_000, 200_001)}
    norm = global_norm({name: parameter_sum(tile_sums(gradient)) for name, gradient in gradients.items()})
    tensors = [torch.from_numpy(gradient) for gradient in gradients.values()]
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(tensors)), rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 65_535, 65_550])
def test_a_non_finite_gradient_makes_the_norm_non_finite(value: float, position: int) -> None:
    gradient = np.ones(65_551, np.float32)
    gradient[position] = value
    norm = global_norm({"a": parameter_sum(tile_sums(gradient)), "b": 1.0})
    assert not math.isfinite(norm)
    with pytest.raises(ValueError, match="skip this step"):
        clip_coefficient(norm, 1.0)
    with pytest.raises(ValueError, match="skip this step"):
        clip_coefficient(norm, None)


def test_clip_coefficient() -> None:
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(1.0 - 1e-6, 1.0) == 1.0
    assert clip_coefficient(0.0, 1e-9) == float(np.float32(1e-9 / 1e-6))
    assert clip_coefficient(123.0, None) == 1.0
    assert clip_coefficient(3.0, 1.0) == float(np.float32(1.0 / (3.0 + 1e-6)))
    assert clip_coefficient(3.0, 1.0) != 1.0 / (3.0 + 1e-6)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_max_norm_that_would_spoil_gradients_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm is"):
        clip_coefficient(1.0, max_norm)


@pytest.mark.parametrize(
    "gradient",
    [np.zeros(8), np.zeros((2, 4), np.float32), np.zeros(8, np.float32)[::2]],
    ids=["dtype", "2-D", "strided"],
)
def test_gradients_that_are_not_flat_float32_are_refused(gradient: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="contiguous 1-D array of float32"):
        tile_sums(gradient)


def test_a_read_only_gradient_is_fine() -> None:
    gradient = gradient_of(100, seed=7)
    expected = tile_sums(gradient)
    gradient.flags.writeable = False
    np.testing.assert_array_equal(tile_sums(gradient), expected)


def test_warm_up() -> None:
    warm_up()
