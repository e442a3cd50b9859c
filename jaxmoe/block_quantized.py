"""`BlockQuantizedExperts`: expert matrices in FP8, with a scale for each 128 x 128 numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

BLOCK = 128
DTYPE = jnp.float8_e4m3fn
F32 = jnp.float32
_LARGEST = 448.0
_LEAST_AMAX = 2.0**-100  # what a block of zeros is scaled by must be a normal number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockQuantizedExperts:
    """A stack of expert matrices in FP8, `W[e, i, o] ~ values[e, o, i] * scales[e, o // 128,
    i // 128]`; stands for a float [L, I, O].

    The values of an output channel lie side by side: FP8 tensor cores take both factors with the
    contraction along their rows.

    Attributes:
      values: [L, O, I] float8_e4m3fn.
      scales: [L, ceil(O / 128), ceil(I / 128)] float32, positive.
      master: [L, I, O], the floats that were quantised, or None. Products with the experts read
        `values`; gradients go to `master`, as though nothing had been rounded.
    """

    values: Float[Array, "L O I"]
    scales: Float32[Array, "L P B"]
    master: Float[Array, "L I O"] | None = None

    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """[L, I, O]: of the matrices, not of `values`."""
        experts, outputs, inputs = self.values.shape
        return experts, inputs, outputs

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "L I O"]:
        """The matrices in floating point, rounded once."""
        _, inputs, outputs = self.shape
        scales = jnp.repeat(jnp.repeat(self.scales, BLOCK, axis=1), BLOCK, axis=2)
        wide = self.values.astype(F32) * scales[:, :outputs, :inputs]
        return wide.swapaxes(1, 2).astype(dtype)


def quantize_blocks(
    w: Float[Array, "L I O"], *, keep_master: bool = False
) -> BlockQuantizedExperts:
    """Expert matrices in FP8 (e4m3) with the scale max |W| / 448 for each block of 128 x 128.

    With the scale s of a block, |W - W'| <= max((2^-4 + 2^-10) |W|, (2^-10 + 2^-19) s): three bits
    of significand, which some of XLA's backends round by way of float16.

    Args:
      w: [L, I, O] floats, finite.
      keep_master: whether the result holds `w` too, for its gradient (`master`).

    Raises:
      ValueError: not floats of that rank.
    """
    if w.ndim != 3 or not jnp.issubdtype(w.dtype, jnp.floating) or w.dtype == DTYPE:
        raise ValueError(
            f"`quantize_blocks`: the weights are {w.dtype}{list(w.shape)}; wanted floats "
            "[L, I, O], one matrix for each expert."
        )
    values, scales = _rounded(lax.stop_gradient(w))
    return BlockQuantizedExperts(values, scales, w if keep_master else None)


@jax.jit
def _rounded(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    experts, inputs, outputs = w.shape
    rest = [(0, 0), (0, -outputs % BLOCK), (0, -inputs % BLOCK)]
    wide = jnp.pad(w.swapaxes(1, 2).astype(F32), rest)
    blocks = wide.reshape(experts, wide.shape[1] // BLOCK, BLOCK, wide.shape[2] // BLOCK, BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=(2, 4), keepdims=True, initial=_LEAST_AMAX)
    scales = amax / _LARGEST
    codes = jnp.clip(blocks / scales, -_LARGEST, _LARGEST).astype(DTYPE).reshape(wide.shape)
    return codes[:, :outputs, :inputs], scales[:, :, 0, :, 0]
