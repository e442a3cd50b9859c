"""Expert weights in eight bits with a scale for each output channel, or for each 128 x 128."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.block_quantized import BlockQuantizedExperts, quantize_blocks
from jaxmoe.quantized import QuantizedExperts

# Name, dtype, and the largest magnitude that it holds (int8 without -128, to be symmetric).
_KINDS: dict[str, tuple[Any, float]] = {
    "int8": (jnp.int8, 127.0),
    "fp8": (jnp.float8_e4m3fn, 448.0),
}
BLOCKS = "fp8_blocks"
KINDS = (*_KINDS, BLOCKS)


def quantize_experts(weights: Any, dtype: str) -> Any:
    """Expert matrices in eight bits, for computing without gradients (decoding).

    "fp8_blocks" makes `BlockQuantizedExperts`, whose products FP8 tensor cores compute (see
    `jaxmoe.quantize_blocks`); the others make `QuantizedExperts`, which are widened for theirs.
    With s = max_i |W[e, i, o]| / m for each expert e and output channel o, and m = 127 or 448:

    - "int8": |W - W'| <= s (1/2 + 2^-17), half a step and the rounding of W / s in float32;
    - "fp8" (e4m3, Micikevicius et al. 2022): |W - W'| is at most
      max((2^-4 + 2^-10) |W|, (2^-10 + 2^-19) s), for three bits of significand, which some of XLA's
      backends round by way of float16.

    Args:
      weights: a float array [L, I, O], or a tree of them, such as a layer's gate, up and down.
      dtype: "int8", "fp8" or "fp8_blocks".

    Returns:
      The same tree with `QuantizedExperts` for the arrays: a quarter of float32's bytes and, for I
      rows, 4 / I as many again for the scales (`BlockQuantizedExperts`: 1 / 4096).

    Raises:
      ValueError: another dtype, an array of other rank or dtype, or numbers that are not finite
        (which only concrete arrays show).
    """
    if dtype not in KINDS:
        raise ValueError(
            f"`quantize_experts`: dtype is {dtype!r}, wanted one of {', '.join(KINDS)}. Leave the "
            "weights as they are for another precision."
        )
    return jax.tree.map(lambda array: _quantize(array, dtype), weights, is_leaf=_is_quantized)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedExperts | BlockQuantizedExperts)


def _quantize(array: Float[Array, "L I O"], kind: str) -> QuantizedExperts | BlockQuantizedExperts:
    if _is_quantized(array):
        raise ValueError(
            f"`quantize_experts`: the weights are {array.dtype} already. Quantise the float ones."
        )
    if array.ndim != 3 or not jnp.issubdtype(array.dtype, jnp.floating) or not array.shape[1]:
        raise ValueError(
            f"`quantize_experts`: a weight is {array.dtype}{list(array.shape)}; wanted floats "
            "[L, I, O], one matrix for each expert. Pass the layer's gate, up and down."
        )
    if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
        raise ValueError(
            f"`quantize_experts`: a weight {list(array.shape)} holds NaN or infinity. Take a "
            "checkpoint from before the training diverged."
        )
    return quantize_blocks(array) if kind == BLOCKS else _rounded(array, kind)


@functools.partial(jax.jit, static_argnums=1)
def _rounded(array: Any, kind: str) -> QuantizedExperts:
    dtype, limit = _KINDS[kind]
    wide = array.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
    # A channel of zeros gets a scale that can be divided by.
    scales = jnp.maximum(largest / limit, jnp.finfo(jnp.float32).tiny)
    steps = jnp.clip(wide / scales, -limit, limit)
    if kind == "int8":
        steps = jnp.round(steps)
    return QuantizedExperts(steps.astype(dtype), scales)
