"""FP8 on the wire: how `dispatch` quantises tokens. The specification, in operations that every
backend rounds alike, so that all transports agree on every bit.

A token of D numbers is cut into blocks of 128, the last one shorter. A block becomes a float32
`scale` and, for each number x, an eight-bit code of float8_e4m3fn (1 sign, 4 exponent and 3
mantissa bits, largest number 448, no infinity):

    amax  = the largest finite |x| of the block, 0 if there is none
    scale = amax * f32(1/448), or with wire_scale="power_of_two" the smallest power of two that is
            at least amax / 448; at least 2^-116
    code  = e4m3(x * r),  r = f32(1 / scale)

with every product, quotient and conversion rounded to nearest even, and codes limited to finite
ones. The receiver makes of it `float32(code) * scale`, rounded to the dtype of the group. Hence

    |x' - x| <= max(2^-4 |x|, 2^-10 scale) (1 + 2^-20)       before the last rounding:

half a unit in the last place of a normal e4m3, half of its smallest subnormal below. Zeros keep
their sign. Numbers that are subnormal in float32 come out as zeros.

NaN and infinities come out again, and leave the rest of their block as it is: the scale of a block
that holds one carries a minus sign, and there 0x7f and 0xff mean the infinities and 0x80 NaN (zeros
have no sign there). Rows that are handed over as FP8 (`rows_dtype`) have positive scales: an
infinity is a NaN with its sign then, as float8_e4m3fn has no other word for it.

Why integers: XLA flushes subnormals to zero on hosts, rounds no float32 quotient correctly on
GPUs, and fuses products with sums. The two products below are of normal numbers, and everything
else happens on bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

BLOCK = 128
DTYPE = "float8_e4m3fn"
SCALES = ("amax", "power_of_two")

U32, F32 = jnp.uint32, jnp.float32
# Bits of float32 numbers.
_MAGNITUDE, _INFINITY, _MANTISSA, _ONE = 0x7FFFFFFF, 0x7F800000, 0x7FFFFF, 0x800000
_LOST_BITS = 20  # of a float32 mantissa
_LEAST_EXPONENT = 127 - 116
_INVERSE_448 = 0x3B124925  # 1/448, rounded
_MANTISSA_OF_448 = 0x600000
# Codes.
_NAN, _LARGEST, _240, _MINUS = 0x7F, 0x7E, 0x77, 0x80


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Rows in FP8 with a scale for each block of 128: `row[i] ~ values[i] * scales[i // 128]`.

    What `dispatch` returns for rows with `rows_dtype=jnp.float8_e4m3fn`, for a matrix product that
    takes such operands. Both arrays are zero from `plan.num_rows` on.

    Attributes:
      values: [C, D] float8_e4m3fn.
      scales: [C, ceil(D / 128)] float32, none negative.
    """

    values: Float[Array, "C D"]
    scales: Float32[Array, "C B"]

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "C D"]:
        """The rows in floating point, rounded once: the same as without `rows_dtype`, but for
        infinities, which are NaN.
        """
        return (self.values.astype(F32) * _spread(self.scales, self.shape[-1])).astype(dtype)


def num_blocks(dim: int) -> int:
    """Scales of a token."""
    return -(-dim // BLOCK)


def row_bytes(dim: int) -> int:
    """Bytes of a quantised token: codes and scales."""
    return dim + 4 * num_blocks(dim)


def quantize(
    x: Float[Array, "T D"], scale_rule: str
) -> tuple[UInt8[Array, "T D"], Float32[Array, "T B"]]:
    """Codes and scales of tokens; `scale_rule` is one of `SCALES`."""
    # Of what the program rounded x to, not of what it was before that.
    x = lax.optimization_barrier(x)
    bits = lax.bitcast_convert_type(x.astype(F32), U32)
    magnitude = bits & U32(_MAGNITUDE)
    finite = magnitude < _INFINITY
    special = jnp.any(~_blocks(finite, True), axis=-1)
    amax = jnp.max(_blocks(jnp.where(finite, magnitude, U32(0))), axis=-1)
    scale = _amax_scale(amax) if scale_rule == "amax" else _power_of_two_scale(amax)
    scaled = _float(magnitude) * _spread(_float(_reciprocal(scale)), x.shape[-1])
    code = jnp.minimum(_encode(scaled), _spread(_largest_code(scale, x.dtype), x.shape[-1]))
    code = code | (bits >> 24 & U32(_MINUS))
    code = jnp.where(_spread(special, x.shape[-1]), _special_code(code, bits), code)
    return code.astype(jnp.uint8), jnp.where(special, -_float(scale), _float(scale))


def dequantize(
    codes: UInt8[Array, "C D"], scales: Float32[Array, "C B"], dtype: Any
) -> Float[Array, "C D"]:
    """Rows in `dtype` of what `quantize` made."""
    signed = _spread(scales, codes.shape[-1])
    rows = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(F32) * jnp.abs(signed)
    words = {_NAN: jnp.inf, _NAN | _MINUS: -jnp.inf, _MINUS: jnp.nan}
    for code, number in words.items():
        rows = jnp.where((codes == code) & (signed < 0), F32(number), rows)
    return lax.optimization_barrier(rows.astype(dtype))


def hand_over(codes: UInt8[Array, "C D"], scales: Float32[Array, "C B"]) -> QuantizedRows:
    """Rows in FP8 of what `quantize` made."""
    lost = (codes == _MINUS) & (_spread(scales, codes.shape[-1]) < 0)
    values = lax.bitcast_convert_type(jnp.where(lost, jnp.uint8(_NAN), codes), jnp.float8_e4m3fn)
    return QuantizedRows(values, jnp.abs(scales))


def _amax_scale(amax: jax.Array) -> jax.Array:
    """Bits of the scale. A product that is subnormal, flushed or not, is below the least scale; 448
    times the scale of the largest float32 is finite.
    """
    scale = lax.bitcast_convert_type(_float(amax) * _float(U32(_INVERSE_448)), U32)
    return jnp.maximum(scale, U32(_LEAST_EXPONENT << 23))


def _power_of_two_scale(amax: jax.Array) -> jax.Array:
    """448 is 1.75 * 2^8: a mantissa above 1.75 needs the next power."""
    above = (amax + U32(_MANTISSA - _MANTISSA_OF_448)) >> 23
    return jnp.maximum(above, U32(_LEAST_EXPONENT + 8)) - U32(8) << 23


def _reciprocal(scale: jax.Array) -> jax.Array:
    """Bits of 1 / scale, rounded to nearest: 24 bits of the quotient by long division.

    With the mantissa m in (2^23, 2^24) the quotient is 2^47 / m; halves do not occur, as m would
    have to divide a power of two.
    """
    mantissa, exponent = (scale & U32(_MANTISSA)) | U32(_ONE), scale >> 23
    quotient, rest = jnp.zeros_like(scale), jnp.full_like(scale, _ONE)
    for _ in range(3):
        rest = rest << 8
        quotient, rest = quotient << 8 | rest // mantissa, rest % mantissa
    quotient = quotient + (2 * rest > mantissa).astype(U32)
    inverse = (U32(253) - exponent << 23) + (quotient - U32(_ONE))
    return jnp.where(mantissa == _ONE, U32(254) - exponent << 23, inverse)


def _encode(y: jax.Array) -> jax.Array:
    """The code of a y >= 0 up to 449, rounded to nearest even."""
    bits = lax.bitcast_convert_type(y, U32)
    normal = _shift_rounded(bits, U32(_LOST_BITS)) - U32(127 - 7 << 3)
    # Below 2^-6 a code counts units of 2^-9. With mantissa m and biased exponent e, y is
    # m 2^(e - 150), hence m 2^(e - 141) units.
    mantissa = (bits & U32(_MANTISSA)) | U32(_ONE)
    shift = jnp.minimum(U32(141) - jnp.minimum(bits >> 23, U32(121)), U32(25))
    return jnp.where(bits < 127 - 6 << 23, _shift_rounded(mantissa, shift), normal)


def _shift_rounded(n: jax.Array, shift: jax.Array) -> jax.Array:
    """Of n / 2^shift the nearest integer, ties to even."""
    one = U32(1)
    return (n + (one << shift - one) - one + (n >> shift & one)) >> shift


def _largest_code(scale: jax.Array, dtype: Any) -> jax.Array:
    """448, or 240 where 256 times a power of two would be too large for the dtype."""
    too_large = jnp.finfo(dtype).maxexp - 8 + 127 << 23
    return jnp.where(scale == too_large, U32(_240), U32(_LARGEST))


def _special_code(code: jax.Array, bits: jax.Array) -> jax.Array:
    """The code in a block with a NaN or an infinity."""
    magnitude, minus = bits & U32(_MAGNITUDE), bits >> 24 & U32(_MINUS)
    code = jnp.where(code == _MINUS, U32(0), code)
    code = jnp.where(magnitude == _INFINITY, minus | U32(_NAN), code)
    return jnp.where(magnitude > _INFINITY, U32(_MINUS), code)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, F32)


def _blocks(a: jax.Array, fill: Any = 0) -> jax.Array:
    """[..., D] as [..., ceil(D / 128), 128], filled up."""
    missing = -a.shape[-1] % BLOCK
    a = lax.pad(a, jnp.asarray(fill, a.dtype), [(0, 0, 0)] * (a.ndim - 1) + [(0, missing, 0)])
    return a.reshape(*a.shape[:-1], -1, BLOCK)


def _spread(per_block: jax.Array, dim: int) -> jax.Array:
    """[..., ceil(D / 128)] as [..., D]."""
    return jnp.repeat(per_block, BLOCK, axis=-1)[..., :dim]
