"""The compiled AdamW against torch's fused one, bit for bit, and the split master against its definition."""

from __future__ import annotations

import errno
import importlib.util
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import numba.core.caching
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optim import kernels
from optim.kernels import (
    AdamWScalars,
    adamw_float32,
    adamw_split,
    join_master,
    split_master,
    warm_up,
)

NUM_ELEMENTS = 64 * 67
NUM_STEPS = 30
OVERFLOW_BITS = 0x7F7F8000  # the smallest float32 that rounds half up to a bfloat16 infinity

OPTIONS = [
    # lr, beta1, beta2, eps, weight_decay, decoupled
    pytest.param((1e-3, 0.9, 0.999, 1e-8, 0.0, True), id="no-decay"),
    pytest.param((1e-3, 0.9, 0.999, 1e-8, 0.01, True), id="adamw"),
    pytest.param((3e-5, 0.9, 0.95, 1e-6, 0.1, True), id="other-betas-and-eps"),
    pytest.param((1e-2, 0.3, 0.5, 1e-8, 0.1, True), id="lerp-from-the-gradient"),
    pytest.param((1e-2, 0.0, 0.0, 1e-10, 0.0, True), id="zero-betas"),
    pytest.param((0.0, 0.9, 0.999, 1e-8, 0.1, True), id="zero-lr"),
    pytest.param((1e-3, 0.9, 0.999, 1e-8, 0.01, False), id="adam-l2"),
    pytest.param((1e-3, 0.5, 0.99, 1e-8, 0.0, False), id="adam-no-decay"),
]

# Elsewhere torch's compiler contracts other operations, or none; the kernels compute the same everywhere.
CPU = torch.backends.cpu.get_cpu_capability()
REASON = f"torch's fused Adam rounds differently on a {CPU} CPU"
needs_torch_with_fma = pytest.mark.skipif(CPU not in ("AVX2", "AVX512"), reason=REASON)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def _torch_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def bits(array: Any) -> NDArray[np.uint32]:
    values: NDArray[np.float32] = np.ascontiguousarray(array, np.float32)
    return values.view(np.uint32)


def difficult_weights(rng: np.random.Generator, size: int = NUM_ELEMENTS) -> NDArray[np.float32]:
    weights = (rng.standard_normal(size) * 0.02).astype(np.float32)
    weights[rng.random(size) < 0.02] = 0.0
    weights[rng.random(size) < 0.02] = -0.0
    weights[rng.random(size) < 0.02] = 1e-40  # denormal
    huge = rng.random(size) < 0.02
    weights[huge] = rng.standard_normal(int(huge.sum())) * 1e30
    return weights


def difficult_gradient(rng: np.random.Generator, size: int = NUM_ELEMENTS) -> NDArray[np.float32]:
    magnitudes = 10.0 ** rng.integers(-12, 5, size)
    gradient = (rng.standard_normal(size) * magnitudes).astype(np.float32)
    gradient[rng.random(size) < 0.1] = 0.0
    gradient[rng.random(size) < 0.05] = -0.0
    gradient[rng.random(size) < 0.05] = 1e-42  # denormal; its square is zero
    gradient[rng.random(size) < 0.05] = 3e-21  # its square is denormal
    return gradient


def split_by_definition(p: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    raw = bits(p).astype(np.uint64)
    return ((raw + 0x8000) >> 16).astype(np.uint16), (raw & 0xFFFF).astype(np.uint16)


def join_by_definition(high: NDArray[np.uint16], low: NDArray[np.uint16]) -> NDArray[np.float32]:
    high_bits, low_bits = high.astype(np.int64), low.astype(np.int64)
    raw = ((high_bits - (low_bits >= 0x8000)) << 16) | low_bits
    return (raw % 2**32).astype(np.uint32).view(np.float32)


def assert_every_step_is_torchs(
    options: tuple[float, float, float, float, float, bool], size: int, num_steps: int, compared_every: int = 1
) -> None:
    """Both kernels on `size` elements beside torch on the same, padded with zeros to whole vectors."""
    lr, beta1, beta2, eps, weight_decay, decoupled = options
    rng = np.random.default_rng(size)
    p = difficult_weights(rng, size)
    high, low = split_by_definition(p)
    m, v = np.zeros_like(p), np.zeros_like(p)
    split_m, split_v = np.zeros_like(p), np.zeros_like(p)
    padded_size = -(-size // 64) * 64
    parameter = torch.nn.Parameter(torch.zeros(padded_size))
    parameter.data[:size] = torch.from_numpy(p)
    parameter.grad = torch.zeros(padded_size)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer: torch.optim.Optimizer = kind(
        [parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True
    )

    for step in range(1, num_steps + 1):
        gradient = difficult_gradient(rng, size)
        parameter.grad[:size] = torch.from_numpy(gradient)
        optimizer.step()
        scalars = AdamWScalars.at_step(lr, beta1, beta2, eps, weight_decay, step, decoupled)
        assert adamw_float32(p, m, v, gradient, scalars) is False
        assert adamw_split(high, low, split_m, split_v, gradient, scalars) is False
        if step % compared_every != 0:
            continue
        state = optimizer.state[parameter]
        for ours, split, theirs in (
            (p, join_by_definition(high, low), parameter.detach()),
            (m, split_m, state["exp_avg"]),
            (v, split_v, state["exp_avg_sq"]),
        ):
            np.testing.assert_array_equal(bits(ours), bits(theirs[:size].numpy()))
            np.testing.assert_array_equal(bits(split), bits(theirs[:size].numpy()))


@needs_torch_with_fma
@pytest.mark.usefixtures("_torch_threads")
@pytest.mark.parametrize("options", OPTIONS)
def test_every_step_has_the_bits_of_torch_fused(options: tuple[float, float, float, float, float, bool]) -> None:
    assert_every_step_is_torchs(options, NUM_ELEMENTS, NUM_STEPS)


@needs_torch_with_fma
@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("options", OPTIONS)
def test_two_hundred_steps_have_the_bits_of_torch_fused(
    options: tuple[float, float, float, float, float, bool], size: int
) -> None:
    assert_every_step_is_torchs(options, size, 200)


@needs_torch_with_fma
def test_a_large_odd_size_has_the_bits_of_torch_fused() -> None:
    assert_every_step_is_torchs((1e-3, 0.9, 0.999, 1e-8, 0.01, True), 1_000_003, 3)


@pytest.mark.slow
@needs_torch_with_fma
@pytest.mark.parametrize("options", OPTIONS)
def test_two_hundred_steps_of_a_large_odd_size_have_the_bits_of_torch_fused(
    options: tuple[float, float, float, float, float, bool],
) -> None:
    assert_every_step_is_torchs(options, 1_000_003, 200, compared_every=20)


@needs_torch_with_fma
@pytest.mark.parametrize("steps_before", [999, 123_456, 5_000_000])
def test_late_steps_have_the_bits_of_torch_fused(steps_before: int) -> None:
    rng = np.random.default_rng(steps_before)
    p, gradient = difficult_weights(rng), difficult_gradient(rng)
    m, v = p * np.float32(0.1), np.abs(p) * np.float32(0.01)
    parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=2e-4, fused=True)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(steps_before)),
        "exp_avg": torch.from_numpy(m.copy()),
        "exp_avg_sq": torch.from_numpy(v.copy()),
    }
    parameter.grad = torch.from_numpy(gradient.copy())
    optimizer.step()

    scalars = AdamWScalars.at_step(2e-4, 0.9, 0.999, 1e-8, 1e-2, steps_before + 1)
    assert adamw_float32(p, m, v, gradient, scalars) is False
    np.testing.assert_array_equal(bits(p), bits(parameter.detach().numpy()))
    np.testing.assert_array_equal(bits(m), bits(optimizer.state[parameter]["exp_avg"].numpy()))
    np.testing.assert_array_equal(bits(v), bits(optimizer.state[parameter]["exp_avg_sq"].numpy()))


@pytest.mark.parametrize("decoupled", [True, False])
def test_gradient_scale_is_one_float32_multiplication(decoupled: bool) -> None:
    rng = np.random.default_rng(1)
    p, gradient = difficult_weights(rng), difficult_gradient(rng)
    scale = float(np.float32(0.3))
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, 1, decoupled)
    results = []
    for scaled_gradient, gradient_scale in ((gradient, scale), (gradient * np.float32(scale), 1.0)):
        high, low = split_by_definition(p)
        m, v = np.zeros_like(p), np.zeros_like(p)
        untouched = scaled_gradient.copy()
        adamw_split(high, low, m, v, scaled_gradient, scalars, gradient_scale)
        np.testing.assert_array_equal(bits(scaled_gradient), bits(untouched))
        whole, whole_m, whole_v = p.copy(), np.zeros_like(p), np.zeros_like(p)
        adamw_float32(whole, whole_m, whole_v, scaled_gradient, scalars, gradient_scale)
        results.append([join_by_definition(high, low), m, v])
        results.append([whole, whole_m, whole_v])
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(bits(one), bits(other))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=6), size=st.integers(0, 1000))
def test_any_cut_into_chunks_gives_the_same_bits(cuts: list[int], size: int) -> None:
    rng = np.random.default_rng(size)
    p, gradient = difficult_weights(rng)[:size].copy(), difficult_gradient(rng)[:size].copy()
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, 3)
    high, low = split_by_definition(p)
    m, v = np.zeros_like(p), np.zeros_like(p)
    whole_p, whole_m, whole_v = p.copy(), np.zeros_like(p), np.zeros_like(p)
    adamw_float32(whole_p, whole_m, whole_v, gradient, scalars)

    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        adamw_split(high[part], low[part], m[part], v[part], gradient[part], scalars)
    np.testing.assert_array_equal(bits(join_by_definition(high, low)), bits(whole_p))
    np.testing.assert_array_equal(bits(m), bits(whole_m))
    np.testing.assert_array_equal(bits(v), bits(whole_v))


def test_split_and_join_follow_their_definition_on_every_kind_of_float() -> None:
    # Every high half, with the low halves around the carry and a random one.
    highs = np.arange(2**16, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234], np.uint32)
    p = (highs[:, None] | lows[None, :]).reshape(-1).view(np.float32)
    high, low, joined = np.empty(p.size, np.uint16), np.empty(p.size, np.uint16), np.empty_like(p)

    assert split_master(p, high, low) is True
    join_master(high, low, joined)

    expected_high, expected_low = split_by_definition(p)
    np.testing.assert_array_equal(high, expected_high)
    np.testing.assert_array_equal(low, expected_low)
    np.testing.assert_array_equal(joined.view(np.uint32), p.view(np.uint32))
    with np.errstate(invalid="ignore"):
        rounded = (high.astype(np.uint32) << 16).view(np.float32)
        must_be_refused = ~np.isfinite(p) | ~np.isfinite(rounded)
    assert split_master(p[~must_be_refused], high[~must_be_refused], low[~must_be_refused]) is False
    assert np.count_nonzero(must_be_refused) > 1000
    for value in p[must_be_refused]:
        assert split_master(np.array([value]), high[:1], low[:1]) is True


def test_high_half_is_the_nearest_bfloat16() -> None:
    p = np.random.default_rng(2).standard_normal(4096).astype(np.float32)
    p = p[(bits(p) & 0xFFFF) != 0x8000]  # ties are where half-up and half-to-even may differ
    high, low = np.empty(p.size, np.uint16), np.empty(p.size, np.uint16)
    assert split_master(p, high, low) is False
    nearest = torch.from_numpy(p).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(high.view(np.int16), nearest)


@pytest.mark.parametrize("position", [0, 64, 129, 256, 700])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_gradients_are_refused(value: float, position: int) -> None:
    gradient = np.full(701, 0.5, np.float32)
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    for is_refused in (False, True):
        if is_refused:
            gradient[position] = value
        p = np.ones(701, np.float32)
        high, low = split_by_definition(p)
        assert adamw_float32(p, np.zeros_like(p), np.zeros_like(p), gradient, scalars) is is_refused
        assert adamw_split(high, low, np.zeros_like(p), np.zeros_like(p), gradient, scalars) is is_refused


@pytest.mark.parametrize(
    ("bits_of_master", "refused_split", "refused_whole"),
    [
        (OVERFLOW_BITS - 1, False, False),
        # A float32 master keeps the three that are finite.
        (OVERFLOW_BITS, True, False),
        (0x7F7FFFFF, True, False),
        (0x80000000 | OVERFLOW_BITS, True, False),
        (0x7FFFFFFF, True, True),
        (0xFFFFFFFF, True, True),
    ],
)
def test_masters_whose_high_half_overflows_are_refused(
    bits_of_master: int, refused_split: bool, refused_whole: bool
) -> None:
    p = np.array([0, bits_of_master, 0x3F800000], np.uint32).view(np.float32)
    high, low = np.empty(p.size, np.uint16), np.empty(p.size, np.uint16)
    scalars = AdamWScalars.at_step(0.0, 0.9, 0.999, 1e-8, 0.0, 1)
    zeros = np.zeros(p.size, np.float32)

    assert split_master(p, high, low) is refused_split
    assert adamw_split(high, low, zeros.copy(), zeros.copy(), zeros, scalars) is refused_split
    assert adamw_float32(p.copy(), zeros.copy(), zeros.copy(), zeros, scalars) is refused_whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0}, "step is 0"),
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.5}, "beta2 is -0.5"),
    ],
)
def test_hyperparameters_that_adam_cannot_use_are_refused(changes: dict[str, Any], message: str) -> None:
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    with pytest.raises(ValueError, match=message):
        AdamWScalars.at_step(**(options | changes))


def test_arrays_that_the_kernel_would_misread_are_refused() -> None:
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    floats = np.zeros(64, np.float32)
    halves = np.zeros(64, np.uint16)
    with pytest.raises(ValueError, match="v has 63 elements, but 64"):
        adamw_float32(floats, floats.copy(), np.zeros(63, np.float32), floats.copy(), scalars)
    with pytest.raises(ValueError, match="g is float64"):
        adamw_float32(floats, floats.copy(), floats.copy(), np.zeros(64), scalars)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"m is float32.* with strides"):
        adamw_float32(floats, np.zeros(128, np.float32)[::2], floats.copy(), floats.copy(), scalars)
    with pytest.raises(ValueError, match="low has 65 elements"):
        adamw_split(halves, np.zeros(65, np.uint16), floats, floats.copy(), floats.copy(), scalars)
    with pytest.raises(ValueError, match="high is int16"):
        join_master(np.zeros(64, np.int16), halves, floats)
    with pytest.raises(ValueError, match=r"p is float32\[8, 8\]"):
        split_master(floats.reshape(8, 8), halves, halves.copy())


def fresh_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module once more, with nothing compiled yet."""
    spec = importlib.util.spec_from_file_location("fresh_kernels", kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def assert_updates_like_the_first(module: ModuleType) -> None:
    rng = np.random.default_rng(3)
    gradient = difficult_gradient(rng)
    results = []
    for each in (kernels, module):
        p, m, v = np.ones_like(gradient), np.zeros_like(gradient), np.zeros_like(gradient)
        scalars = each.AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
        assert each.adamw_float32(p, m, v, gradient, scalars) is False
        results.append(p)
    np.testing.assert_array_equal(bits(results[0]), bits(results[1]))


def test_warm_up_works_twice() -> None:
    warm_up()
    warm_up()


def test_without_any_place_for_a_cache_the_kernels_compile_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    module = fresh_kernels(monkeypatch)
    module.warm_up()
    assert_updates_like_the_first(module)


def test_a_cache_that_cannot_be_written_does_not_stop_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    num_attempts = 0

    def disk_full(*_arguments: object) -> None:
        nonlocal num_attempts
        num_attempts += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", disk_full)
    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "load", lambda *_arguments: None)
    module = fresh_kernels(monkeypatch)
    module.warm_up()
    assert num_attempts > 0
    assert_updates_like_the_first(module)


def test_a_gradient_of_bfloat16_is_widened_without_loss() -> None:
    bits = np.arange(65536, dtype=np.uint16)  # all of them, NaNs too
    of_torch = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    assert np.array_equal(kernels.widen_gradient(bits).view(np.uint32), of_torch.view(np.uint32))
    assert kernels.widen_gradient(bits[:0]).size == 0
