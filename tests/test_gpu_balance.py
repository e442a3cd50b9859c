"""Replicas and migration on the GPUs of this process; skipped and required like `test_gpu.py`."""

from __future__ import annotations

import functools
from typing import Any

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from placements import random_placement
from test_gpu import GPUS, gpus

import jaxmoe
from jaxmoe import balance
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig
from jaxmoe.routing import RouterConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
__all__ = ["gpus"]

TOKENS, DIM, HIDDEN, TOP_K, NUM_EXPERTS = 48, 32, 48, 3, 6
EXPERTS = ("gate", "up", "down")
# Products of float32 may run in TF32, with 11 bits.
TOLERANCE = 2.0**-8


def make_params(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {
        "router": (DIM, NUM_EXPERTS),
        "gate": (NUM_EXPERTS, DIM, HIDDEN),
        "up": (NUM_EXPERTS, DIM, HIDDEN),
        "down": (NUM_EXPERTS, HIDDEN, DIM),
    }
    params = {k: rng.standard_normal(s).astype(np.float32) / 4 for k, s in shapes.items()}
    params["router"] = np.round(params["router"] * 16) / 16  # the same choice in any precision
    return params


def make_config(devices: int, transport: str, num_slots: int, **options: Any) -> MoEConfig:
    mesh = None if devices == 1 else jax.make_mesh((devices,), ("expert",))
    group = jaxmoe.ExpertParallel(
        mesh,
        num_experts=num_slots,
        top_k=TOP_K,
        dim=DIM,
        max_tokens=TOKENS * GPUS // devices,
        dtype="float32",
        transport=transport,
    )
    return MoEConfig(group, HIDDEN, num_experts=NUM_EXPERTS, **options)


def program(config: MoEConfig) -> Any:
    def loss(params: Any, x: Any, placement: Any) -> Any:
        y, stats = moe_layer(config, params, x, placement=placement)
        return jnp.sum(y * y), (y, stats)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("options", [{}, dict(expert_capacity_factor=1.0, capacity_retries=1)])
def test_replicas_and_a_migration_change_nothing(options: dict[str, Any]):
    check("p2p", RouterConfig(**options))


def check(transport: str, router: RouterConfig) -> None:
    """A layer with replicas equals one without, before and after its experts move."""
    rng = np.random.default_rng(0)
    params, slots = make_params(rng), 4 * GPUS
    x = np.round(rng.standard_normal((GPUS * TOKENS, DIM)) * 8).astype(np.float32) / 8
    config = make_config(GPUS, transport, slots, router=router)
    plain = make_config(GPUS, "xla", slots, router=router)
    old, new = (random_placement(rng, NUM_EXPERTS, slots) for _ in range(2))
    held = {name: params[name][old.slot_experts] for name in EXPERTS}
    sharding = NamedSharding(config.group.mesh, PartitionSpec("expert"))
    held, run, wanted = jax.device_put(held, sharding), program(config), program(plain)
    migrate = jax.jit(functools.partial(balance.migrate, config.group, max_moves=slots))

    outputs = []
    for placement in (old, new):
        if placement is new:
            held, placement = migrate(held, old, new)
        for name in EXPERTS:  # bit for bit
            rows = params[name][np.asarray(placement.slot_experts)]
            np.testing.assert_array_equal(np.asarray(held[name]), rows)
        (_, (y, stats)), grads = run(params | held, x, placement)
        (_, (want_y, want_stats)), want = wanted(params | held, x, placement)
        dense.assert_close(y, want_y, TOLERANCE, "y")
        for name, gradient in grads.items():
            dense.assert_close(gradient, want[name], TOLERANCE, name)
        for name in ("tokens_per_expert", "rows_per_device", "num_refused", "num_rerouted"):
            np.testing.assert_array_equal(getattr(stats, name), getattr(want_stats, name))
        for expert in range(NUM_EXPERTS):  # replicas stay equal only if their gradients are
            same = np.asarray(grads["up"])[np.asarray(placement.slot_experts) == expert]
            np.testing.assert_array_equal(same, np.broadcast_to(same[0], same.shape))
        outputs.append(np.asarray(y))
    if router.expert_capacity_factor is None:  # which depends on the number of replicas
        dense.assert_close(outputs[1], outputs[0], TOLERANCE, "after the migration")
        alone = make_config(1, "xla", NUM_EXPERTS, router=router)
        (_, (y, _)), want = program(alone)(params, x, balance.contiguous(NUM_EXPERTS))
        dense.assert_close(outputs[1], y, TOLERANCE, "as one device")
