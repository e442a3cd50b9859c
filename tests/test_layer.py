"""`jaxmoe.MoE` equals a dense computation that runs every expert on every token."""

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
from cases import Config
from dense import COEFFICIENTS, ROUTINGS, layer_config
from flax import nnx

import jaxmoe
from jaxmoe.routing import RouterConfig

# The bound; sums of the two computations run in different orders.
F32_TOLERANCE = 1e-5

# R = 1, 2, 4, 8; without a mesh, with data axes, with a tuple of axes; with and without drops.
LAYER_CASES = [
    *((name, routing) for name in ("data_expert", "eight_devices") for routing in ROUTINGS),
    *((name, routing) for name in ("no_mesh", "two_devices_f16") for routing in ROUTINGS[:3]),
    ("no_mesh", "masked"),
    ("one_expert_device", "masked"),
    ("no_mesh_drops", "zipf"),
    ("expert_data_tiny", "uniform"),
    ("data_expert_explicit", "zipf"),
    ("tuple", "zipf"),
    ("reversed", "one_expert"),
    ("no_tokens", "uniform"),
]
route = jax.jit(jaxmoe.route, static_argnums=(1, 2))
SMOKE = {("data_expert", "masked"), ("eight_devices", "zipf")}


@functools.cache
def compiled(config: Config, transport: str = "cpu", **options: Any) -> Any:
    """Parameters, and output, statistics and gradients as a function of params, x and mask."""
    graphdef, state = nnx.split(dense.abstract_layer(config, transport, **options))

    def loss(params: Any, x: Any, mask: Any) -> Any:
        y, stats = nnx.merge(graphdef, dense.with_params(state, params))(x, mask=mask)
        return dense.objective(y, stats), (y, stats)

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return dense.make_params(state), program


@functools.cache
def dense_program(config: Config, router: RouterConfig) -> Any:
    """The same results as `compiled`, from a further argument: which choices find a row."""

    def loss(params: Any, x: Any, mask: Any, keep: Any) -> Any:
        y, stats = dense.forward(config, params, x, mask, router, keep=keep)
        return dense.objective(y, stats), (y, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def spread(config: Config, a: np.ndarray) -> jax.Array:
    """[devices, ...] with the first dimension over all axes of the mesh."""
    return exchange.place(config, cases.slices_first(config, a))


def both(config: Config, routing: str, **options: Any) -> tuple[Any, Any]:
    """Output, statistics and gradients: the layer's and the dense ones."""
    params, program = compiled(config, **options)
    params = {**params, "router": dense.skew(config, params["router"], routing)}
    x, mask = dense.make_tokens(config), dense.make_mask(config, routing)
    got = jax.block_until_ready(program(params, spread(config, x), spread(config, mask)))

    router = options.get("router", RouterConfig())
    ids = route(jnp.asarray(x @ params["router"]), config.K, router, mask=mask).expert_ids
    keep = dense.kept(config, np.asarray(ids))
    return got, dense_program(config, router)(params, x, mask, keep)


def check(got: Any, want: Any, tolerance: float) -> None:
    (_, (y, stats)), (d_params, d_x) = got
    (_, (want_y, want_stats)), (want_d_params, want_d_x) = want
    dense.assert_close(y, want_y, tolerance, "y")
    dense.assert_close(d_x, want_d_x, tolerance, "d_x")
    for name, gradient in want_d_params.items():
        dense.assert_close(d_params[name], gradient, tolerance, name)
    for name in (
        "tokens_per_expert",
        "rows_per_device",
        "num_dropped",
        "num_refused",
        "num_rerouted",
    ):
        np.testing.assert_array_equal(getattr(stats, name), getattr(want_stats, name), name)
    for name in COEFFICIENTS:
        dense.assert_close(getattr(stats, name), getattr(want_stats, name), tolerance, name)


@pytest.mark.parametrize(
    "name, routing",
    [
        pytest.param(*c, marks=pytest.mark.smoke if c in SMOKE else (), id="-".join(c))
        for c in LAYER_CASES
    ],
)
def test_layer_equals_dense(name: str, routing: str):
    config = layer_config(name)
    got, want = both(config, routing)
    check(got, want, F32_TOLERANCE)
    if config.capacity_factor == 0.5 and routing == "one_expert":
        assert got[0][1][1].num_dropped > 0


@pytest.mark.parametrize(
    "options",
    [
        dict(router=RouterConfig(score="sigmoid", scale=2.5, num_groups=4, top_groups=2)),
        dict(router=RouterConfig(topk_first=True), num_shared_experts=2, shared_hidden_dim=5),
    ],
    ids=["groups", "shared"],
)
def test_options_equal_dense(options: dict[str, Any]):
    check(*both(layer_config("plain"), "masked", **options), F32_TOLERANCE)


def test_reference_transport_equals_dense():
    check(*both(layer_config("data_expert"), "zipf", transport="xla"), F32_TOLERANCE)


def test_bfloat16_is_near_the_dense_computation():
    """Rows, weights and partial sums round to 8 bits, and so do the hidden values: a handful of
    roundings of 2^-8 each, of which the worst element sees at most eight at once.
    """
    got, want = both(layer_config("plain", dtype="bfloat16"), "zipf")
    tolerance = 8 * 2**-8
    (_, (y, stats)), (d_params, d_x) = got
    (_, (want_y, want_stats)), (want_d_params, want_d_x) = want
    assert y.dtype == jnp.float32  # like x
    dense.assert_close(y, want_y, tolerance, "y")
    dense.assert_close(d_x, want_d_x, tolerance, "d_x")
    for name, gradient in want_d_params.items():
        assert d_params[name].dtype == jnp.float32
        dense.assert_close(d_params[name], gradient, tolerance, name)
    # The router computes in float32 whatever the group's dtype is.
    np.testing.assert_array_equal(stats.tokens_per_expert, want_stats.tokens_per_expert)
    dense.assert_close(stats.entropy, want_stats.entropy, F32_TOLERANCE)


def test_statistics_count_what_happened():
    """All first choices on one expert: its load is the number of tokens that are not masked."""
    config = layer_config("eight_devices", K=1, capacity_factor=1.0)
    params, program = compiled(config)
    params = {**params, "router": dense.skew(config, params["router"], "one_expert")}
    x, mask = dense.make_tokens(config), dense.make_mask(config, "masked")
    (_, (_, stats)), _ = jax.block_until_ready(
        program(params, spread(config, x), spread(config, mask))
    )
    assert stats.tokens_per_expert[-1] == mask.sum() == stats.tokens_per_expert.sum()
    assert stats.num_dropped == mask.sum() - config.C
    assert float(stats.entropy) < 0.01
    np.testing.assert_allclose(stats.load_balance_loss, config.E, rtol=1e-3)
