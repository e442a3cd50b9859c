"""Placements on a mesh of data, tensor and expert parallelism, with several groups at once."""

from __future__ import annotations

import functools
from typing import Any

import dense
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from placements import random_placement

import jaxmoe
from jaxmoe import balance
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig

DIM, TOP_K, TOKENS, HIDDEN, SLOTS = 8, 2, 24, 6, 8
# Group to its axes, its layer's token axes (None: all) and experts.
GROUPS: dict[str, tuple[Any, Any, int]] = {
    # Tokens are the same on all devices of the tensor axis, as after tensor-parallel attention.
    "experts": ("expert", ("data", "expert"), 6),
    "tensor and experts": (("tensor", "expert"), None, 5),
    "data": ("data", ("data",), 4),
}
EXPERTS = ("gate", "up", "down")


def make_mesh() -> Mesh:
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    return Mesh(devices, ("data", "tensor", "expert"), axis_types=(AxisType.Auto,) * 3)


def make_group(mesh: Mesh | None, axis: Any, num_experts: int) -> jaxmoe.ExpertParallel:
    return jaxmoe.ExpertParallel(
        mesh,
        axis,
        num_experts=num_experts,
        top_k=TOP_K,
        dim=DIM,
        max_tokens=TOKENS,
        dtype="float32",
    )


def make_params(num_experts: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {
        "router": (DIM, num_experts),
        "gate": (num_experts, DIM, HIDDEN),
        "up": (num_experts, DIM, HIDDEN),
        "down": (num_experts, HIDDEN, DIM),
    }
    return {k: rng.standard_normal(s).astype(np.float32) / 2 for k, s in shapes.items()}


def on_slots(params: dict[str, Any], placement: balance.Placement) -> dict[str, Any]:
    return params | {name: params[name][placement.slot_experts] for name in EXPERTS}


def layers_in_a_row(layers: Any, params: Any, placements: Any, x: Any) -> Any:
    """A scalar that depends on all, and what went through each layer."""
    rows = {}
    for name, config in layers.items():
        y, stats = moe_layer(config, params[name], x, placement=placements.get(name))
        x = x + y
        rows[name] = (stats.tokens_per_expert, stats.rows_per_device)
    wave = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return jnp.sum(x * wave), (x, rows)


def test_groups_of_a_mesh_each_with_a_placement():
    """Equal to layers of single experts on one device; then experts move, in the same program."""
    mesh, rng = make_mesh(), np.random.default_rng(0)
    layers, alone, params = {}, {}, {}
    for name, (axis, token_axes, num_experts) in GROUPS.items():
        group = make_group(mesh, axis, SLOTS)
        layers[name] = MoEConfig(
            group, HIDDEN, num_experts=num_experts, token_axes=token_axes, site=name
        )
        alone[name] = MoEConfig(make_group(None, (), num_experts), HIDDEN)
        params[name] = make_params(num_experts, rng)
    x = rng.standard_normal((TOKENS, DIM)).astype(np.float32)

    grad = functools.partial(jax.value_and_grad, argnums=(0, 2), has_aux=True)
    program = jax.jit(grad(functools.partial(layers_in_a_row, layers)))
    single = jax.jit(grad(lambda p, _, x: layers_in_a_row(alone, p, {}, x)))
    (_, (want_y, want_rows)), (want, want_x) = single(params, {}, x)

    placements = {n: random_placement(rng, experts, SLOTS) for n, (*_, experts) in GROUPS.items()}
    placed = {name: on_slots(params[name], placements[name]) for name in GROUPS}
    for look in range(2):
        (_, (y, rows)), (grads, d_x) = jax.block_until_ready(program(placed, placements, x))
        dense.assert_close(y, want_y, 1e-5, "y")
        dense.assert_close(d_x, want_x, 1e-5, "d_x")
        for name in GROUPS:
            slots = np.asarray(placements[name].slot_experts)
            for parameter, gradient in grads[name].items():
                held = slots if parameter in EXPERTS else slice(None)
                dense.assert_close(gradient, want[name][parameter][held], 1e-5, parameter)
            np.testing.assert_array_equal(rows[name][0], want_rows[name][0])
            assert rows[name][1].sum() == TOKENS * TOP_K
        if look == 0:
            for name, config in layers.items():
                placed[name], placements[name] = moved(config.group, placed[name], placements[name])
    assert program._cache_size() <= 2  # arrays of the host, and those that migrate returned


def moved(group: Any, params: dict[str, Any], old: balance.Placement) -> Any:
    """Parameters and placement after a migration to another one."""
    new = random_placement(np.random.default_rng(1), old.num_experts, SLOTS)
    assert balance.count_moves(old, new) > 0
    sharding = NamedSharding(group.mesh, PartitionSpec(group.axis))
    experts = jax.device_put({name: params[name] for name in EXPERTS}, sharding)
    migrate = jax.jit(functools.partial(balance.migrate, group, max_moves=SLOTS))
    experts, placement = migrate(experts, old, new)
    np.testing.assert_array_equal(placement.slot_experts, new.slot_experts)
    return params | experts, placement
