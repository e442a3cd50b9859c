"""A layer with replicas equals the layer without: output, losses and gradients, in float32."""

from __future__ import annotations

import functools
from typing import Any

import cases
import dense
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from placements import random_placement, zipf

import jaxmoe
from jaxmoe import balance
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig
from jaxmoe.linen import MoE as LinenMoE
from jaxmoe.nnx import PlacementArray
from jaxmoe.routing import RouterConfig

# Sums of the two layers run in different orders.
TOLERANCE = 1e-5
EXPERTS = ("gate", "up", "down")
# Slots come from the table's E; these many experts share them.
LAYERS = {"eight_devices": 10, "data_expert": 6, "tuple": 5, "no_mesh": 4, "reversed": 8}


def replicated_config(name: str, **options: Any) -> tuple[cases.Config, MoEConfig]:
    """A table's configuration without drops, and the layer with replicas on it."""
    config = dense.layer_config(name, capacity_factor=None)
    group = exchange.make_group(config, "cpu")
    return config, MoEConfig(group, dense.HIDDEN, num_experts=LAYERS[name], **options)


@functools.cache
def programs(name: str, **options: Any) -> tuple[Any, Any]:
    """Output, statistics and gradients: of the layer with replicas, and of one on one device."""
    config, moe = replicated_config(name, num_shared_experts=1, observe_load=True, **options)
    experts = LAYERS[name]
    rows = config.num_slices * config.R * config.T
    whole = jaxmoe.ExpertParallel(
        num_experts=experts, top_k=config.K, dim=config.D, max_tokens=rows, dtype=jnp.float32
    )
    alone = MoEConfig(whole, dense.HIDDEN, num_shared_experts=1, router=moe.router)

    def loss(moe: MoEConfig, params: Any, x: Any, mask: Any, placement: Any = None) -> Any:
        y, stats = moe_layer(moe, params, x, mask=mask, placement=placement)
        return dense.objective(y, stats), (y, stats)

    def program(moe: MoEConfig) -> Any:
        grad = jax.value_and_grad(functools.partial(loss, moe), argnums=(0, 1), has_aux=True)
        return jax.jit(grad)

    return program(moe), program(alone)


def inputs(name: str, routing: str) -> tuple[Any, ...]:
    """Parameters per expert, tokens [devices, T, D] and mask."""
    config, _ = replicated_config(name)
    experts, rng = LAYERS[name], cases.make_rng(name)
    shapes = {
        "router": (config.D, experts),
        "gate": (experts, config.D, dense.HIDDEN),
        "up": (experts, config.D, dense.HIDDEN),
        "down": (experts, dense.HIDDEN, config.D),
        "shared_gate": (config.D, dense.HIDDEN),
        "shared_up": (config.D, dense.HIDDEN),
        "shared_down": (dense.HIDDEN, config.D),
    }
    params = {k: rng.standard_normal(s).astype(np.float32) / 2 for k, s in shapes.items()}
    params["router"][0] = 5 * np.log(zipf(experts)) if routing == "zipf" else 0
    return params, dense.make_tokens(config), dense.make_mask(config, routing)


def placed(params: dict[str, Any], placement: balance.Placement) -> dict[str, Any]:
    """The parameters with a row for each slot; empty slots hold NaN."""
    slots = np.asarray(placement.slot_experts)
    rows = {
        name: np.where((slots >= 0)[:, None, None], params[name][slots], np.float32(np.nan))
        for name in EXPERTS
    }
    return params | rows


@pytest.mark.parametrize(
    "name, routing, num_empty, options",
    [
        ("eight_devices", "zipf", 0, {}),
        ("eight_devices", "masked", 2, {}),
        ("data_expert", "zipf", 1, {}),
        ("tuple", "uniform", 0, dict(exact_replicas=True, devices_per_node=2)),
        ("reversed", "masked", 0, {}),  # as many slots as experts
        ("no_mesh", "uniform", 0, {}),
    ],
)
def test_replicas_change_nothing(name: str, routing: str, num_empty: int, options: dict[str, Any]):
    config, _ = replicated_config(name)
    params, x, mask = inputs(name, routing)
    program, alone = programs(name, **options)
    rng = cases.make_rng(f"{name}{routing}")
    placement = random_placement(rng, LAYERS[name], config.E, num_empty)
    (_, (want_y, want_stats)), (want, want_x) = alone(params, x, mask)
    got = program(placed(params, placement), x, mask, placement)
    (_, (y, stats)), (grads, d_x) = jax.block_until_ready(got)

    dense.assert_close(y, want_y, TOLERANCE, "y")
    dense.assert_close(d_x, want_x, TOLERANCE, "d_x")
    held = placement.slot_experts >= 0
    for parameter in params:
        if parameter in EXPERTS:
            gradient = np.asarray(grads[parameter])
            np.testing.assert_array_equal(gradient[~held], 0)
            got_rows, want_rows = gradient[held], want[parameter][placement.slot_experts[held]]
            for expert in range(LAYERS[name]):  # replicas stay equal only if their gradients are
                same = gradient[placement.slot_experts == expert]
                np.testing.assert_array_equal(same, np.broadcast_to(same[0], same.shape))
        else:
            got_rows, want_rows = grads[parameter], want[parameter]
        dense.assert_close(got_rows, want_rows, TOLERANCE, parameter)
    np.testing.assert_array_equal(stats.tokens_per_expert, want_stats.tokens_per_expert)
    for loss in dense.COEFFICIENTS:
        dense.assert_close(getattr(stats, loss), getattr(want_stats, loss), TOLERANCE, loss)


def test_load_that_a_layer_observes():
    """Counted again from the choices: who chose what together, and which devices were sent to."""
    name = "data_expert"
    config, _ = replicated_config(name)
    params, x, mask = inputs(name, "masked")
    placement = random_placement(cases.make_rng("load"), LAYERS[name], config.E)
    _, (_, stats) = programs(name)[0](placed(params, placement), x, mask, placement)[0]
    routing = jaxmoe.route(jnp.asarray(x @ params["router"]), config.K, mask=mask)
    together = np.zeros((LAYERS[name],) * 2)
    traffic = np.zeros((config.R, config.R))
    for s, device in np.ndindex(config.num_slices, config.R):
        ids = jnp.asarray(cases.slices_first(config, np.asarray(routing.expert_ids))[s, device])
        near = balance.near_replicas(placement, device, num_devices=config.R)
        slots = np.asarray(balance.choose_replicas(near, ids))
        for token in range(config.T):
            chosen = [e for e in np.asarray(ids[token]).tolist() if e >= 0]
            together[np.ix_(chosen, chosen)] += 1
            for target in {slot // config.L for slot in slots[token].tolist() if slot >= 0}:
                traffic[device, target] += 1
    np.testing.assert_array_equal(stats.load.together, together)
    np.testing.assert_array_equal(stats.load.traffic, traffic)
    np.testing.assert_array_equal(stats.load.tokens_per_expert, stats.tokens_per_expert)


def test_one_program_serves_all_placements():
    config, moe = replicated_config("eight_devices")
    params, x, mask = inputs("eight_devices", "zipf")
    params = {name: a for name, a in params.items() if not name.startswith("shared")}
    traces = []

    @jax.jit
    def output(params: Any, placement: Any) -> Any:
        traces.append(0)
        return moe_layer(moe, params, x, mask=mask, placement=placement)[0]

    rng = np.random.default_rng(0)
    for _ in range(3):
        placement = random_placement(rng, LAYERS["eight_devices"], config.E)
        output(placed(params, placement), placement).block_until_ready()
    assert len(traces) == 1


def test_flax_modules_keep_their_placement():
    config, moe = replicated_config("eight_devices")
    experts = LAYERS["eight_devices"]
    layer = jaxmoe.MoE(moe.group, 6, num_experts=experts, use_bias=True, rngs=nnx.Rngs(0))
    slots = np.arange(config.E) % experts
    for name in EXPERTS:
        rows = np.asarray(getattr(layer, name)[...])
        np.testing.assert_array_equal(rows, rows[slots])
    x = dense.make_tokens(config)
    call = nnx.jit(lambda layer, x: layer(x))
    before, stats = call(layer, x)
    assert stats.tokens_per_expert.shape == layer.router_bias.shape == (experts,)

    placement = random_placement(np.random.default_rng(0), experts, config.E)
    params = {name: getattr(layer, name)[...] for name in EXPERTS}
    migrate = jax.jit(functools.partial(balance.migrate, moe.group, max_moves=16))
    params, moved = migrate(params, layer.placement, placement)
    for name, rows in params.items():
        getattr(layer, name)[...] = rows
    layer.set_placement(moved)
    after, _ = call(layer, x)
    dense.assert_close(after, before, TOLERANCE, "y")
    assert len(jax.tree.leaves(nnx.state(layer, PlacementArray))) == 3


def test_linen_module_takes_a_placement():
    config, moe = replicated_config("eight_devices")
    module = LinenMoE(moe.group, 6, num_experts=10, use_bias=True, observe_load=True)
    x = jax.ShapeDtypeStruct((8, 3, config.D), jnp.float32)
    start = balance.contiguous(10, config.E)

    def init(key: Any, x: Any) -> Any:
        (_, stats), variables = module.init_with_output(key, x, placement=start)
        return stats, linen.meta.unbox(variables)

    stats, variables = jax.eval_shape(init, jax.random.key(0), x)
    assert variables["params"]["up"].shape == (16, config.D, 6)
    assert variables["params"]["router"].shape == (config.D, 10)
    assert variables["router"]["bias"].shape == stats.tokens_per_expert.shape == (10,)
    assert stats.load.traffic.shape == (8, 8)


def test_bad_placements_of_a_layer():
    config, moe = replicated_config("eight_devices")
    group = moe.group
    x = jax.ShapeDtypeStruct((8, 3, config.D), jnp.float32)
    params = {
        "router": jax.ShapeDtypeStruct((config.D, 10), jnp.float32),
        "gate": jax.ShapeDtypeStruct((16, config.D, 6), jnp.float32),
    }

    def call(placement: Any) -> Any:
        return jax.eval_shape(functools.partial(moe_layer, moe), params, x, placement=placement)

    with pytest.raises(ValueError, match=r"^MoE: 10 experts share 16 slots, but placement is None"):
        call(None)
    with pytest.raises(
        ValueError, match=r"^`MoE placement`: it places 9 experts, the model has 10"
    ):
        call(balance.contiguous(9, 16))
    with pytest.raises(ValueError, match=r"^`MoE placement`: it fills 14 slots, the group has 16. "
                       "If devices left or joined"):  # fmt: skip
        call(balance.contiguous(10, 14))
    for wrong in (17, 1):
        with pytest.raises(ValueError, match=rf"^MoE: num_experts \({wrong}\) must lie between"):
            MoEConfig(group, 6, num_experts=wrong)
    with pytest.raises(ValueError, match=r"^MoE: devices_per_node \(3\) must divide the 8 devices"):
        MoEConfig(group, 6, devices_per_node=3)
    with pytest.raises(ValueError, match=r"^MoE: router.num_nodes \(4\) must be the 8 devices"):
        MoEConfig(group, 6, devices_per_node=4, router=RouterConfig(num_nodes=4, top_nodes=2))

    def set_placement(placement: balance.Placement, num_experts: int | None = 10) -> None:
        """On a layer without values, which take seconds to draw."""

        def make() -> None:
            layer = jaxmoe.MoE(group, 6, num_experts=num_experts, rngs=nnx.Rngs(0))
            layer.set_placement(placement)

        nnx.eval_shape(make)

    with pytest.raises(ValueError, match=r"^`MoE.set_placement`: it places 16 experts"):
        set_placement(balance.contiguous(16))
    few = balance.placement_of(balance.contiguous(10, 16).slot_experts, 10, max_replicas=2)
    with pytest.raises(ValueError, match=r"room for 2 replicas of an expert, the layer's for 7"):
        set_placement(few)
    with pytest.raises(ValueError, match=r"this layer has no placement. Make it with num_experts"):
        set_placement(balance.contiguous(16), num_experts=None)
