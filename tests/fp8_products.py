"""Grouped products of FP8 operands in float64, from their definition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from jaxmoe.products.fp8 import quantize_rows


def draw(
    capacity: int, dim: int, features: int, sizes: tuple[int, ...]
) -> tuple[Any, Any, Any, Any, Any]:
    """x, w, their FP8 forms and group_sizes; rows past the last group are NaN. The magnitudes of
    blocks differ, and so do their scales.
    """
    rng = np.random.default_rng(capacity + dim)
    magnitudes = 2.0 ** rng.integers(-6, 7, (-(-dim // 128), 1))
    per_dim = np.repeat(magnitudes, 128, axis=0)[:dim, 0]
    x = rng.standard_normal((capacity, dim)) * per_dim
    w = rng.standard_normal((len(sizes), dim, features)) / per_dim[:, None]
    x[sum(sizes) :] = np.nan
    x, w = (jnp.asarray(a, jnp.float32).astype(jnp.bfloat16) for a in (x, w))
    return x, w, jax.jit(quantize_rows)(x), jaxmoe.quantize_blocks(w), jnp.asarray(sizes, jnp.int32)


def exact(x: Any, w: Any, sizes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The products of `QuantizedRows` and `BlockQuantizedExperts` in float64, and for each the sum
    of the magnitudes of its terms.
    """
    rows = np.asarray(x.values).astype(np.float64) * spread(x.scales, 1, x.shape[1])
    of_w = spread(w.scales, 2, w.shape[1])
    weights = np.asarray(w.values).astype(np.float64) * spread(of_w, 1, w.shape[2])
    y = np.zeros((x.shape[0], w.shape[2]))
    terms, end = np.zeros_like(y), 0
    for group, size in enumerate(np.asarray(sizes)):
        at, end = slice(end, end + size), end + size
        y[at] = rows[at] @ weights[group].T
        terms[at] = np.abs(rows[at]) @ np.abs(weights[group].T)
    return y, terms


def spread(scales: Any, axis: int, size: int) -> np.ndarray:
    """Scales of blocks of 128 along an axis, one for each number."""
    wide = np.repeat(np.asarray(scales, np.float64), 128, axis=axis)
    return wide.take(range(size), axis=axis)
