"""Parameters and tokens to time a MoE layer with.

The router is made so that its logits are exact in float32 however they are summed: programs that
differ agree on every choice.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxmoe.bench.loads import Load
from jaxmoe.layer_config import MoEConfig, param_specs

# The router reads so many of a token's numbers at most, which are multiples of _STEP.
_ROUTED_WIDTH = 64
_STEP, _ROUTER_STEP = 1 / 8, 1 / 64
# Standard deviation of a Gumbel variable: with it, experts are chosen about as a load says.
_SPREAD = math.pi / math.sqrt(6)
_HOT = 16.0


def make_inputs(config: MoEConfig, num_tokens: int, load: Load) -> tuple[Any, Any, Any]:
    """Parameters, tokens [R * T, D] and an output's gradient, made on the devices.

    The first number of each token is one, and its row of the router the logarithm of the load's
    probabilities; the next ones are drawn with few bits, and so are their rows.
    """
    group = config.group
    read = min(_ROUTED_WIDTH, group.dim - 1)
    num_experts = group.num_experts
    log_p = np.log(load.probabilities(num_experts) / load.probabilities(num_experts).sum())
    if load.first_expert is not None:
        log_p[load.first_expert] += _HOT
    log_p = np.round((log_p - log_p.mean()) / _ROUTER_STEP) * _ROUTER_STEP
    rng = np.random.default_rng(11)
    router = np.zeros((group.dim, num_experts), np.float32)
    router[0] = log_p
    noise = rng.standard_normal((read, num_experts)) * _SPREAD / math.sqrt(max(read, 1))
    router[1 : 1 + read] = np.round(noise / _ROUTER_STEP) * _ROUTER_STEP
    mesh, dtype = group.mesh, group.dtype
    assert mesh is not None
    over = PartitionSpec(mesh.axis_names)

    def draw(router: Any) -> tuple[Any, Any, Any]:
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(5), jax.lax.axis_index(mesh.axis_names)), 5
        )
        x, d_y = (jax.random.normal(k, (num_tokens, group.dim), jnp.float32) for k in keys[:2])
        few_bits = jnp.round(jnp.clip(x, -3, 3) / _STEP) * _STEP
        column = jnp.arange(group.dim)
        x = jnp.where(column <= read, few_bits, x).at[:, 0].set(1)
        params = {"router": router}
        for key, name in zip(keys[2:], ("gate", "up", "down"), strict=True):
            shape = param_specs(config)[name].shape[1:]
            each = jax.random.split(key, group.num_local_experts)
            scale = 1 / math.sqrt(shape[0])
            params[name] = jax.lax.map(
                lambda k, s=shape, c=scale: (jax.random.normal(k, s, jnp.float32) * c).astype(
                    dtype
                ),
                each,
            )
        return params, x.astype(dtype), d_y.astype(dtype)

    specs = {name: PartitionSpec(*spec.sharding) for name, spec in param_specs(config).items()}
    program = jax.shard_map(
        draw, mesh=mesh, in_specs=PartitionSpec(), out_specs=(specs, over, over)
    )
    return jax.jit(program)(router)
