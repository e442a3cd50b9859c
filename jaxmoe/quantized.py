"""`QuantizedExperts`: expert matrices in eight bits, and the product with one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedExperts:
    """A stack of expert matrices `W[e] ~ values[e] * scales[e]`; stands for a float [L, I, O].

    Attributes:
      values: [L, I, O] int8 or float8_e4m3fn.
      scales: [L, 1, O] float32, one for each output channel of each expert. Positive.
    """

    values: Any
    scales: Float32[Array, "L 1 O"]

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "L I O"]:
        """The matrices in floating point, rounded once."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


def matmul(rows: Float[Array, "C I"], weight: Any) -> Float32[Array, "C O"]:
    """`rows @ weight` summed in float32, for a float [I, O] or one slice of `QuantizedExperts`.

    Scales belong to output channels, so they multiply the sums: the eight-bit values themselves
    are exact in every dtype that rows can have, and only they are read from memory.
    """
    if not isinstance(weight, QuantizedExperts):
        return jnp.matmul(rows, weight, preferred_element_type=jnp.float32)
    values = weight.values.astype(rows.dtype)
    return jnp.matmul(rows, values, preferred_element_type=jnp.float32) * weight.scales
