"""Initial values for benchmarks: random ones that take little time to compile and to draw."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


def draw(abstract: Any) -> Any:
    """Parameters of these shapes, dtypes and shardings.

    Matrices are normal with variance 1 / fan-in, vectors (the norms' scales) ones. Each shape takes
    a small program of its own; one for all parameters would take a minute to compile on GPUs.
    """
    leaves, treedef = jax.tree.flatten(abstract)
    made = [
        _normal(jnp.uint32(i), leaf.shape, leaf.dtype, leaf.sharding)
        if leaf.ndim >= 2
        else _constant(1, leaf.shape, leaf.dtype, leaf.sharding)
        for i, leaf in enumerate(leaves)
    ]
    return jax.block_until_ready(jax.tree.unflatten(treedef, made))


def zeros(abstract: Any) -> Any:
    """Zeros of these shapes, dtypes and shardings."""
    return jax.tree.map(lambda a: _constant(0, a.shape, a.dtype, a.sharding), abstract)


def _normal(seed: Any, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    array: jax.Array = _normal_program(shape, jnp.dtype(dtype), sharding)(seed)
    return array


@functools.cache
def _normal_program(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    def normal(seed: Any) -> jax.Array:
        # The generator of XLA, which compiles in no time; Threefry's rounds do not.
        key = jax.random.key(seed, impl="unsafe_rbg")
        return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-2] ** -0.5, dtype)

    return jax.jit(normal, out_shardings=sharding)


def _constant(value: int, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    array: jax.Array = _constant_program(value, shape, jnp.dtype(dtype), sharding)()
    return array


@functools.cache
def _constant_program(
    value: int, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding
) -> Any:
    return jax.jit(lambda: jnp.full(shape, value, dtype), out_shardings=sharding)
