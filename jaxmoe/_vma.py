"""Axes that arrays vary over inside `jax.shard_map`; with `check_vma=False` none are seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")


def varying_axes(a: Any) -> frozenset[str]:
    """The mesh axes over which `a` may differ from device to device."""
    return frozenset(jax.typeof(a).manual_axis_type.varying)


def vary_alike(tree: Tree, axes: Iterable[str] = ()) -> Tree:
    """`tree` with all arrays typed as varying over `axes` and whatever one of them varies over.

    An array that was equal on the devices of an axis has its gradient summed over that axis.
    """
    leaves, treedef = jax.tree.flatten(tree)
    wanted = frozenset(axes).union(*(varying_axes(a) for a in leaves))
    return jax.tree.unflatten(treedef, [_vary(a, wanted) for a in leaves])


def zeros_alike(a: jax.Array, dtype: Any = None, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Zeros that vary over the same axes as `a`, by default of its dtype and shape."""
    return _vary(jnp.zeros(a.shape if shape is None else shape, dtype or a.dtype), varying_axes(a))


def _vary(a: Any, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - varying_axes(a)))
    return lax.pcast(a, missing, to="varying") if missing else a
