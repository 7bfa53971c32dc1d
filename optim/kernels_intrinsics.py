"""What Python has no words for: fused multiply-adds, bits of floats, and arithmetic that stays in 32 bits.

With numba's own 64-bit integers LLVM would make all vectors half as long, and it never fuses on its own what
torch's compiler did.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]  # no stubs exist
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

# numba declares no types for these.
_array_struct: Any = make_array
_populate: Any = populate_array
_alloca: Any = cgutils.alloca_once

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_MAGNITUDE_MASK: Final = 0x7FFFFFFF


def _word(value: int) -> Any:
    return ir.Constant(_I32, value)


def _scratch(_context: Any, num_elements: Any) -> Any:
    """float32[num_elements] on the stack, not initialised; a number known when compiling, one array for each call.

    LLVM knows that nothing else points there, and need not ask before it vectorises.
    """
    array = types.Array(types.float32, 1, "C")

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        size = num_elements.literal_value
        memory = _alloca(builder, ir.ArrayType(_F32, size))
        memory.align = 64
        item_bytes = context.get_constant(types.intp, 4)
        result = _array_struct(array)(context, builder)
        _populate(
            result,
            data=builder.bitcast(memory, _F32.as_pointer()),
            shape=[context.get_constant(types.intp, size)],
            strides=[item_bytes],
            itemsize=item_bytes,
            meminfo=None,
        )
        return result._getvalue()

    return array(num_elements), generate


def _fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _widen(_context: Any, value: Any) -> Any:
    """float32, or the bits of a bfloat16 as uint16 -> float32, exactly."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _word(16)), _F32)

    return types.float32(value), generate


def _join_halves(_context: Any, high: Any, low: Any) -> Any:
    """(uint16, uint16) -> float32: the sum undoes the carry that rounding half up put into the high half."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        high_bits = builder.shl(builder.zext(arguments[0], _I32), _word(16))
        return builder.bitcast(builder.add(high_bits, builder.sext(arguments[1], _I32)), _F32)

    return types.float32(types.uint16, types.uint16), generate


def _high_half(_context: Any, value: Any) -> Any:
    """float32 -> uint16: the bfloat16 nearest to value, halves rounded away from zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.add(builder.bitcast(arguments[0], _I32), _word(0x8000))
        return builder.trunc(builder.lshr(bits, _word(16)), _I16)

    return types.uint16(types.float32), generate


def _low_half(_context: Any, value: Any) -> Any:
    """float32 -> uint16: the lower 16 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.trunc(builder.bitcast(arguments[0], _I32), _I16)

    return types.uint16(types.float32), generate


def _max_magnitude(_context: Any, largest: Any, value: Any) -> Any:
    """The larger of largest and value's bits without the sign; a NaN's are larger than any number's."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        largest, value = arguments
        magnitude = builder.and_(builder.bitcast(value, _I32), _word(_MAGNITUDE_MASK))
        return builder.select(builder.icmp_unsigned(">", magnitude, largest), magnitude, largest)

    return types.uint32(types.uint32, types.float32), generate


def _max_bits(_context: Any, largest: Any, value: Any) -> Any:
    """`max_magnitude` of a value that is not negative, or NaN of any sign."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        largest, value = arguments[0], builder.bitcast(arguments[1], _I32)
        return builder.select(builder.icmp_unsigned(">", value, largest), value, largest)

    return types.uint32(types.uint32, types.float32), generate


def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 that these 32 bits are."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.uint32), generate


def _folded(builder: Any, x: Any, shift: int) -> Any:
    return builder.xor(x, builder.lshr(x, _word(shift)))


def _last_round(builder: Any, x: Any) -> Any:
    return _folded(builder, builder.mul(x, _word(0x846CA68B)), 16)


def _random_bits(_context: Any, key: Any, start: Any, index: Any) -> Any:
    """(uint32, int64, int64) -> uint32: a hash of the key and of start + index modulo 2**32.

    The mixer is `lowbias32` of https://github.com/skeeto/hash-prospector (public domain), a bijection made so that
    every input bit flips every output bit with a probability close to one half.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        key, start, index = arguments
        x = builder.xor(builder.add(builder.trunc(start, _I32), builder.trunc(index, _I32)), key)
        x = builder.mul(_folded(builder, x, 16), _word(0x7FEB352D))
        return _last_round(builder, _folded(builder, x, 15))

    return types.uint32(types.uint32, types.int64, types.int64), generate


def _bits_of_float(_context: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), generate


def _mix(_context: Any, bits: Any) -> Any:
    """uint32 -> uint32: the last round of `random_bits`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _last_round(builder, arguments[0])

    return types.uint32(types.uint32), generate


def _low_random(_context: Any, bits: Any) -> Any:
    """uint32 -> uint16: the lower 16 bits, for the first of two roundings."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.trunc(arguments[0], _I16)

    return types.uint16(types.uint32), generate


def _high_random(_context: Any, bits: Any) -> Any:
    """uint32 -> uint16: the upper 16 bits, for the second of two roundings."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.trunc(builder.lshr(arguments[0], _word(16)), _I16)

    return types.uint16(types.uint32), generate


def _round_to_bfloat16(_context: Any, value: Any, random: Any) -> Any:
    """(float32, uint16) -> uint16: bits of a bfloat16 beside value, the farther one the less likely.

    Over all random numbers the mean is value itself, of either sign. The carry of the sum leads to the next number.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, random = arguments
        bits = builder.add(builder.bitcast(value, _I32), builder.zext(random, _I32))
        return builder.trunc(builder.lshr(bits, _word(16)), _I16)

    return types.uint16(types.float32, types.uint16), generate


def _keep_above_zero(_context: Any, bits: Any, value: Any) -> Any:
    """(uint16, float32) -> uint16: the bits of the smallest bfloat16 above zero if zero came of a value above zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits, value = builder.zext(arguments[0], _I32), builder.bitcast(arguments[1], _I32)
        least = builder.select(builder.icmp_unsigned("<", value, _word(1)), value, _word(1))
        return builder.trunc(builder.select(builder.icmp_unsigned(">", bits, least), bits, least), _I16)

    return types.uint16(types.uint16, types.float32), generate


def _round_to_int8(_context: Any, fixed: Any, random: Any) -> Any:
    """(float32, uint16) -> int8: a whole number beside fixed / 65536, the farther one the less likely."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        fixed, random = builder.fptosi(arguments[0], _I32), builder.zext(arguments[1], _I32)
        return builder.trunc(builder.ashr(builder.add(fixed, random), _word(16)), _I8)

    return types.int8(types.float32, types.uint16), generate


def _round_root(_context: Any, x: Any, random: Any) -> Any:
    """(float32, uint16) -> uint8: a whole number beside x, such that its square is x ** 2 on average.

    0 <= x <= 255. Of c and c + 1, c + 1 is taken with the probability (x**2 - c**2) / ((c + 1)**2 - c**2). Never 0
    where x is above zero.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, random = arguments
        one, zero = ir.Constant(_F32, 1.0), ir.Constant(_F32, 0.0)
        # In floats, where LLVM makes one masked instruction of a condition and what depends on it.
        c = builder.call(builder.module.declare_intrinsic("llvm.trunc", [_F32]), [x])
        excess = builder.fma(builder.fneg(c), c, builder.fmul(x, x))
        unit = ir.Constant(_F32, 2.0**-16)  # of the random number
        distance = builder.fma(c, ir.Constant(_F32, 2.0**-15), unit)
        threshold = builder.fmul(builder.sitofp(builder.zext(random, _I32), _F32), distance)
        code = builder.select(builder.fcmp_ordered(">", excess, threshold), builder.fadd(c, one), c)
        above_zero = builder.select(builder.fcmp_ordered(">", code, one), code, one)
        code = builder.select(builder.fcmp_ordered(">", x, zero), above_zero, zero)
        return builder.trunc(builder.fptosi(code, _I32), _I8)

    return types.uint8(types.float32, types.uint16), generate


scratch: Any = intrinsic(prefer_literal=True)(_scratch)
fma: Any = intrinsic(_fma)
widen: Any = intrinsic(_widen)
join_halves: Any = intrinsic(_join_halves)
high_half: Any = intrinsic(_high_half)
low_half: Any = intrinsic(_low_half)
max_magnitude: Any = intrinsic(_max_magnitude)
max_bits: Any = intrinsic(_max_bits)
float_of_bits: Any = intrinsic(_float_of_bits)
bits_of_float: Any = intrinsic(_bits_of_float)
random_bits: Any = intrinsic(_random_bits)
mix: Any = intrinsic(_mix)
low_random: Any = intrinsic(_low_random)
high_random: Any = intrinsic(_high_random)
round_to_bfloat16: Any = intrinsic(_round_to_bfloat16)
keep_above_zero: Any = intrinsic(_keep_above_zero)
round_to_int8: Any = intrinsic(_round_to_int8)
round_root: Any = intrinsic(_round_root)
