"""AdamW on moments of 16 and 8 bits, bit for bit against plain numpy, and within rounding against the float32 kernels.

The float32 kernels themselves are torch's, bit for bit (test_kernels.py).
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optim import kernels
from optim.kernels import AdamWScalars, adamw_float32, adamw_split, join_master, split_master, stochastic_key

Float32Array = NDArray[np.float32]

FORMATS = ["bfloat16", "int8"]
MASTERS = ["split", "float32"]


@dataclasses.dataclass
class State:
    """One parameter: its master, (high, low) or (p,), and its stored moments."""

    masters: list[NDArray[Any]]
    moments: list[NDArray[Any]]

    @classmethod
    def of(cls, p: Float32Array, master: str, moment_dtype: str) -> State:
        n, num_blocks = p.size, -(-p.size // 256)
        masters: list[NDArray[Any]] = [p.copy()]
        if master == "split":
            masters = [np.empty(n, np.uint16), np.empty(n, np.uint16)]
            split_master(p, *masters)
        if moment_dtype == "bfloat16":
            return cls(masters, [np.zeros(n, np.uint16), np.zeros(n, np.uint16)])
        scales = [np.zeros(num_blocks, np.float32) for _ in range(2)]
        return cls(masters, [np.zeros(n, np.int8), scales[0], np.zeros(n, np.uint8), scales[1]])

    def part(self, start: int, stop: int) -> State:
        blocks = slice(start // 256, -(-stop // 256))
        wholes = [slice(start, stop)] * 2
        indices = wholes if len(self.moments) == 2 else [wholes[0], blocks, wholes[1], blocks]
        return State(
            [half[start:stop] for half in self.masters],
            [array[index] for array, index in zip(self.moments, indices, strict=True)],
        )

    def copy(self) -> State:
        return State([half.copy() for half in self.masters], [array.copy() for array in self.moments])

    def update(self, g: NDArray[Any], scalars: AdamWScalars, scale: float = 1.0, key: int = 0, first: int = 0) -> bool:
        master = "split" if len(self.masters) == 2 else "float32"
        moment_dtype = "bfloat16" if len(self.moments) == 2 else "int8"
        kernel = getattr(kernels, f"adamw_{master}_{moment_dtype}")
        is_refused: bool = kernel(*self.masters, *self.moments, g, scalars, scale, key, first)
        return is_refused

    def p(self) -> Float32Array:
        if len(self.masters) == 1:
            return self.masters[0]
        p = np.empty(self.masters[0].size, np.float32)
        join_master(self.masters[0], self.masters[1], p)
        return p

    def decoded(self) -> tuple[Float32Array, Float32Array]:
        return decode(self.moments)

    def assert_equal(self, other: State) -> None:
        for ours, theirs in zip((*self.masters, *self.moments), (*other.masters, *other.moments), strict=True):
            np.testing.assert_array_equal(ours.view(f"u{ours.itemsize}"), theirs.view(f"u{theirs.itemsize}"))


# ------------------------------------------------------------------------------------ the codec in plain numpy


def decode(moments: list[NDArray[Any]]) -> tuple[Float32Array, Float32Array]:
    if len(moments) == 2:
        m, v = ((moment.astype(np.uint32) << 16).view(np.float32) for moment in moments)
        return m, v
    m_codes, m_scales, v_codes, v_scales = moments
    block = np.arange(m_codes.size) // 256
    root = v_codes.astype(np.float32) * v_scales[block]
    return m_codes.astype(np.float32) * m_scales[block], root * root


def random_words(key: int, first: int, n: int) -> NDArray[np.uint32]:
    """lowbias32 of https://github.com/skeeto/hash-prospector, on the index and the key."""
    return lowbias32(np.arange(first, first + n, dtype=np.uint64), key)


def block_words(key: int, first: int, n: int) -> NDArray[np.uint32]:
    """For 8 bits: the hash of the index in the block, xor that of the block, counted down from -1; mixed."""
    index = np.arange(first, first + n, dtype=np.int64)
    x = (lowbias32(index % 256, key) ^ lowbias32(-1 - index // 256, key)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def lowbias32(index: NDArray[Any], key: int) -> NDArray[np.uint32]:
    x = index.astype(np.uint32) ^ np.uint32(key)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def encode(m: Float32Array, v: Float32Array, moment_dtype: str, key: int, first: int) -> list[NDArray[Any]]:
    words = (random_words if moment_dtype == "bfloat16" else block_words)(key, first, m.size)
    chance_m, chance_v = words & 0xFFFF, words >> 16
    if moment_dtype == "bfloat16":
        new_m = ((m.view(np.uint32) + chance_m) >> 16).astype(np.uint16)
        new_v = ((v.view(np.uint32) + chance_v) >> 16).astype(np.uint16)
        return [new_m, np.where((new_v == 0) & (v > 0), np.uint16(1), new_v)]
    m_codes, v_codes = np.empty(m.size, np.int8), np.empty(m.size, np.uint8)
    scales = np.zeros((2, -(-m.size // 256)), np.float32)
    below_one = np.float32(1 - 2.0**-22)
    for number in range(scales.shape[1]):
        part = slice(256 * number, 256 * (number + 1))
        largest, root = np.abs(m[part]).max(), np.sqrt(v[part])
        y, x = np.zeros_like(root), np.zeros_like(root)
        if largest > 0:
            scales[0, number] = max(largest / np.float32(127), np.float32(2.0**-110))
            y = m[part] * (np.float32(65536) * below_one / scales[0, number])
        if root.max() > 0:
            scales[1, number] = max(root.max() / np.float32(255), np.float32(2.0**-63))
            x = root * (below_one / scales[1, number])
        m_codes[part] = np.floor((np.trunc(y).astype(np.float64) + chance_m[part]) / 65536)
        code = np.trunc(x)
        uniform = (chance_v[part] / 65536).astype(np.float32)
        code += x * x - code * code > uniform * (2 * code + 1)
        v_codes[part] = np.where(root > 0, np.maximum(code, 1), 0)
    return [m_codes, scales[0], v_codes, scales[1]]


def updated(state: State, g: Float32Array, scalars: AdamWScalars, scale: float) -> tuple[Float32Array, ...]:
    """p, m and v after a step, moments not rounded yet: the formulas of the low-bit kernels in plain numpy."""

    def fma(a: Any, b: Float32Array, c: Float32Array) -> Float32Array:
        # The product of two float32 is exact in float64.
        return (np.multiply(a, b, dtype=np.float64) + c.astype(np.float64)).astype(np.float32)

    one = np.float32
    p = state.p().copy()
    beta1, beta2 = one(1 - scalars.lerp_weight), one(scalars.beta2)
    if len(state.moments) == 2:
        m, v = decode(state.moments)
        decayed_m, decayed_v = m * beta1, v * beta2
    else:
        m_codes, m_scales, v_codes, v_scales = state.moments
        block = np.arange(p.size) // 256
        decayed_m = m_codes.astype(np.float32) * (m_scales * beta1)[block]
        decayed_root = v_codes.astype(np.float32) * (v_scales * one(np.sqrt(scalars.beta2)))[block]
        decayed_v = decayed_root * decayed_root
    if scalars.l2:
        g, scale = fma(one(scalars.l2), p, g * one(scale)), 1.0
    root = g * one(np.sqrt(scalars.square_weight) * scale)
    m, v = fma(one(scalars.lerp_weight * scale), g, decayed_m), fma(root, root, decayed_v)
    # The correction of v's bias is in the step size and in eps (the paper's section 2).
    correction = scalars.bias_correction2_sqrt
    divisor = np.sqrt(v) + one(scalars.eps * correction)
    return p * one(scalars.decay) + one(-scalars.step_size * correction) * m / divisor, m, v


def heavy_tailed(rng: np.random.Generator, n: int) -> Float32Array:
    gradient = (rng.standard_normal(n) * 10.0 ** rng.uniform(-8, 1, n)).astype(np.float32)
    gradient[rng.random(n) < 0.1] = 0.0
    gradient[rng.random(n) < 0.05] = 1e-42  # denormal; its square is zero
    gradient[rng.random(n) < 0.05] = 3e-21  # its square is denormal
    gradient[256:512] = 0.0  # a block of zeros
    gradient[512:768] *= np.float32(1e-20)  # and one that comes near them
    return gradient


# ------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
@pytest.mark.parametrize("moment_dtype", FORMATS)
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("size", [1, 255, 256, 1900])
def test_every_step_is_decode_update_encode(size: int, master: str, moment_dtype: str, decoupled: bool) -> None:
    rng = np.random.default_rng(size)
    state = State.of((rng.standard_normal(size) * 0.02).astype(np.float32), master, moment_dtype)
    for step in range(1, 31):
        gradient = heavy_tailed(rng, size)
        scalars = AdamWScalars.at_step(1e-3, 0.9, 0.99, 1e-8, 0.01, step, decoupled)
        key = stochastic_key(0, step, "weight")
        p, m, v = updated(state, gradient, scalars, 0.5)
        expected = State.of(p, master, moment_dtype)
        expected.moments = encode(m, v, moment_dtype, key, 256 * step)

        assert not state.update(gradient, scalars, 0.5, key, 256 * step)
        state.assert_equal(expected)


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam-l2"])
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_a_step_is_torchs_but_for_rounding(moment_dtype: str, beta1: float, decoupled: bool) -> None:
    size = 1900
    rng = np.random.default_rng(6)
    state = State.of((rng.standard_normal(size) * 0.02).astype(np.float32), "float32", moment_dtype)
    for step in range(1, 31):
        gradient = heavy_tailed(rng, size)
        scalars = AdamWScalars.at_step(1e-3, beta1, 0.99, 1e-8, 0.01, step, decoupled)
        (m, v), p = state.decoded(), state.p().copy()
        old_p, old_m = p.copy(), m.copy()
        folded = updated(state, gradient, scalars, 0.5)
        assert not adamw_float32(p, m, v, gradient, scalars, 0.5)
        # Of each result as many units in the last place as there are factors; of sums, of their larger part.
        unit, denormal = 2.0**-23, 1e-44
        added = np.abs(gradient * 0.5) + np.abs(scalars.l2 * old_p)
        assert (np.abs(folded[1] - m) <= 4 * unit * (np.abs(old_m) + added) + denormal).all()
        assert (np.abs(folded[2] - v) <= 8 * unit * v + denormal).all()
        divisor = np.sqrt(v) / scalars.bias_correction2_sqrt + scalars.eps
        step_of_p = scalars.step_size * (np.abs(old_m) + added) / divisor
        # The step size times m may be denormal before it is divided.
        tolerance = unit * np.abs(p) + 16 * unit * step_of_p + denormal / divisor
        assert (np.abs(folded[0] - p) <= tolerance).all()
        state.update(gradient, scalars, 0.5, stochastic_key(0, step, "weight"), 256 * step)


@pytest.mark.parametrize("moment_dtype", FORMATS)
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=5), first=st.sampled_from([0, 256 * 77, 2**32 - 512]))
def test_any_cut_gives_the_same_bits(moment_dtype: str, cuts: list[int], first: int) -> None:
    size = 1000
    rng = np.random.default_rng(0)
    whole = State.of(np.ones(size, np.float32), "split", moment_dtype)
    in_parts = whole.copy()
    if moment_dtype == "int8":
        cuts = [cut // 256 * 256 for cut in cuts]
    for step in (1, 2):
        gradient = heavy_tailed(rng, size)
        scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, step)
        whole.update(gradient, scalars, key=step, first=first)
        for start, stop in pairwise([0, *sorted(cuts), size]):
            in_parts.part(start, stop).update(gradient[start:stop], scalars, key=step, first=first + start)
    in_parts.assert_equal(whole)


@pytest.mark.parametrize("moment_dtype", ["float32", *FORMATS])
@pytest.mark.parametrize("master", MASTERS)
def test_a_bfloat16_gradient_is_the_float32_of_its_value(master: str, moment_dtype: str) -> None:
    size = 777
    rng = np.random.default_rng(1)
    raw = (heavy_tailed(rng, size).view(np.uint32) >> 16).astype(np.uint16)
    widened = (raw.astype(np.uint32) << 16).view(np.float32)
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    states = []
    for gradient in (raw, widened):
        state = State.of(np.ones(size, np.float32), master, "bfloat16" if moment_dtype == "float32" else moment_dtype)
        if moment_dtype == "float32":
            state.moments = [np.zeros(size, np.float32), np.zeros(size, np.float32)]
            update = adamw_split if master == "split" else adamw_float32
            assert not update(*state.masters, *state.moments, gradient, scalars, 0.3)
        else:
            assert not state.update(gradient, scalars, 0.3, key=5)
        states.append(state)
    states[0].assert_equal(states[1])


@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_the_mean_over_keys_is_the_float32_moment(moment_dtype: str) -> None:
    size, num_keys = 512, 4000
    rng = np.random.default_rng(2)
    gradient = rng.standard_normal(size).astype(np.float32)
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    m, v = np.zeros(size, np.float32), np.zeros(size, np.float32)
    adamw_float32(np.ones(size, np.float32), m, v, gradient, scalars)
    sums, squares = np.zeros((2, size)), np.zeros((2, size))
    empty = State.of(np.ones(size, np.float32), "float32", moment_dtype)
    for step in range(num_keys):
        state = empty.copy()
        state.update(gradient, scalars, key=stochastic_key(0, step, "weight"))
        drawn = np.array(state.decoded(), np.float64)
        sums += drawn
        squares += drawn**2
    mean = sums / num_keys
    deviation = np.sqrt(np.maximum(squares / num_keys - mean**2, 0) / num_keys)
    expected = np.array([m, v], np.float64)
    # Roots below one code are rounded up; everything else has its own value for its mean.
    fair = np.ones_like(expected, bool)
    if moment_dtype == "int8":
        for block in (slice(0, 256), slice(256, 512)):
            fair[1, block] = np.sqrt(v[block]) >= np.sqrt(v[block].max()) / 255
    assert fair.mean() > 0.98
    error = np.abs(mean - expected)[fair] / (deviation + 1e-5 * np.abs(expected))[fair]
    # Of 1,000 normal deviates the largest is about 3.3.
    assert error.max() < 5.0
    assert 0.6 < np.sqrt(np.mean(error**2)) < 1.2


@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_neighbours_and_successive_steps_are_rounded_independently(moment_dtype: str) -> None:
    size, num_steps = 4096, 40
    scalars = AdamWScalars.at_step(0.0, 0.9, 0.999, 1e-8, 0.0, 1)
    # In every block the largest element fixes the scale; the others lie between two codes.
    gradient = np.full(size, 1.0 + 0.37 / 127, np.float32) / 3
    gradient[::256] = 1.0
    rounded_up = []
    for step in range(num_steps):
        state = State.of(np.ones(size, np.float32), "float32", moment_dtype)
        state.update(gradient, scalars, key=stochastic_key(7, step, "weight"))
        for moment in state.decoded():
            others = np.delete(moment, np.arange(0, size, 256))
            assert np.unique(others).size == 2
            rounded_up.append(others == others.max())
    draws = np.array(rounded_up, np.float64)  # (steps * moments, elements)
    draws = (draws - draws.mean(axis=1, keepdims=True)) / draws.std(axis=1, keepdims=True)
    # Rows are different moments and steps, at one and the same element and at its neighbour.
    for shift in (0, 1, 2, 16):
        correlation = draws @ np.roll(draws, shift, axis=1).T / draws.shape[1]
        if shift == 0:
            np.fill_diagonal(correlation, 0.0)
        assert np.abs(correlation).max() < 5.5 / np.sqrt(draws.shape[1])
    # Nor is one block's pattern another's, or its opposite: 64 would be the norm then, 20 is that of random signs.
    blocks = draws.reshape(len(draws), size // 256, 255)
    assert np.linalg.norm(blocks, 2, axis=(1, 2)).max() < 24


@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_v_decays_as_it_should(moment_dtype: str) -> None:
    size, num_steps = 2048, 2000
    rng = np.random.default_rng(3)
    state = State.of(np.ones(size, np.float32), "float32", moment_dtype)
    state.update(rng.standard_normal(size).astype(np.float32), AdamWScalars.at_step(0.0, 0.9, 0.0, 1e-8, 0.0, 1))
    _, before = state.decoded()
    nothing = np.zeros(size, np.float32)
    for step in range(2, num_steps + 2):
        scalars = AdamWScalars.at_step(0.0, 0.9, 0.999, 1e-8, 0.0, step)
        assert not state.update(nothing, scalars, key=stochastic_key(0, step, "weight"))
    _, after = state.decoded()
    # To the nearest, v would still be what it was.
    wanted = 0.999**num_steps
    assert wanted == pytest.approx(0.135, abs=1e-3)
    assert after.sum() / before.sum() == pytest.approx(wanted, rel=0.03)
    # The smallest v are lifted to one code; from a tenth of the largest root on they average out on their own.
    usual = before > 0.01 * before.reshape(-1, 256).max(axis=1).repeat(256)
    assert after[usual].sum() / before[usual].sum() == pytest.approx(wanted, rel=0.03)
    small = usual & (before < np.median(before))
    assert after[small].sum() / before[small].sum() == pytest.approx(wanted, rel=0.1)
    assert (after > 0).all()


@pytest.mark.parametrize("beta1", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_m_reaches_a_steady_gradient(moment_dtype: str, beta1: float) -> None:
    size = 1024
    # The largest of each block is 20 times as large as the rest.
    gradient = np.full(size, 0.05, np.float32)
    gradient[::256] = 1.0
    state = State.of(np.ones(size, np.float32), "float32", moment_dtype)
    mean = np.zeros(size)
    num_steps, num_averaged = int(8 / (1 - beta1)), 200
    for step in range(1, num_steps + num_averaged + 1):
        scalars = AdamWScalars.at_step(0.0, beta1, 0.999, 1e-8, 0.0, step)
        state.update(gradient, scalars, key=stochastic_key(0, step, "weight"))
        if step > num_steps:
            mean += state.decoded()[0] / num_averaged
    usual = np.arange(size) % 256 != 0
    assert mean[usual].mean() == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("moment_dtype", FORMATS)
@pytest.mark.parametrize("master", MASTERS)
def test_v_is_zero_only_where_it_always_was(master: str, moment_dtype: str) -> None:
    size = 3000
    rng = np.random.default_rng(4)
    state = State.of(np.ones(size, np.float32), master, moment_dtype)
    touched = np.zeros(size, bool)
    v = np.zeros(size, np.float32)
    for step in range(1, 21):
        gradient = heavy_tailed(rng, size)
        scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, step)
        state.update(gradient, scalars, key=step)
        adamw_float32(np.ones(size, np.float32), np.zeros(size, np.float32), v, gradient, scalars)
        touched |= v > 0
        np.testing.assert_array_equal(state.decoded()[1] > 0, touched)


@pytest.mark.parametrize("moment_dtype", FORMATS)
@pytest.mark.parametrize("master", MASTERS)
def test_nothing_happens_to_zeros(master: str, moment_dtype: str) -> None:
    state = State.of(np.full(600, 0.5, np.float32), master, moment_dtype)
    before = state.copy()
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    assert not state.update(np.zeros(600, np.float32), scalars, key=1)
    state.assert_equal(before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e21, -1e21])
@pytest.mark.parametrize("position", [0, 255, 256, 699])
@pytest.mark.parametrize("moment_dtype", FORMATS)
@pytest.mark.parametrize("master", MASTERS)
def test_what_must_not_be_stored_is_refused(master: str, moment_dtype: str, position: int, value: float) -> None:
    # The square of 1e21 overflows float32; the new master of such a gradient is finite.
    gradient = np.full(700, 0.5, np.float32)
    gradient[position] = value
    state = State.of(np.ones(700, np.float32), master, moment_dtype)
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    assert state.update(gradient, scalars) is True


@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_a_v_from_2_to_the_127_on_is_refused(moment_dtype: str) -> None:
    # With a beta2 of 0, v is the gradient's square: finite both times.
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.0, 1e-8, 0.0, 1)
    for exponent, refused in ((63.25, False), (63.75, True)):
        state = State.of(np.ones(256, np.float32), "float32", moment_dtype)
        assert state.update(np.full(256, 2.0**exponent, np.float32), scalars) is refused


@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_masters_that_overflow_are_refused(moment_dtype: str) -> None:
    scalars = AdamWScalars.at_step(0.0, 0.9, 0.999, 1e-8, 0.0, 1)
    for bits, refused_split, refused_whole in (
        (0x7F7F7FFF, False, False),
        (0x7F7F8000, True, False),
        (0x7F7FFFFF, True, False),
        (0x7FC00000, True, True),
    ):
        p = np.array([0, bits], np.uint32).view(np.float32)
        for master, refused in (("split", refused_split), ("float32", refused_whole)):
            state = State.of(p, master, moment_dtype)
            assert state.update(np.zeros(2, np.float32), scalars) is refused


@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_a_least_squares_problem_converges_as_with_float32(moment_dtype: str) -> None:
    rng = np.random.default_rng(5)
    features, truth = rng.standard_normal((2048, 300)), rng.standard_normal(300)
    features *= 10.0 ** rng.uniform(-1, 0, 300)
    targets = features @ truth + 0.1 * rng.standard_normal(2048)

    def train(state: State | None) -> float:
        p, m, v = (np.zeros(300, np.float32) for _ in range(3))
        for step in range(1, 601):
            rows = np.random.default_rng(step).integers(0, 2048, 64)
            weights = (p if state is None else state.p()).astype(np.float64)
            gradient = features[rows].T @ (features[rows] @ weights - targets[rows]) / 64
            scalars = AdamWScalars.at_step(0.05 * (1 - step / 601), 0.9, 0.999, 1e-8, 0.0, step)
            if state is None:
                adamw_float32(p, m, v, gradient.astype(np.float32), scalars)
            else:
                state.update(gradient.astype(np.float32), scalars, key=stochastic_key(0, step, "weight"))
        weights = (p if state is None else state.p()).astype(np.float64)
        return float(np.mean((features @ weights - targets) ** 2))

    exact = train(None)
    assert exact < 0.02 * np.mean(targets**2)
    assert train(State.of(np.zeros(300, np.float32), "split", moment_dtype)) == pytest.approx(exact, rel=0.1)


def test_arrays_and_counters_that_the_kernels_would_misread_are_refused() -> None:
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    p, g = np.ones(257, np.float32), np.zeros(257, np.float32)
    bfloat16, int8 = State.of(p, "float32", "bfloat16"), State.of(p, "split", "int8")
    with pytest.raises(ValueError, match="first_element is 64, inside a block"):
        int8.update(g, scalars, first=64)
    with pytest.raises(ValueError, match="first_element is -256"):
        bfloat16.update(g, scalars, first=-256)
    with pytest.raises(ValueError, match="key is 4294967296"):
        int8.update(g, scalars, key=2**32)
    with pytest.raises(ValueError, match="g is float64"):
        int8.update(g.astype(np.float64), scalars)
    with pytest.raises(ValueError, match="g has 256 elements, but 257"):
        bfloat16.update(g[:256], scalars)
    with pytest.raises(ValueError, match="v_scales has 1 elements, but 2"):
        State(int8.masters, [*int8.moments[:3], np.zeros(1, np.float32)]).update(g, scalars)
    with pytest.raises(ValueError, match="m is uint8"):
        State(int8.masters, [int8.moments[2], *int8.moments[1:]]).update(g, scalars)
    with pytest.raises(ValueError, match="v is int16"):
        State(bfloat16.masters, [bfloat16.moments[0], bfloat16.moments[1].view(np.int16)]).update(g, scalars)


@pytest.mark.parametrize("moment_dtype", kernels.MOMENT_DTYPES)
def test_every_format_can_be_warmed_up(moment_dtype: str) -> None:
    kernels.warm_up(moment_dtype)


def test_an_unknown_format_cannot_be_warmed_up() -> None:
    with pytest.raises(ValueError, match="moment_dtype is 'float16'"):
        kernels.warm_up("float16")
