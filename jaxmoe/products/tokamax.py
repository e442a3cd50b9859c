"""Grouped products by the library tokamax, where it is installed.

It picks its kernel itself: on Hopper GPUs Mosaic's, elsewhere it may be `jax.lax.ragged_dot`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe._vma import vary_alike
from jaxmoe.products.blocked import Blocked
from jaxmoe.products.ragged import only_used


def _row_products(contracted: int) -> lax.RaggedDotDimensionNumbers:
    """Rows times the matrix of their group, of which one dimension is contracted."""
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([1], [contracted]), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )


_ROWS_MULTIPLE = 8
_ROWS_TIMES_MATRICES, _ROWS_TIMES_TRANSPOSED = _row_products(1), _row_products(2)


@functools.cache
def why_not() -> str:
    """Why it cannot serve products; empty if it can."""
    try:
        library = importlib.import_module("tokamax")
        flags = importlib.import_module("absl.flags").FLAGS
    except Exception as error:  # a version that does not fit this JAX may raise anything
        reason = f"{type(error).__name__}: {error}"
        return f"tokamax cannot be imported ({reason}). Install jaxmoe[tokamax]"
    if not flags.is_parsed():  # versions up to 0.0.12 take the program's own options for theirs
        flags.mark_as_parsed()
    missing = not hasattr(library, "ragged_dot_general")
    return "this tokamax has no ragged_dot_general. Install a newer one" if missing else ""


class Tokamax:
    """The backend, with `block` rows per step of the weight gradient's loop."""

    def __init__(self, block: int):
        self._loop = Blocked(block)

    def forward(self, x: Any, w: Any, group_sizes: Any) -> Any:
        return only_used(_dot(x, w, group_sizes, _ROWS_TIMES_MATRICES), group_sizes)

    def input_grad(self, d_y: Any, w: Any, group_sizes: Any) -> Any:
        return only_used(_dot(d_y, w, group_sizes, _ROWS_TIMES_TRANSPOSED), group_sizes)

    def weight_grad(self, x: Any, d_y: Any, group_sizes: Any) -> Any:
        """By this library's loop over blocks.

        tokamax 0.0.17's kernel for it (H200, jax 0.11.2) is wrong by half of the largest number,
        and differently in each run, for 33,000 rows in 128 groups, [7168, 2048] each.
        """
        return self._loop.weight_grad(x, d_y, group_sizes)


def _dot(rows: Any, w: Any, group_sizes: Any, numbers: Any) -> Any:
    library = importlib.import_module("tokamax")
    # Mosaic's kernels want a multiple of rows.
    padded = jnp.pad(rows, ((0, -rows.shape[0] % _ROWS_MULTIPLE), (0, 0)))
    sizes = library.RaggedDotGroupSizes(group_sizes, padded.shape[0])
    # Its own code relies on JAX's default promotion of dtypes.
    with jax.numpy_dtype_promotion("standard"):
        y = library.ragged_dot_general(padded, w, sizes, numbers, preferred_element_type=w.dtype)
    # Inside `jax.shard_map` its kernels do not say that their results differ among the devices.
    return vary_alike((y, padded, w))[0][: rows.shape[0]]
