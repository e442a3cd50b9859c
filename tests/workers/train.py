"""Trains an MoE layer for a few steps on a mesh over all devices; process 0 writes what came out.

Arguments: the file to write.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmoe

RANK = processes.join()

BATCH, SEQUENCE, DIM = 8, 3, 16
STEPS = 5

mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
group = jaxmoe.ExpertParallel(
    mesh,
    num_experts=8,
    top_k=2,
    dim=DIM,
    max_tokens=BATCH * SEQUENCE // 4,
    capacity_factor=1.5,
    dtype=jnp.float32,
    transport="cpu",
    timeout=30,
)


@nnx.jit
def create() -> tuple[jaxmoe.MoE, nnx.Optimizer]:
    model = jaxmoe.MoE(group, 12, num_shared_experts=1, use_bias=True, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(0.5, momentum=0.9), wrt=nnx.Param)


@nnx.jit
def train_step(model: jaxmoe.MoE, optimizer: nnx.Optimizer, x: jax.Array, target: jax.Array) -> Any:
    def loss_of(model: jaxmoe.MoE) -> Any:
        y, stats = model(x)
        loss = jnp.mean((y - target) ** 2) + 0.01 * stats.load_balance_loss + 1e-3 * stats.z_loss
        return loss, stats

    (loss, stats), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    model.update_bias(stats, 1e-3)
    return loss, stats.tokens_per_expert, stats.num_dropped


def batch(step: int) -> list[jax.Array]:
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    rng = np.random.default_rng(step)
    arrays = (rng.standard_normal((BATCH, SEQUENCE, DIM), np.float32) for _ in range(2))
    return [jax.make_array_from_callback(a.shape, sharding, lambda i, a=a: a[i]) for a in arrays]


with jax.set_mesh(mesh):
    model, optimizer = create()
    steps = [train_step(model, optimizer, *batch(step)) for step in range(STEPS)]

results = {
    name: np.stack([np.asarray(step[i]) for step in steps])
    for i, name in enumerate(("losses", "tokens_per_expert", "num_dropped"))
}
for path, variable in nnx.to_flat_state(nnx.state(model)):
    results[".".join(path)] = multihost_utils.process_allgather(variable[...], tiled=True)
if RANK == 0:
    np.savez(sys.argv[1], **results)
