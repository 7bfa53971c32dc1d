"""Adam's arithmetic on one element in float32, in three stages: what every kernel does, whatever it reads and writes.

A kernel walks tiles of `TILE_ELEMENTS` in the first-level cache and does the first stages of one tile in the same
loops as the last of the tile before it. From the gradient to the weight is a chain of some 80 cycles, with a root and
two divisions, or one where moments are rounded and torch's bits are no reference; of whole chains a core holds only two
or three at a time, of stages enough to keep its units busy.

Legend: p master weight, m first moment, v second moment, g gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from optim.kernels_compile import inlined
from optim.kernels_intrinsics import fma, high_half, join_halves, low_half
from optim.moments import MOMENT_BLOCK_ELEMENTS

UInt16Array = NDArray[np.uint16]
Float32Array = NDArray[np.float32]

# Magnitudes from here on are infinities and NaNs.
INFINITY_BITS: Final = np.uint32(0x7F800000)
# Magnitudes from here on are those, and the finite floats that round half up to a bfloat16 infinity.
OVERFLOWING_HIGH_BITS: Final = np.uint32(0x7F7F8000)
# Also a block of 8-bit moments, whose scale is known when its first stages are done.
TILE_ELEMENTS: Final = MOMENT_BLOCK_ELEMENTS


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

    def kernel_arguments(self, gradient_scale: float) -> tuple[tuple[np.float32 | None, ...], ...]:
        """What `update_moments`, `denominator` and `update_master` take after the element, in this order.

        What is None is known to be so when a kernel is compiled, which leaves out the arithmetic.
        """
        lerp_weight = np.float32(self.lerp_weight)
        # torch.lerp starts from the nearer end, so that weights of 0 and 1 are exact.
        from_moment = abs(lerp_weight) < np.float32(0.5)
        moments = (
            np.float32(gradient_scale),
            np.float32(self.l2) if self.l2 else None,
            lerp_weight if from_moment else None,
            None if from_moment else lerp_weight - np.float32(1.0),
            np.float32(self.beta2),
            np.float32(self.square_weight),
        )
        return (
            moments,
            (np.float32(self.bias_correction2_sqrt), np.float32(self.eps)),
            (np.float32(self.decay), np.float32(-self.step_size)),
        )

    def folded_arguments(self, gradient_scale: float) -> tuple[tuple[np.float32 | None, ...], ...]:
        """The same for `fold_gradient` and moments that are rounded by chance, for which torch's bits are no reference.

        Factors become one where two would follow each other: a division and four multiplications less. The correction of
        v's bias is part of eps and of the step size (the end of section 2 of arXiv 1412.6980). The last tuple is what
        old m, v, and root of v are multiplied with.
        """
        # L2's part of the gradient is not clipped: with it the scale has to come first.
        scale = 1.0 if self.l2 else gradient_scale
        correction = self.bias_correction2_sqrt
        return (
            (
                np.float32(gradient_scale) if self.l2 else None,
                np.float32(self.l2) if self.l2 else None,
                np.float32(self.lerp_weight * scale),
                np.float32(math.sqrt(self.square_weight) * scale),
            ),
            (None, np.float32(self.eps * correction)),
            (np.float32(self.decay), np.float32(-self.step_size * correction)),
            (np.float32(1.0 - self.lerp_weight), np.float32(self.beta2), np.float32(math.sqrt(self.beta2))),
        )


@inlined
def update_moments(
    p: Any,
    m: Any,
    v: Any,
    g: Any,
    gradient_scale: Any,
    l2: Any,
    weight_from_moment: Any,
    weight_from_gradient: Any,
    beta2: Any,
    square_weight: Any,
) -> tuple[Any, Any]:
    """One element's new m and v; the rest are the first `AdamWScalars.kernel_arguments`."""
    g = g * gradient_scale
    if l2 is not None:
        # Not with 0.0: adding 0.0 * p is not exact, it turns -0.0 into 0.0.
        g = fma(p, l2, g)
    new_m = g
    if weight_from_moment is not None:
        new_m = fma(weight_from_moment, g - m, m)
    if weight_from_gradient is not None:
        new_m = fma(weight_from_gradient, g - m, g)
    return new_m, fma(square_weight * g, g, v * beta2)


@inlined
def fold_gradient(
    p: Any, decayed_m: Any, decayed_v: Any, g: Any, gradient_scale: Any, l2: Any, weight: Any, root_weight: Any
) -> tuple[Any, Any]:
    """One element's new m and v, of the old ones already decayed; the rest are the first `AdamWScalars.folded_arguments`."""
    if l2 is not None:
        g = fma(p, l2, g * gradient_scale)
    root = g * root_weight
    return fma(weight, g, decayed_m), fma(root, root, decayed_v)


@inlined
def denominator(root: Any, bias_correction2_sqrt: Any, eps: Any) -> Any:
    """What m is divided by, of the root of the new v and the second `AdamWScalars.kernel_arguments`."""
    if bias_correction2_sqrt is not None:
        root = root / bias_correction2_sqrt
    return root + eps


@inlined
def update_master(p: Any, m: Any, denominator: Any, decay: Any, negative_step_size: Any) -> Any:
    """One element's new p, of its new m and the third `AdamWScalars.kernel_arguments`."""
    return p * decay + negative_step_size * m / denominator


@inlined
def tiles(num_elements: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two runs of tiles of one size: where the first begins, their size, where the last begins.

    First all the whole ones, or the only one if it is none; then one of what is left over, which may be empty. A kernel
    begins a run's first tile before its loop, and finishes the last one behind it. One loop whose conditions told the
    ends apart would begin a tile before the arrays, and LLVM, which asks before the loops whether arrays overlap, would
    find that they do where one lies behind the other, and would not vectorise.
    """
    num_whole = num_elements // TILE_ELEMENTS
    if num_whole == 0:
        return (0, num_elements, 0), (num_elements, 0, num_elements)
    rest = num_whole * TILE_ELEMENTS
    return (0, TILE_ELEMENTS, rest - TILE_ELEMENTS), (rest, num_elements - rest, rest)


def load_master(masters: Any, i: Any) -> Any:
    """For compiled functions: the float32 master number i >= 0 of (p,) or of (high, low)."""


def store_master(masters: Any, i: Any, value: Any) -> Any:
    """For compiled functions: the reverse of `load_master`."""


# Indices are made unsigned: signed ones numba compares with zero, which keeps LLVM from vectorising.
@overload(load_master)
def _load_master(masters: Any, i: Any) -> Any:
    def load_float32(masters: Any, i: Any) -> Any:
        return masters[0][np.uintp(i)]

    def load_halves(masters: Any, i: Any) -> Any:
        return join_halves(masters[0][np.uintp(i)], masters[1][np.uintp(i)])

    return load_float32 if len(masters) == 1 else load_halves


@overload(store_master)
def _store_master(masters: Any, i: Any, value: Any) -> Any:
    def store_float32(masters: Any, i: Any, value: Any) -> Any:
        masters[0][np.uintp(i)] = value

    def store_halves(masters: Any, i: Any, value: Any) -> Any:
        masters[0][np.uintp(i)] = high_half(value)
        masters[1][np.uintp(i)] = low_half(value)

    return store_float32 if len(masters) == 1 else store_halves


def check_arrays(num_elements: int, dtypes: tuple[type[np.generic], ...], **arrays: NDArray[Any]) -> None:
    """ValueError unless each is contiguous, 1-D, of `num_elements` and of one of `dtypes`.

    The kernels check no bounds: a wrong length would write past the end. A strided view would compile anew.
    """
    for name, array in arrays.items():
        if array.dtype not in dtypes or array.ndim != 1 or not array.flags.c_contiguous:
            wanted = " or ".join(np.dtype(dtype).name for dtype in dtypes)
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)} with strides {array.strides}, but the "
                f"kernel reads flat memory: pass a contiguous 1-D {wanted} array"
            )
        if array.size != num_elements:
            raise ValueError(
                f"{name} has {array.size} elements, but {num_elements} are needed beside the other arrays, with which "
                f"the kernel walks it together: pass slices that belong together"
            )
