"""Grouped products by the library tokamax, where it is installed.

It picks its kernel itself: on Hopper GPUs Mosaic's, on other GPUs Triton's, elsewhere
`jax.lax.ragged_dot`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe._vma import vary_alike
from jaxmoe.products.ragged import ROWS_CONTRACTED, only_used


def _row_products(contracted: int) -> lax.RaggedDotDimensionNumbers:
    """Rows times the matrix of their group, of which one dimension is contracted."""
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([1], [contracted]), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )


_ROWS_MULTIPLE = 64
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


def forward(x: Any, w: Any, group_sizes: Any) -> Any:
    return only_used(_dot(x, w, group_sizes, _ROWS_TIMES_MATRICES), group_sizes)


def input_grad(d_y: Any, w: Any, group_sizes: Any) -> Any:
    return only_used(_dot(d_y, w, group_sizes, _ROWS_TIMES_TRANSPOSED), group_sizes)


def weight_grad(x: Any, d_y: Any, group_sizes: Any) -> Any:
    """The library does not say that it leaves alone the rows past the last group."""
    x, d_y = only_used(x, group_sizes), only_used(d_y, group_sizes)
    return _dot(x, d_y, group_sizes, ROWS_CONTRACTED)


def _dot(a: Any, b: Any, group_sizes: Any, numbers: Any) -> Any:
    library = importlib.import_module("tokamax")
    rows = a.shape[0]
    a = _padded(a)
    if numbers is ROWS_CONTRACTED:
        b = _padded(b)
    sizes = library.RaggedDotGroupSizes(group_sizes, a.shape[0])
    # Its own code relies on JAX's default promotion of dtypes.
    with jax.numpy_dtype_promotion("standard"):
        y = library.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=a.dtype)
    # Inside `jax.shard_map` its kernels do not say that their results differ among the devices.
    y = vary_alike((y, a, b))[0]
    return y if numbers is ROWS_CONTRACTED else y[:rows]


def _padded(rows: jax.Array) -> jax.Array:
    """With as many rows as Mosaic's kernels want."""
    return jnp.pad(rows, ((0, -rows.shape[0] % _ROWS_MULTIPLE), (0, 0)))
