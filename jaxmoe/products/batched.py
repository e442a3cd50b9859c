"""SwiGLU of experts with few rows each: one batched product for all, without a loop.

Made for decoding on GPUs, where the time goes into reading the experts' weights: each is read once,
the shapes do not depend on the data, so that nobody waits for the host, and a program of these is
recorded in command buffers. The work is that of `max_rows` rows for every expert.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

I32 = jnp.int32
# Rows of an expert up to which reading its weights takes longer than computing with them: a
# weight of two bytes is used for two operations a row, and a Hopper GPU has 200 operations in
# bfloat16 for each byte that it reads. Beyond that the work on rows that do not exist shows.
MAX_ROWS = 256


def swiglu(
    rows: jax.Array, group_sizes: jax.Array, gate: Any, up: Any, down: Any, max_rows: int
) -> jax.Array:
    """`jaxmoe.swiglu_experts` for groups of at most `max_rows` rows; others give NaN."""
    capacity, experts = rows.shape[0], group_sizes.shape[0]
    max_rows = min(max_rows, capacity)
    ends = jnp.cumsum(group_sizes, dtype=I32)
    starts = ends - group_sizes
    nth = jnp.arange(max_rows, dtype=I32)
    index = jnp.minimum(starts[:, None] + nth, I32(capacity - 1))
    mine = (nth < group_sizes[:, None])[:, :, None]
    x = jnp.where(mine, rows[index], jnp.zeros((), rows.dtype))
    hidden = jax.nn.silu(jnp.matmul(x, gate)) * jnp.matmul(x, up)
    y = jnp.matmul(hidden, down)
    row = jnp.arange(capacity, dtype=I32)
    expert = jnp.minimum(jnp.searchsorted(ends, row, side="right").astype(I32), I32(experts - 1))
    place = jnp.minimum(row - starts[expert], I32(max_rows - 1))
    out = jnp.where((row < ends[-1])[:, None], y[expert, place], jnp.zeros((), y.dtype))
    too_many = jnp.any(group_sizes > max_rows)
    return jnp.where(too_many, jnp.full((), jnp.nan, out.dtype), out)
