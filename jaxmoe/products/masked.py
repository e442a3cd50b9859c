"""Grouped products in the masked layout: every group has the same slots, the first of them in use.

The layout of decoding with buffers of fixed places: shapes and places do not depend on the data.
A row of a product depends on no other row, so products of all slots, used or not, need no masking
but of their results; only the gradient of the matrices, which adds rows up, masks what goes in.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe._vma import vary_alike, zeros_alike
from jaxmoe.products import cuda
from jaxmoe.products.blocked import Blocked

BACKENDS = ("auto", "cuda", "batched", "blocked")
F32 = jnp.float32


def matmul(x: Any, w: Any, group_sizes: Any, *, backend: str, block_rows: int) -> jax.Array:
    """`jaxmoe.grouped_matmul` for x [L, S, D]."""
    groups, slots, _ = x.shape
    if 0 in (*x.shape, *w.shape):
        return zeros_alike(x, shape=(groups, slots, w.shape[2]))
    x, w, group_sizes = vary_alike((x, w, group_sizes))
    return _product((backend, min(block_rows, slots)), x, w, jnp.clip(group_sizes, 0, slots))


class _Batched:
    """XLA's batched product of all slots: each matrix is read once, and nothing waits."""

    def forward(self, x: Any, w: Any, group_sizes: Any) -> Any:
        return _used(jnp.matmul(x, w), group_sizes)

    def input_grad(self, d_y: Any, w: Any, group_sizes: Any) -> Any:
        return _used(jnp.matmul(d_y, w.mT), group_sizes)

    def weight_grad(self, x: Any, d_y: Any, group_sizes: Any) -> Any:
        x, d_y = _used(x, group_sizes), _used(d_y, group_sizes)
        return jnp.matmul(x.mT, d_y, preferred_element_type=F32).astype(x.dtype)


class _Kernels:
    """The kernels for rows one after the other, for groups that are all of S rows."""

    def forward(self, x: Any, w: Any, group_sizes: Any) -> Any:
        return _used(self._all(cuda.forward, x, w), group_sizes)

    def input_grad(self, d_y: Any, w: Any, group_sizes: Any) -> Any:
        return _used(self._all(cuda.input_grad, d_y, w), group_sizes)

    def weight_grad(self, x: Any, d_y: Any, group_sizes: Any) -> Any:
        x, d_y = _used(x, group_sizes), _used(d_y, group_sizes)
        return cuda.weight_grad(_flat(x), _flat(d_y), _full(x))

    def _all(self, product: Any, x: Any, w: Any) -> Any:
        return product(_flat(x), w, _full(x)).reshape(*x.shape[:2], -1)


class _Blocked:
    """A loop over blocks of the rows in use."""

    def __init__(self, block: int, slots: int):
        self._flat = Blocked(block, slots)

    def forward(self, x: Any, w: Any, group_sizes: Any) -> Any:
        return self._flat.forward(_flat(x), w, group_sizes).reshape(*x.shape[:2], -1)

    def input_grad(self, d_y: Any, w: Any, group_sizes: Any) -> Any:
        return self._flat.input_grad(_flat(d_y), w, group_sizes).reshape(*d_y.shape[:2], -1)

    def weight_grad(self, x: Any, d_y: Any, group_sizes: Any) -> Any:
        return self._flat.weight_grad(_flat(x), _flat(d_y), group_sizes)


def _flat(a: Any) -> Any:
    return a.reshape(-1, a.shape[2])


def _full(x: Any) -> jax.Array:
    return zeros_alike(x, jnp.int32, x.shape[:1]) + jnp.int32(x.shape[1])


def _used(rows: Any, group_sizes: Any) -> jax.Array:
    slot = jnp.arange(rows.shape[1], dtype=jnp.int32)
    used = (slot < group_sizes[:, None])[:, :, None]
    return jnp.where(used, rows, jnp.zeros((), rows.dtype))


def _module(how: tuple[str, int], slots: int) -> Any:
    """The backend's `forward`, `input_grad` and `weight_grad`."""
    backend, block = how
    return {"cuda": _Kernels(), "batched": _Batched()}.get(backend) or _Blocked(block, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: tuple[str, int], x: Any, w: Any, group_sizes: Any) -> Any:
    return _module(how, x.shape[1]).forward(x, w, group_sizes)


def _product_fwd(how: tuple[str, int], x: Any, w: Any, group_sizes: Any) -> Any:
    return _product(how, x, w, group_sizes), (x, w, group_sizes)


def _product_bwd(how: tuple[str, int], residuals: Any, d_y: Any) -> Any:
    """As for rows one after the other (`jaxmoe.products`)."""
    x, w, group_sizes = residuals
    module = _module(how, x.shape[1])
    d_x = module.input_grad(d_y, w, group_sizes)
    return d_x, module.weight_grad(x, d_y, group_sizes), None


_product.defvjp(_product_fwd, _product_bwd)
