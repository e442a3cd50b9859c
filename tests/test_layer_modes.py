"""Ways to hold and to call a layer: all give the same output."""

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
from dense import HIDDEN, layer_config
from flax import nnx
from jax.sharding import PartitionSpec

import jaxmoe
from jaxmoe import linen
from jaxmoe.routing import RouterConfig

CONFIG = layer_config("data_expert")
TOLERANCE = 1e-6  # the same program but for its surroundings


def tokens(config: cases.Config = CONFIG) -> jax.Array:
    return exchange.place(config, cases.slices_first(config, dense.make_tokens(config)))


@functools.cache
def layer_with_values(config: cases.Config = CONFIG, **options: Any) -> jaxmoe.MoE:
    graphdef, state = nnx.split(dense.abstract_layer(config, **options))
    return nnx.merge(graphdef, dense.with_params(state, dense.make_params(state)))


@functools.cache
def wanted() -> tuple[Any, Any]:
    """Output and statistics under jax.jit with the state as an argument."""
    graphdef, state = nnx.split(layer_with_values())
    return jax.block_until_ready(
        jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, tokens())
    )


def assert_same(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: dense.assert_close(g, w, TOLERANCE), got, want)


@pytest.mark.smoke
def test_nnx_jit():
    assert_same(nnx.jit(lambda layer, x: layer(x))(layer_with_values(), tokens()), wanted())


def test_parameters_closed_over():
    layer = layer_with_values()
    assert_same(jax.jit(lambda x: layer(x))(tokens()), wanted())


def test_inside_the_users_shard_map():
    """On shards of the tokens and of the parameters: the same output, statistics and gradients."""
    mesh, layer = cases.make_mesh(CONFIG), layer_with_values()
    graphdef, state = nnx.split(layer)
    axes = PartitionSpec(mesh.axis_names)
    specs = jax.tree.map(
        lambda v: PartitionSpec(*v.get_metadata("out_sharding")), state, is_leaf=is_variable
    )
    sharded = jax.shard_map(
        lambda state, x: nnx.merge(graphdef, state)(x),
        mesh=mesh,
        in_specs=(specs, axes),
        out_specs=(axes, PartitionSpec()),
    )
    assert_same(jax.jit(sharded)(state, tokens()), wanted())
    both = (sharded, lambda state, x: nnx.merge(graphdef, state)(x))
    got, want = (
        jax.jit(jax.grad(lambda state, x, f=f: dense.objective(*f(state, x))))(state, tokens())
        for f in both
    )
    assert_same(jax.block_until_ready(got), want)


def is_variable(v: Any) -> bool:
    return isinstance(v, nnx.Variable)


@pytest.mark.parametrize("shape", [(32,), (8, 4), (8, 2, 2)], ids=str)
def test_tokens_of_any_number_of_dimensions(shape: tuple[int, ...]):
    layer = layer_with_values()
    x = dense.make_tokens(CONFIG).reshape(*shape, CONFIG.D)
    y, stats = jax.block_until_ready(jax.jit(lambda x: layer(x))(x))
    assert y.shape == x.shape
    want_y, want_stats = wanted()
    assert_same(y.reshape(want_y.shape), want_y)
    assert_same(stats.load_balance_loss, want_stats.load_balance_loss)


def test_tokens_sharded_over_the_expert_axis_only():
    """The data axis holds copies: the same output, and each token is counted once."""
    graphdef, state = nnx.split(dense.abstract_layer(CONFIG, token_axes=("expert",)))
    params = dense.make_params(state)
    x = dense.make_tokens(CONFIG)[: CONFIG.R]
    mask, keep = np.ones(x.shape[:2], bool), np.ones((*x.shape[:2], CONFIG.K), bool)

    def layer(params: Any, x: Any) -> Any:
        return nnx.merge(graphdef, dense.with_params(state, params))(x)

    def reference(params: Any, x: Any) -> Any:
        return dense.forward(CONFIG, params, x, mask, keep=keep)

    def results(f: Any) -> Any:
        grads = jax.grad(lambda params, x: dense.objective(*f(params, x)))
        return jax.block_until_ready(jax.jit(lambda *a: (f(*a), grads(*a)))(params, x))

    ((y, stats), grads), ((want_y, want_stats), want_grads) = results(layer), results(reference)
    dense.assert_close(y, want_y, 1e-5)
    for name, gradient in want_grads.items():
        dense.assert_close(grads[name], gradient, 1e-5, name)
    np.testing.assert_array_equal(stats.tokens_per_expert, want_stats.tokens_per_expert)


@pytest.mark.parametrize("use_bias", [False, True])
def test_linen_equals_nnx(use_bias: bool):
    group = exchange.make_group(CONFIG, "cpu")
    options = dict(num_shared_experts=1, use_bias=use_bias, router=RouterConfig(score="sigmoid"))
    layer = linen.MoE(group, HIDDEN, **options)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), tokens())
    boxes = shapes["params"]
    other = layer_with_values(**options)
    params = {path[-1]: v[...] for path, v in nnx.to_flat_state(nnx.state(other))}
    bias = params.pop("router_bias", None)
    assert {n: b.value.shape for n, b in boxes.items()} == {n: p.shape for n, p in params.items()}
    assert boxes["gate"].names == ("expert", None, None)
    variables = {"params": params} | ({"router": {"bias": bias}} if use_bias else {})
    assert ("router" in shapes) == use_bias
    got = jax.jit(layer.apply)(variables, tokens())
    want = jax.jit(lambda x: other(x))(tokens())
    assert_same(jax.block_until_ready(got), want)


def test_linen_initial_values():
    layer = linen.MoE(exchange.make_group(CONFIG, "cpu"), HIDDEN)
    variables = jax.jit(layer.init)(jax.random.key(0), tokens())
    gate = variables["params"]["gate"].value
    assert gate.shape == (CONFIG.E, CONFIG.D, HIDDEN)
    assert abs(float(jnp.std(gate)) * CONFIG.D**0.5 - 1) < 0.2  # variance 1 / fan-in


@pytest.mark.parametrize("name", ["data_expert_explicit", "tuple"])
def test_experts_are_sharded_over_the_expert_axis(name: str):
    config = layer_config(name)
    layer = dense.make_layer(config)
    axis = cases.MESHES[config.mesh].axis
    for parameter in (layer.gate, layer.up, layer.down):
        assert parameter[...].sharding.spec == PartitionSpec(axis, None, None)
        assert parameter[...].addressable_shards[0].data.shape[0] == config.L
    assert layer.router[...].sharding.is_fully_replicated


def test_eval_shape_makes_nothing():
    layer = dense.abstract_layer(CONFIG, num_shared_experts=3, shared_hidden_dim=2, use_bias=True)
    shapes = {path[-1]: v.shape for path, v in nnx.to_flat_state(nnx.state(layer))}
    D, E, F = CONFIG.D, CONFIG.E, HIDDEN
    assert shapes == {
        "router": (D, E),
        "gate": (E, D, F),
        "up": (E, D, F),
        "down": (E, F, D),
        "shared_gate": (D, 6),
        "shared_up": (D, 6),
        "shared_down": (6, D),
        "router_bias": (E,),
    }
    assert isinstance(layer.router_bias, jaxmoe.RouterBias)
    assert len(nnx.to_flat_state(nnx.state(layer, nnx.Param))) == 7


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(dtype: str, param_dtype: str, x_dtype: str):
    """Output like x, gradients like the parameters, statistics in float32, whatever the group."""
    config = layer_config("no_mesh", dtype=dtype)
    graphdef, state = nnx.split(dense.abstract_layer(config, param_dtype=param_dtype))
    x = jax.ShapeDtypeStruct((1, config.T, config.D), x_dtype)

    def loss(state: Any, x: Any) -> Any:
        y, stats = nnx.merge(graphdef, state)(x)
        return dense.objective(y.astype(jnp.float32), stats), (y, stats)

    (_, (y, stats)), grads = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), state, x)
    assert y.dtype == x_dtype and stats.entropy.dtype == jnp.float32
    assert all(v.dtype == param_dtype for _, v in nnx.to_flat_state(grads))
