"""Many pairs of dispatch and combine in one program, with random delays on each device.

Arguments: the number of pairs, the mode of the group, and "gradient" if the gradient of dispatch is
to run between the pairs (calls of a gradient are never recorded in command buffers). Every pair has
tokens and a routing of its own; a hash of all bits that it gives is compared with that of transport
"xla" in the same program. Works in one process with several GPUs and in several processes; where
processes share a GPU (and "xla" cannot run) the hashes of two runs, with and without delays, are
compared.
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

RANK = processes.join()
TRANSPORT = os.environ["JAXMOE_TEST_TRANSPORT"]
NATIVE = not os.environ.get("JAXMOE_TEST_SHARED_GPUS")
GRADIENT = "gradient" in sys.argv[3:]
T, E, K, D = 48, 16, 4, 64
mesh = jax.make_mesh((jax.device_count(),), ("expert",))


def group(transport: str) -> jaxmoe.ExpertParallel:
    return jaxmoe.ExpertParallel(
        mesh, num_experts=E, top_k=K, dim=D, max_tokens=T, transport=transport,
        mode=sys.argv[2], capacity_factor=1.25, timeout=60,
    )  # fmt: skip


def bits(a: jax.Array) -> jax.Array:
    """An order-dependent hash of an array's bits."""
    words = jax.lax.bitcast_convert_type(a, jnp.uint16 if a.dtype.itemsize == 2 else jnp.uint32)
    words = words.reshape(-1).astype(jnp.uint32)
    places = jax.lax.iota(jnp.uint32, words.shape[0]) * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum(words * places, dtype=jnp.uint32)


def pair(ep: jaxmoe.ExpertParallel, key: jax.Array) -> jax.Array:
    x_key, id_key, weight_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (T, D), jnp.bfloat16)
    ids = jax.lax.top_k(jax.random.uniform(id_key, (T, E)), K)[1].astype(jnp.int32)
    ids = jnp.where(ids == 3, -1, ids)
    weights = jnp.exp2(jax.random.randint(weight_key, (T, K), -2, 2).astype(jnp.float32))

    def dispatch(x: jax.Array, weights: jax.Array) -> Any:
        rows, row_weights, plan = jaxmoe.dispatch(ep, x, ids, weights)
        return (rows, row_weights), plan

    if GRADIENT:
        (rows, row_weights), gradient, plan = jax.vjp(dispatch, x, weights, has_aux=True)
    else:
        (rows, row_weights), plan = dispatch(x, weights)
    y = jaxmoe.combine(ep, rows, row_weights, plan)
    # Sums of the exact products x * 2^n round alike in every order that one device may take.
    parts = (rows, row_weights, plan.row_map, plan.group_sizes, plan.num_dropped[None], y)
    if GRADIENT:
        parts += gradient((rows, row_weights + bits(y).astype(jnp.float32) * 0))
    return sum((bits(p) for p in parts), jnp.uint32(0))


def delay(key: jax.Array, value: jax.Array, zero: jax.Array) -> jax.Array:
    """`value`, after none to some sixty steps of a loop that depend on the key.

    zero: zero, which XLA must not know, or it takes the loop out.
    """
    few, steps = jax.random.uniform(key, (2,))
    num = jnp.where(few < 0.8, 0.0, steps**4 * 60).astype(jnp.int32)
    spun = jax.lax.fori_loop(0, num, lambda i, v: v * jnp.uint32(3) + jnp.uint32(1), value)
    return value + (spun & zero)


def run(ep: jaxmoe.ExpertParallel, num_pairs: int, delays: bool) -> np.ndarray:
    def body(zero: jax.Array) -> jax.Array:
        device = jax.lax.axis_index("expert")
        key = jax.random.fold_in(jax.random.key(0), device)

        def step(carry: jax.Array, i: jax.Array) -> Any:
            own = jax.random.fold_in(key, i)
            if delays:
                carry = delay(jax.random.fold_in(own, 1), carry, zero[0])
            # Hangs the next pair on the last one.
            own = jax.random.fold_in(own, carry & zero[0])
            return carry * jnp.uint32(31) + pair(ep, own), None

        return jax.lax.scan(step, zero[0], jnp.arange(num_pairs))[0][None]

    spec = PartitionSpec("expert")
    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    zeros = np.zeros(jax.device_count(), np.uint32)
    sharding = NamedSharding(mesh, spec)
    out = program(jax.make_array_from_callback(zeros.shape, sharding, lambda i: zeros[i]))
    return np.concatenate([np.asarray(s.data) for s in out.addressable_shards])


num_pairs = int(sys.argv[1])
got = run(group(TRANSPORT), num_pairs, delays=True)
want = run(group("xla" if NATIVE else TRANSPORT), num_pairs, delays=False)
np.testing.assert_array_equal(got, want)
print(f"{num_pairs} pairs, the same bits: {got}", flush=True)
