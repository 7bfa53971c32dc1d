"""AdamW's arithmetic on one chunk of host memory: compiled, single-threaded, without the GIL.

The numbers are those of `torch.optim.AdamW(fused=True)` (or `Adam(fused=True)`) on CPU in float32, bit for
bit, on tensors whose length is a multiple of 64 (torch's scalar tail rounds differently). The kernels here
treat every element alike, so any cut of a tensor into chunks gives the same bits.

A float32 master may be stored split in two halves:

    high = (bits + 0x8000) >> 16     the bfloat16 weight, rounded half up: what the model computes with
    low  = bits & 0xFFFF             what high lost

`bits = (high << 16) + sign_extended(low)`, modulo 2**32: a low half of 0x8000 or more was rounded up.
Rounding half up turns the NaN 0x7FFFFFFF into -0 and the largest finite floats into infinity; such masters
are counted so that the caller can refuse them.

Legend: p master weight, m first moment, v second moment, g gradient; 1-D, contiguous, of one length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]  # no stubs exist
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

UInt16Array = NDArray[np.uint16]
Float32Array = NDArray[np.float32]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_MAGNITUDE_MASK = 0x7FFFFFFF
# Magnitudes from here on are infinities and NaNs.
_INFINITY_BITS = np.uint32(0x7F800000)
# Magnitudes from here on are those, and the finite floats that round half up to a bfloat16 infinity.
_OVERFLOWING_HIGH_BITS = np.uint32(0x7F7F8000)
# The kernels count in 32 bits.
_MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class AdamWScalars:
    """What one optimizer step multiplies with: derived in float64 as torch derives it, used in float32."""

    decay: float
    """Factor on the weight before the update (decoupled weight decay); 1.0 without."""
    l2: float
    """Weight of p added to the gradient (Adam's weight decay); 0.0 without."""
    lerp_weight: float
    """1 - beta1: how far m moves towards the gradient."""
    beta2: float
    square_weight: float
    """1 - beta2."""
    step_size: float
    """lr / (1 - beta1 ** step)."""
    bias_correction2_sqrt: float
    eps: float

    @classmethod
    def at_step(
        cls,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        decoupled: bool = True,
    ) -> AdamWScalars:
        """Derive the scalars of optimizer step `step`, counted from 1 as torch does.

        `decoupled` is AdamW's weight decay; False is Adam's, added to the gradient. ValueError for values
        that torch refuses and for steps below 1.
        """
        if step < 1:
            raise ValueError(f"step is {step}, but Adam counts its steps from 1: pass steps_taken_before + 1")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, which Adam cannot use: pass a finite value of at least 0")
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value}, which gives no decaying average: pass a value in [0, 1)")
        return cls(
            decay=1.0 - lr * weight_decay if decoupled else 1.0,
            l2=0.0 if decoupled else weight_decay,
            lerp_weight=1.0 - beta1,
            beta2=beta2,
            square_weight=1.0 - beta2,
            step_size=lr / (1.0 - beta1**step),
            bias_correction2_sqrt=math.sqrt(1.0 - beta2**step),
            eps=eps,
        )

    def kernel_arguments(self) -> tuple[np.float32 | bool, ...]:
        """The tuple that the compiled kernels take after their arrays and the gradient scale."""
        lerp_weight = np.float32(self.lerp_weight)
        # torch.lerp starts from the nearer end, so that weights of 0 and 1 are exact.
        from_moment = bool(abs(lerp_weight) < np.float32(0.5))
        return (
            np.float32(self.decay),
            np.float32(self.l2),
            lerp_weight if from_moment else lerp_weight - np.float32(1.0),
            from_moment,
            np.float32(self.beta2),
            np.float32(self.square_weight),
            np.float32(-self.step_size),
            np.float32(self.bias_correction2_sqrt),
            np.float32(self.eps),
        )


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a module's function with numba on its first call; it then runs without the GIL.

    The machine code is kept where numba finds a writable folder; where it finds none, every process compiles.
    The function itself must not raise OSError.
    """
    try:
        dispatcher = _njit(function, cache=True)
    except RuntimeError:
        # "no locator available": neither __pycache__ nor the user's cache folder is writable.
        dispatcher = _njit(function, cache=False)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return dispatcher(*args, **kwargs)
        except OSError:
            # The machine code could not be saved (disk full, or read-only by now). numba registers it before
            # it saves it and saves it before it runs it: nothing has run yet, and the second call just runs.
            return dispatcher(*args, **kwargs)

    return call


def _njit(function: Callable[_P, _R], cache: bool) -> Callable[_P, _R]:
    # No fast math: it would reorder and contract. error_model "numpy": dividing by zero gives infinity,
    # without a branch that keeps LLVM from vectorising.
    dispatcher: Callable[_P, _R] = numba.njit(
        cache=cache, nogil=True, fastmath=False, error_model="numpy", boundscheck=False
    )(function)
    return dispatcher


def _fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once. Explicit, since LLVM never contracts on its own and torch's compiler did."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _join_halves(_context: Any, high: Any, low: Any) -> Any:
    """(uint16, uint16) -> float32: the sum undoes the carry that rounding half up put into the high half."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        high_bits = builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(builder.add(high_bits, builder.sext(arguments[1], _I32)), _F32)

    return types.float32(types.uint16, types.uint16), generate


def _high_half(_context: Any, value: Any) -> Any:
    """float32 -> uint16: the bfloat16 nearest to value, halves rounded away from zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.add(builder.bitcast(arguments[0], _I32), ir.Constant(_I32, 0x8000))
        return builder.trunc(builder.lshr(bits, ir.Constant(_I32, 16)), _I16)

    return types.uint16(types.float32), generate


def _low_half(_context: Any, value: Any) -> Any:
    """float32 -> uint16: the lower 16 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.trunc(builder.bitcast(arguments[0], _I32), _I16)

    return types.uint16(types.float32), generate


def _count_from(_context: Any, count: Any, value: Any, limit: Any) -> Any:
    """count + 1 if value's bits without the sign are at least limit, as a NaN's always are; else count.

    In 32 bits: with numba's own 64-bit integers LLVM would make all vectors half as long.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count, value, limit = arguments
        magnitude = builder.and_(builder.bitcast(value, _I32), ir.Constant(_I32, _MAGNITUDE_MASK))
        return builder.add(count, builder.zext(builder.icmp_unsigned(">=", magnitude, limit), _I32))

    return types.int32(types.int32, types.float32, types.uint32), generate


fma: Any = intrinsic(_fma)
join_halves: Any = intrinsic(_join_halves)
high_half: Any = intrinsic(_high_half)
low_half: Any = intrinsic(_low_half)
count_from: Any = intrinsic(_count_from)


# Not saved on its own: it becomes part of its callers.
@functools.partial(_njit, cache=False)
def _update(
    p: Any,
    m: Any,
    v: Any,
    g: Any,
    coefficient: Any,
    from_moment: Any,
    beta2: Any,
    square_weight: Any,
    negative_step_size: Any,
    bias_correction2_sqrt: Any,
    eps: Any,
) -> tuple[Any, Any, Any]:
    """One element's new (p, m, v), after weight decay."""
    m = fma(coefficient, g - m, m if from_moment else g)
    v = fma(square_weight * g, g, v * beta2)
    denominator = np.sqrt(v) / bias_correction2_sqrt + eps
    return p + negative_step_size * m / denominator, m, v


@compiled
def _adamw_split(
    high: UInt16Array,
    low: UInt16Array,
    m: Float32Array,
    v: Float32Array,
    g: Float32Array,
    gradient_scale: Any,
    decay: Any,
    l2: Any,
    coefficient: Any,
    from_moment: Any,
    beta2: Any,
    square_weight: Any,
    negative_step_size: Any,
    bias_correction2_sqrt: Any,
    eps: Any,
) -> np.int32:
    num_refused = np.int32(0)
    for i in range(high.size):
        master = join_halves(high[i], low[i])
        gradient = g[i] * gradient_scale
        # Multiplying by 1.0 is exact, but adding 0.0 * p is not (it turns -0.0 into 0.0), hence the branch.
        if l2 != 0.0:
            gradient = fma(master, l2, gradient)
        new_p, new_m, new_v = _update(
            master * decay, m[i], v[i], gradient, coefficient, from_moment,
            beta2, square_weight, negative_step_size, bias_correction2_sqrt, eps,
        )  # fmt: skip
        high[i] = high_half(new_p)
        low[i] = low_half(new_p)
        m[i] = new_m
        v[i] = new_v
        num_refused = count_from(num_refused, new_p, _OVERFLOWING_HIGH_BITS)
    return num_refused


@compiled
def _adamw_float32(
    p: Float32Array,
    m: Float32Array,
    v: Float32Array,
    g: Float32Array,
    gradient_scale: Any,
    decay: Any,
    l2: Any,
    coefficient: Any,
    from_moment: Any,
    beta2: Any,
    square_weight: Any,
    negative_step_size: Any,
    bias_correction2_sqrt: Any,
    eps: Any,
) -> np.int32:
    num_refused = np.int32(0)
    for i in range(p.size):
        gradient = g[i] * gradient_scale
        if l2 != 0.0:
            gradient = fma(p[i], l2, gradient)
        new_p, new_m, new_v = _update(
            p[i] * decay, m[i], v[i], gradient, coefficient, from_moment,
            beta2, square_weight, negative_step_size, bias_correction2_sqrt, eps,
        )  # fmt: skip
        p[i] = new_p
        m[i] = new_m
        v[i] = new_v
        num_refused = count_from(num_refused, new_p, _INFINITY_BITS)
    return num_refused


@compiled
def _split(p: Float32Array, high: UInt16Array, low: UInt16Array) -> np.int32:
    num_refused = np.int32(0)
    for i in range(p.size):
        value = p[i]
        high[i] = high_half(value)
        low[i] = low_half(value)
        num_refused = count_from(num_refused, value, _OVERFLOWING_HIGH_BITS)
    return num_refused


@compiled
def _join(high: UInt16Array, low: UInt16Array, p: Float32Array) -> None:
    for i in range(p.size):
        p[i] = join_halves(high[i], low[i])


def adamw_split(
    high: UInt16Array,
    low: UInt16Array,
    m: Float32Array,
    v: Float32Array,
    g: Float32Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
) -> int:
    """Update a split master and its moments in place; return how many new masters must be refused.

    high, low: uint16[n]; m, v, g: float32[n]; contiguous host memory that does not overlap; g is only read.
    The gradient is first multiplied by `gradient_scale` (clipping) in float32. Blocks the calling thread,
    without the GIL. Counted are masters that are NaN or infinite or whose high half would be: then the arrays
    hold no usable step, and the caller goes back to what it had. ValueError for another shape, dtype or
    layout.
    """
    _check({"high": high, "low": low}, {"m": m, "v": v, "g": g})
    return int(_adamw_split(high, low, m, v, g, np.float32(gradient_scale), *scalars.kernel_arguments()))


def adamw_float32(
    p: Float32Array,
    m: Float32Array,
    v: Float32Array,
    g: Float32Array,
    scalars: AdamWScalars,
    gradient_scale: float = 1.0,
) -> int:
    """Update a float32 master and its moments in place; return how many new masters are NaN or infinite.

    p, m, v, g: float32[n]; otherwise as `adamw_split`.
    """
    _check({}, {"p": p, "m": m, "v": v, "g": g})
    return int(_adamw_float32(p, m, v, g, np.float32(gradient_scale), *scalars.kernel_arguments()))


def split_master(p: Float32Array, high: UInt16Array, low: UInt16Array) -> int:
    """Split p: float32[n] into high, low: uint16[n]; return how many values `adamw_split` would refuse.

    `join_master` gives p back exactly, refused values too. Blocks, without the GIL. ValueError as in
    `adamw_split`.
    """
    _check({"high": high, "low": low}, {"p": p})
    return int(_split(p, high, low))


def join_master(high: UInt16Array, low: UInt16Array, p: Float32Array) -> None:
    """Write the float32[n] master that `split_master` took apart into p.

    Blocks, without the GIL. ValueError as in `adamw_split`.
    """
    _check({"high": high, "low": low}, {"p": p})
    _join(high, low, p)


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache, so that no first step pays for it.

    Takes seconds the first time on a machine. Never fails for want of a place to keep the machine code.
    """
    halves = [np.zeros(64, np.uint16) for _ in range(2)]
    p, m, v, g = (np.zeros(64, np.float32) for _ in range(4))
    scalars = AdamWScalars.at_step(1e-3, 0.9, 0.999, 1e-8, 0.0, step=1)
    adamw_split(halves[0], halves[1], m, v, g, scalars)
    adamw_float32(p, m, v, g, scalars)
    split_master(p, halves[0], halves[1])
    join_master(halves[0], halves[1], p)


def _check(halves: dict[str, UInt16Array], floats: dict[str, Float32Array]) -> None:
    # The kernels check no bounds: a wrong length would write past the end. A strided view would compile anew.
    num_elements = next(iter(floats.values())).size
    if num_elements > _MAX_ELEMENTS:
        raise ValueError(f"{num_elements} elements are more than one call can count: pass slices below 2**31")
    for arrays, dtype in ((halves, np.uint16), (floats, np.float32)):
        for name, array in arrays.items():
            if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
                raise ValueError(
                    f"{name} is {array.dtype}{list(array.shape)} with strides {array.strides}, but the "
                    f"kernel reads flat memory: pass a contiguous 1-D {np.dtype(dtype).name} array"
                )
            if array.size != num_elements:
                raise ValueError(
                    f"{name} has {array.size} elements beside arrays of {num_elements}, but the kernel walks "
                    f"them together: pass slices of equal length"
                )
