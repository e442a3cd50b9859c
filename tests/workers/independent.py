"""Gradients of parts that know nothing of each other, in one program that runs many times.

No data says which device runs which call first, and all must agree. The bits stay the same.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

PARTS, T, E, K, D = 4, 8, 16, 4, 256
SPEC = PartitionSpec("expert")
processes.join()
mesh = jax.make_mesh((jax.device_count(),), ("expert",))
group = jaxmoe.ExpertParallel(
    mesh, num_experts=E, top_k=K, dim=D, max_tokens=T, timeout=20,
    transport=os.environ["JAXMOE_TEST_TRANSPORT"],
)  # fmt: skip
assert group.latency_tokens == T


def part(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
    def pair(x: jax.Array, weights: jax.Array) -> jax.Array:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return jaxmoe.combine(group, jnp.sin(rows), row_weights, plan)

    y, gradient = jax.vjp(pair, x, weights)
    return y, gradient(x)  # does not wait for y


def independent(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
    return [part(x + i, ids, weights) for i in range(PARTS)]


def local(tree: Any) -> list[np.ndarray]:
    return [np.asarray(s.data) for a in jax.tree.leaves(tree) for s in a.addressable_shards]


rng, num = np.random.default_rng(0), mesh.size * T
ids = np.argsort(rng.random((num, E)), axis=1)[:, :K].astype(np.int32)
arrays = (rng.standard_normal((num, D), "f").astype(jnp.bfloat16), ids, rng.random((num, K), "f"))
inputs = [
    jax.make_array_from_callback(a.shape, NamedSharding(mesh, SPEC), lambda i, a=a: a[i])
    for a in arrays
]
program = jax.jit(jax.shard_map(independent, mesh=mesh, in_specs=SPEC, out_specs=SPEC))
first = local(program(*inputs))
for _ in range(200):
    last = program(*inputs)
for got, want in zip(local(last), first, strict=True):
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
print(f"{4 * PARTS} calls, the same bits", flush=True)
