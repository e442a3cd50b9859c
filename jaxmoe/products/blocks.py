"""Rows in blocks that each belong to one group, for loops whose length depends on the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe._vma import zeros_alike

I32 = jnp.int32


class Blocks:
    """Blocks of at most `size` consecutive rows of one group, in the order of the rows.

    Groups lie one after the other, or begin every `slots` rows.
    """

    def __init__(self, group_sizes: jax.Array, capacity: int, size: int, slots: int | None = None):
        ends = jnp.cumsum(group_sizes, dtype=I32)
        if slots is not None:
            ends = jnp.arange(group_sizes.shape[0], dtype=I32) * I32(slots) + group_sizes
        per_group = (group_sizes + I32(size - 1)) // I32(size)
        last = jnp.cumsum(per_group, dtype=I32)
        index = jnp.arange(capacity // size + group_sizes.shape[0], dtype=I32)
        group = jnp.searchsorted(last, index, side="right").astype(I32)
        self._group = jnp.minimum(group, I32(group_sizes.shape[0] - 1))
        nth = index - (last - per_group)[self._group]
        self._start = (ends - group_sizes)[self._group] + nth * I32(size)
        self._end = ends[self._group]
        self._last_start = capacity - size
        self._size = size
        self.count = last[-1]

    def at(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Group of block i, the first row to slice, and which of the sliced rows are the block's.

        A slice that would run past the buffer is moved back, so it may begin before the block does.
        """
        start = jnp.minimum(self._start[i], I32(self._last_start))
        row = start + jnp.arange(self._size, dtype=I32)
        used = (row >= self._start[i]) & (row < self._end[i])
        return self._group[i], start, used[:, None]

    def fold(self, step: Callable[..., Any], state: Any) -> Any:
        """`state = step(state, *self.at(i))` for every block i."""

        def body(carry: Any) -> Any:
            i, state = carry
            return i + 1, step(state, *self.at(i))

        first = (zeros_alike(self.count), state)
        return lax.while_loop(lambda carry: carry[0] < self.count, body, first)[1]

    def read(self, a: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(a, start, self._size)

    def read_used(self, a: jax.Array, start: jax.Array, used: jax.Array) -> jax.Array:
        """The rows of a block, and zeros for those sliced rows that are not its."""
        return jnp.where(used, self.read(a, start), jnp.zeros((), a.dtype))

    def write(self, a: jax.Array, new: jax.Array, start: jax.Array, used: jax.Array) -> jax.Array:
        kept = jnp.where(used, new, self.read(a, start))
        return lax.dynamic_update_slice_in_dim(a, kept, start, 0)
