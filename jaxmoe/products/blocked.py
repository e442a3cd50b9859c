"""Grouped products as a loop over blocks of rows: work and memory follow the rows in use."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxmoe._vma import zeros_alike
from jaxmoe.products.blocks import Blocks

F32 = jnp.float32


class Blocked:
    """The backend with blocks of `block` rows.

    slots: the distance between the first rows of two groups; None where one group's rows end, the
      next one's begin.
    """

    def __init__(self, block: int, slots: int | None = None):
        self._block, self._slots = block, slots

    def _blocks(self, group_sizes: Any, rows: int) -> Blocks:
        return Blocks(group_sizes, rows, self._block, self._slots)

    def forward(self, x: Any, w: Any, group_sizes: Any) -> Any:
        blocks = self._blocks(group_sizes, x.shape[0])

        def step(y: Any, group: Any, start: Any, used: Any) -> Any:
            return blocks.write(y, blocks.read(x, start) @ w[group], start, used)

        return blocks.fold(step, zeros_alike(x, shape=(x.shape[0], w.shape[2])))

    def input_grad(self, d_y: Any, w: Any, group_sizes: Any) -> Any:
        blocks = self._blocks(group_sizes, d_y.shape[0])

        def step(d_x: Any, group: Any, start: Any, used: Any) -> Any:
            return blocks.write(d_x, blocks.read(d_y, start) @ w[group].T, start, used)

        return blocks.fold(step, zeros_alike(d_y, shape=(d_y.shape[0], w.shape[1])))

    def weight_grad(self, x: Any, d_y: Any, group_sizes: Any) -> Any:
        blocks = self._blocks(group_sizes, x.shape[0])

        def step(d_w: Any, group: Any, start: Any, used: Any) -> Any:
            rows = blocks.read_used(x, start, used)
            new = jnp.matmul(rows.T, blocks.read_used(d_y, start, used), preferred_element_type=F32)
            return d_w.at[group].add(new)

        shape = (group_sizes.shape[0], x.shape[1], d_y.shape[1])
        return blocks.fold(step, zeros_alike(x, F32, shape)).astype(x.dtype)
