"""Trains an MoE layer for a few steps on a mesh over all devices; process 0 writes what came out.

Arguments: the file to write.
"""

import sys
from typing import Any

import dense
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmoe
from jaxmoe.layer_config import param_specs

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


def create() -> jaxmoe.MoE:
    """The layer with values from NumPy: compiling the initialisers takes longer than training."""
    model = nnx.eval_shape(
        lambda: jaxmoe.MoE(group, 12, num_shared_experts=1, use_bias=True, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    specs = {name: spec.sharding for name, spec in param_specs(model.config).items()}
    values = {
        name: place(value, PartitionSpec(*specs.get(name, ())))
        for name, value in dense.make_params(state).items()
    }
    return nnx.merge(graph, dense.with_params(state, values))


def place(a: np.ndarray, spec: PartitionSpec) -> jax.Array:
    return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda i: a[i])


@nnx.jit
def create_optimizer(model: jaxmoe.MoE) -> nnx.Optimizer:
    return nnx.Optimizer(model, optax.sgd(0.5, momentum=0.9), wrt=nnx.Param)


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
    rng = np.random.default_rng(step)
    arrays = (rng.standard_normal((BATCH, SEQUENCE, DIM), np.float32) for _ in range(2))
    return [place(a, PartitionSpec(mesh.axis_names)) for a in arrays]


with jax.set_mesh(mesh):
    model = create()
    optimizer = create_optimizer(model)
    steps = [train_step(model, optimizer, *batch(step)) for step in range(STEPS)]

results = {
    name: np.stack([np.asarray(step[i]) for step in steps])
    for i, name in enumerate(("losses", "tokens_per_expert", "num_dropped"))
}
for path, variable in nnx.to_flat_state(nnx.state(model)):
    results[".".join(path)] = multihost_utils.process_allgather(variable[...], tiled=True)
if RANK == 0:
    np.savez(sys.argv[1], **results)
