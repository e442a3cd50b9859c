"""All four operations on GPUs, for compute-sanitizer to watch.

Argument: how many GPUs, of this process or one of each, or "all". Plain and dropping, wide and
narrow rows, few multiprocessors and all.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

processes.join()
TRANSPORT = os.environ["JAXMOE_TEST_TRANSPORT"]
NUM = jax.device_count() if sys.argv[1] == "all" else int(sys.argv[1])
mesh = jax.make_mesh((NUM,), ("expert",), devices=jax.devices()[:NUM])
SPEC = PartitionSpec("expert")


def run(num_tokens: int, dim: int, top_k: int, num_experts: int, **options: object) -> None:
    group = jaxmoe.ExpertParallel(
        mesh, num_experts=num_experts, top_k=top_k, dim=dim, max_tokens=num_tokens,
        transport=TRANSPORT, timeout=230, **options,  # racecheck is slow
    )  # fmt: skip
    rng, num = np.random.default_rng(num_tokens), NUM * num_tokens
    x = rng.standard_normal((num, dim), np.float32).astype(jnp.bfloat16)
    ids = np.argsort(rng.random((num, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = rng.random((num, top_k)).astype(np.float32)

    def loss(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return jnp.sum(jaxmoe.combine(group, rows, row_weights, plan).astype(jnp.float32) ** 2)[
            None
        ]

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    grad = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(mapped(*a)), argnums=(0, 2)))
    place = NamedSharding(mesh, SPEC)
    args = [jax.device_put(a, place) for a in (x, ids, weights)]
    for _ in range(3):
        value, _ = jax.block_until_ready(grad(*args))
    assert np.isfinite(value)


for mode in ("throughput", "low_latency"):
    run(37, 1032, 3, 8, mode=mode)
    run(64, 7168, 8, 32, capacity_factor=0.5, num_sms=6, mode=mode)
    run(5, 16, 1, 4, mode=mode)
run(37, 1936, 3, 8, wire_dtype=jnp.float8_e4m3fn)
print("all operations ran", flush=True)
