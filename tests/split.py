"""Programs with calls in two halves and the same with whole ones; any transport, any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

SPEC = PartitionSpec("expert")
Group = jaxmoe.ExpertParallel


def make_group(transport: str, num_devices: int, **options: Any) -> Group:
    mesh = jax.make_mesh((num_devices,), ("expert",), devices=jax.devices()[:num_devices])
    sizes: dict[str, Any] = dict(num_experts=16, top_k=2, dim=64, max_tokens=24, max_pending=2)
    return Group(mesh, transport=transport, dtype=jnp.float32, timeout=20, **(sizes | options))


def make_inputs(group: Group, num_tokens: int, seed: int = 0) -> list[jax.Array]:
    """Tokens, choices and weights of all devices, and a matrix for work between."""
    rng = np.random.default_rng(seed)
    num = group.num_devices * num_tokens
    ids = np.argsort(rng.random((num, group.num_experts)), axis=1)[:, : group.top_k]
    arrays = (
        rng.standard_normal((num, group.dim), np.float32),
        np.where(rng.random(ids.shape) < 0.1, -1, ids).astype(np.int32),
        rng.random(ids.shape).astype(np.float32),
    )
    sharding = NamedSharding(group.mesh, SPEC)
    matrix = rng.standard_normal((group.dim, group.dim), np.float32) / group.dim
    return [*(jax.device_put(a, sharding) for a in arrays), jnp.asarray(matrix)]


def on_devices(group: Group, body: Any) -> Any:
    specs = (SPEC, SPEC, SPEC, PartitionSpec())
    return jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=specs, out_specs=SPEC))


def experts(rows: jax.Array) -> jax.Array:
    return jnp.tanh(rows) + 1


def whole(group: Group) -> Any:
    """A layer with a shared expert."""

    def body(x: Any, ids: Any, weights: Any, matrix: Any) -> jax.Array:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        y = jaxmoe.combine(group, experts(rows), row_weights, plan)
        return y + x @ matrix + jnp.sin(x) @ matrix

    return body


def overlapped(group: Group) -> Any:
    """The same, with work in both gaps."""

    def body(x: Any, ids: Any, weights: Any, matrix: Any) -> jax.Array:
        pending = jaxmoe.dispatch_start(group, x, ids, weights)
        pending, first = jaxmoe.between(pending, jnp.matmul, x, matrix)
        rows, row_weights, plan = jaxmoe.dispatch_done(group, pending)
        pending = jaxmoe.combine_start(group, experts(rows), row_weights, plan)
        pending, second = jaxmoe.between(pending, jnp.matmul, jnp.sin(x), matrix)
        return jaxmoe.combine_done(group, pending) + first + second

    return body


def interleaved(group: Group) -> Any:
    """The same for two halves of the tokens, both pending at once, the second received first."""

    def body(x: Any, ids: Any, weights: Any, matrix: Any) -> jax.Array:
        half = x.shape[0] // 2
        parts = [slice(0, half), slice(half, None)]
        pending = [jaxmoe.dispatch_start(group, x[p], ids[p], weights[p]) for p in parts]
        second = jaxmoe.dispatch_done(group, pending[1])
        first = jaxmoe.dispatch_done(group, pending[0])
        pending = [
            jaxmoe.combine_start(group, experts(rows), row_weights, plan)
            for rows, row_weights, plan in (first, second)
        ]
        y = [jaxmoe.combine_done(group, p) for p in pending]
        return jnp.concatenate(y) + x @ matrix + jnp.sin(x) @ matrix

    return body


def scanned(group: Group, layer: Any, num_steps: int) -> Any:
    """A layer several times."""

    def body(x: Any, ids: Any, weights: Any, matrix: Any) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            return jnp.tanh(layer(carry, ids, weights, matrix)), None

        return jax.lax.scan(step, x, length=num_steps)[0]

    return body


def carried(group: Group, num_steps: int) -> Any:
    """A loop that receives what the step before has sent, with work between."""

    def body(x: Any, ids: Any, weights: Any, matrix: Any) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            total, pending = carry
            pending, more = jaxmoe.between(pending, jnp.matmul, x, matrix)
            rows, row_weights, plan = jaxmoe.dispatch_done(group, pending)
            y = jaxmoe.combine(group, experts(rows), row_weights, plan)
            pending = jaxmoe.dispatch_start(group, jnp.tanh(y), ids, weights)
            return (total + y + more, pending), None

        first = (jnp.zeros_like(x), jaxmoe.dispatch_start(group, x, ids, weights))
        (total, pending), _ = jax.lax.scan(step, first, length=num_steps)
        return total + jnp.sum(jaxmoe.dispatch_done(group, pending)[0])

    return body


def carried_whole(group: Group, num_steps: int) -> Any:
    """The same with whole calls."""

    def body(x: Any, ids: Any, weights: Any, matrix: Any) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            total, sent = carry
            rows, row_weights, plan = jaxmoe.dispatch(group, sent, ids, weights)
            y = jaxmoe.combine(group, experts(rows), row_weights, plan)
            return (total + y + x @ matrix, jnp.tanh(y)), None

        (total, sent), _ = jax.lax.scan(step, (jnp.zeros_like(x), x), length=num_steps)
        return total + jnp.sum(jaxmoe.dispatch(group, sent, ids, weights)[0])

    return body


def gradients(group: Group, body: Any) -> Any:
    """Of a loss in tokens, weights and the matrix."""
    mapped = on_devices(group, body)
    return jax.jit(jax.grad(lambda *a: jnp.sum(mapped(*a) ** 2), argnums=(0, 2, 3)))
