"""The global gradient norm, defined so that no plan, thread count or order of arrival changes a bit of it.

Each parameter is cut into tiles of 65,536 elements from its first element on. In a tile, lane j of 32 adds
the squares of elements j, j + 32, j + 64, ... in this order in float64; the lanes are added in order 0 to 31,
a parameter's tiles in order, the parameters in the order of their names; the norm is the square root. Squares
of float32 values are exact in float64, so a fused multiply-add rounds no differently. Padding by zeros adds
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]  # no stubs exist
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from optim.kernels_compile import compiled
from optim.kernels_intrinsics import widen

TILE_ELEMENTS: Final = 65_536
_NUM_LANES: Final = 32
# Keeps the coefficient finite for a norm of zero; torch.nn.utils.clip_grad_norm_ uses the same.
_CLIP_EPSILON: Final = 1e-6

# numba declares no types for these.
alloca_once_value: Any = cgutils.alloca_once_value
for_range: Any = cgutils.for_range
array_struct: Any = make_array

_FLOATS: Final = ir.VectorType(ir.FloatType(), _NUM_LANES)
_BITS: Final = ir.VectorType(ir.IntType(32), _NUM_LANES)
_HALVES: Final = ir.VectorType(ir.IntType(16), _NUM_LANES)
_DOUBLES: Final = ir.VectorType(ir.DoubleType(), _NUM_LANES)


def _add_rows(_context: Any, g: Any, start: Any, num_rows: Any, lanes: Any) -> Any:
    """lanes[j] = sum of g[start + 32 * row + j] ** 2 over the rows in their order, for all lanes j at once.

    (float32[n] or uint16[n] of bfloat16's bits, int64, int64, float64[32]) -> None. One vector of 32 float64 that
    stays in registers; from plain loops LLVM keeps the lanes in memory and takes four times as long.
    """
    is_narrow = g.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        g, start, num_rows, lanes = arguments
        g_data = array_struct(signature.args[0])(context, builder, value=g).data
        lanes_data = array_struct(signature.args[3])(context, builder, value=lanes).data
        sums = alloca_once_value(builder, ir.Constant(_DOUBLES, [0.0] * _NUM_LANES))
        with for_range(builder, num_rows) as loop:
            index = builder.add(start, builder.mul(loop.index, ir.Constant(loop.index.type, _NUM_LANES)))
            address = builder.gep(g_data, [index])
            if is_narrow:
                halves = builder.load(builder.bitcast(address, _HALVES.as_pointer()), align=2)
                shift = ir.Constant(_BITS, [16] * _NUM_LANES)
                floats = builder.bitcast(builder.shl(builder.zext(halves, _BITS), shift), _FLOATS)
            else:
                floats = builder.load(builder.bitcast(address, _FLOATS.as_pointer()), align=4)
            values = builder.fpext(floats, _DOUBLES)
            builder.store(builder.fadd(builder.load(sums), builder.fmul(values, values)), sums)
        builder.store(builder.load(sums), builder.bitcast(lanes_data, _DOUBLES.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(g, types.int64, types.int64, lanes), generate


add_rows: Any = intrinsic(_add_rows)


@compiled
def _tile_sums(g: Any, sums: NDArray[np.float64]) -> None:
    lanes = np.empty(_NUM_LANES, np.float64)
    for tile in range(sums.size):
        start = tile * TILE_ELEMENTS
        end = min(start + TILE_ELEMENTS, g.size)
        num_full_rows = (end - start) // _NUM_LANES
        add_rows(g, start, num_full_rows, lanes)
        row_start = start + num_full_rows * _NUM_LANES
        for lane in range(end - row_start):
            value = np.float64(widen(g[row_start + lane]))
            lanes[lane] += value * value
        total = 0.0
        for lane in range(_NUM_LANES):
            total += lanes[lane]
        sums[tile] = total


def tile_sums(g: NDArray[np.float32] | NDArray[np.uint16]) -> NDArray[np.float64]:
    """Sums of squares of a gradient's tiles: float32[n], or uint16[n] the bits of bfloat16, -> new float64[ceil(n / 65536)].

    For a part of a parameter, pass a slice that starts at a multiple of TILE_ELEMENTS and ends at one or at
    the parameter's end; the parts' results, concatenated, are the whole's. Blocks the calling thread, without
    the GIL. g, in host memory, is only read. NaN and infinity give sums that are not finite. ValueError for another dtype or
    layout.
    """
    if g.dtype not in (np.float32, np.uint16) or g.ndim != 1 or not g.flags.c_contiguous:
        raise ValueError(
            f"the gradient is {g.dtype}{list(g.shape)} with strides {g.strides}, but tiles are cut from flat "
            f"memory: pass a contiguous 1-D array of float32, or of bfloat16's bits as uint16"
        )
    sums = np.empty(-(-g.size // TILE_ELEMENTS), np.float64)
    _tile_sums(g, sums)
    return sums


def warm_up() -> None:
    """Compile `tile_sums`, or load it from numba's cache: `optim.kernels.warm_up` does not know of it."""
    tile_sums(np.zeros(1, np.float32))
    tile_sums(np.zeros(1, np.uint16))


def parameter_sum(tile_sums: NDArray[np.float64]) -> float:
    """Add one parameter's tile sums, float64[num_tiles] in the order of the tiles; 0.0 for none."""
    return _sequential_sum(tile_sums.tolist())


def global_norm(sums_by_name: Mapping[str, float]) -> float:
    """The norm over all parameters, from each one's `parameter_sum`; the order of the mapping is ignored."""
    return math.sqrt(_sequential_sum([sums_by_name[name] for name in sorted(sums_by_name)]))


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What to multiply gradients with: max_norm / (norm + 1e-6) rounded to float32 where below 1, else 1.0.

    `max_norm` None turns clipping off. ValueError for a norm that is not finite (no factor repairs such a
    step) and for a max_norm that is no positive number.
    """
    if not math.isfinite(norm):
        raise ValueError(f"the gradient norm is {norm}, and no factor repairs such gradients: skip this step")
    if max_norm is None:
        return 1.0
    if not max_norm > 0.0:
        raise ValueError(f"max_norm is {max_norm}, which would spoil every gradient: pass a positive number or None")
    coefficient = max_norm / (norm + _CLIP_EPSILON)
    return float(np.float32(coefficient)) if coefficient < 1.0 else 1.0


def _sequential_sum(values: list[float]) -> float:
    # Not sum(): from Python 3.12 on it compensates its rounding, and bits would depend on the Python version.
    total = 0.0
    for value in values:
        total += value
    return total
