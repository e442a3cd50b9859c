"""Dense products, the measure of grouped ones: the same work with one matrix for all rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.bench import clocks
from jaxmoe.bench.clocks import Timing

Sizes = tuple[int, int, int]
_SIDE_MULTIPLE = 64


def time_products(
    mesh: jax.sharding.Mesh, sizes: Sizes, dtype: str, time: Callable[..., Timing]
) -> dict[Sizes, Timing]:
    """Times [m, k] x [k, n] on all devices at once: of these sizes, and a cube of about that work.

    Arguments:
        time: takes a compiled program and its operands.
    """
    side = round(math.prod(sizes) ** (1 / 3) / _SIDE_MULTIPLE) * _SIDE_MULTIPLE
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def draw(m: int, k: int, n: int) -> tuple[Any, Any]:
        keys = jax.random.split(jax.random.key(3), 2)
        a = jax.random.normal(keys[0], (mesh.size, m, k), jnp.dtype(dtype))
        return a, jax.random.normal(keys[1], (mesh.size, k, n), jnp.dtype(dtype))

    timings = {}
    for mkn in (sizes, (max(side, _SIDE_MULTIPLE),) * 3):
        operands = jax.jit(functools.partial(draw, *mkn), out_shardings=sharding)()
        timings[mkn] = time(clocks.compile_on(mesh, jnp.matmul, operands), operands)
    return timings
