"""Layers in training: scan over layers, rematerialisation, accumulation, balancing, noise."""

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
from test_layer_modes import CONFIG, assert_same, tokens

import jaxmoe
from jaxmoe.routing import RouterConfig

NUM_LAYERS = 3


def stacked_layers(config: cases.Config) -> Any:
    """NUM_LAYERS layers with stacked parameters; the new axis is not sharded."""
    group = exchange.make_group(config, "cpu")

    @nnx.split_rngs(splits=NUM_LAYERS)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs: nnx.Rngs) -> jaxmoe.MoE:
        return jaxmoe.MoE(group, HIDDEN, rngs=rngs)

    return make(nnx.Rngs(0))


def loss_of_scan(graphdef: Any, state: Any, x: Any, wrap: Any = lambda f: f) -> Any:
    """Loss of the stack by `jax.lax.scan` over the state."""

    @wrap
    def layer(x: Any, state: Any) -> Any:
        y, stats = nnx.merge(graphdef, state)(x)
        return x + y, stats.load_balance_loss

    y, losses = jax.lax.scan(layer, x, state)
    return jnp.mean(y * y) + jnp.sum(losses)


def loss_of_loop(graphdef: Any, state: Any, x: Any) -> Any:
    total = jnp.float32(0)
    for i in range(NUM_LAYERS):
        layer = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
        y, stats = layer(x)
        x, total = x + y, total + stats.load_balance_loss
    return jnp.mean(x * x) + total


@functools.cache
def stack() -> Any:
    """Layers, their values, and loss and gradients of the loop that a user would write by hand."""
    # Drawing initial values takes seconds: only shapes and shardings come from the constructor.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: stacked_layers(CONFIG)))
    state = dense.with_params(state, dense.make_params(state))
    program = jax.jit(jax.value_and_grad(loss_of_loop, argnums=1), static_argnums=0)
    return graphdef, state, jax.block_until_ready(program(graphdef, state, tokens()))


def test_stacked_parameters_are_sharded_by_expert():
    """The layers' axis comes first and is not sharded."""
    layers = nnx.eval_shape(lambda: stacked_layers(CONFIG))
    assert layers.gate.shape == (NUM_LAYERS, CONFIG.E, CONFIG.D, HIDDEN)
    assert layers.gate.get_metadata("out_sharding") == (None, "expert", None, None)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scan_over_layers(remat: str):
    graphdef, state, want = stack()
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    wrap = (lambda f: f) if remat == "none" else functools.partial(jax.checkpoint, policy=policy)
    loss = functools.partial(loss_of_scan, graphdef, wrap=wrap)
    got = jax.jit(jax.value_and_grad(loss))(state, tokens())
    assert_same(jax.block_until_ready(got), want)


def test_nnx_scan_and_remat():
    """Flax's own transforms; the stacked axis is dropped from the sharding inside of the scan."""
    graphdef, state, want = stack()

    @nnx.scan(
        in_axes=(nnx.Carry, 0),
        out_axes=(nnx.Carry, 0),
        transform_metadata={nnx.PARTITION_NAME: None},
    )
    @nnx.remat
    def layers(x: Any, layer: jaxmoe.MoE) -> Any:
        y, stats = layer(x)
        return x + y, stats.load_balance_loss

    @nnx.jit
    @nnx.value_and_grad
    def loss(model: jaxmoe.MoE, x: Any) -> Any:
        y, losses = layers(x, model)
        return jnp.mean(y * y) + jnp.sum(losses)

    value, grads = loss(nnx.merge(graphdef, state), tokens())
    assert_same(value, want[0])
    for (_, g), (_, w) in zip(nnx.to_flat_state(grads), nnx.to_flat_state(want[1]), strict=True):
        dense.assert_close(g[...], w[...], 1e-6)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("by", ["scan", "loop"])
def test_gradient_accumulation(by: str):
    """The mean over micro-batches is the sum of their gradients; one layer, one line of code."""
    graphdef, state = nnx.split(dense.abstract_layer(CONFIG))
    params = dense.make_params(state)
    x = tokens()
    parts = jnp.stack([x, 2 * x, -x])

    def loss(params: Any, x: Any) -> Any:
        y, _ = nnx.merge(graphdef, dense.with_params(state, params))(x)
        return jnp.sum(y * y)

    def accumulate(params: Any, parts: Any) -> Any:
        total = jax.tree.map(jnp.zeros_like, params)
        add = lambda total, x: jax.tree.map(jnp.add, total, jax.grad(loss)(params, x))  # noqa: E731
        if by == "scan":
            return jax.lax.scan(lambda c, x: (add(c, x), None), total, parts)[0]
        return functools.reduce(add, parts, total)

    one = jax.jit(jax.grad(loss))
    want = [jax.block_until_ready(one(params, part)) for part in parts]
    program = jax.jit(accumulate)
    for _ in range(10):
        got = jax.block_until_ready(program(params, parts))
        for name in params:
            dense.assert_close(got[name], sum(w[name] for w in want), 1e-6, name)


def test_bias_moves_load_towards_balance():
    config = layer_config("data_expert", capacity_factor=None)
    graphdef, state = nnx.split(dense.abstract_layer(config, use_bias=True))
    params = dense.make_params(state)
    params["router"] = dense.skew(config, params["router"], "zipf")
    params["router_bias"] = np.zeros(config.E, np.float32)
    layer = nnx.merge(graphdef, dense.with_params(state, params))

    @nnx.jit
    def step(layer: jaxmoe.MoE, x: Any) -> Any:
        _, stats = layer(x)
        layer.update_bias(stats, 0.02)
        return stats.tokens_per_expert

    x = tokens(config)
    loads = [np.asarray(jax.block_until_ready(step(layer, x))) for _ in range(60)]
    assert {load.sum() for load in loads} == {x.shape[0] * config.T * config.K}
    first, last = (np.max(load) - np.min(load) for load in (loads[0], np.mean(loads[-8:], axis=0)))
    assert last < first / 3
    assert abs(float(layer.router_bias[...].sum())) < 1.0


def test_bias_takes_no_gradient():
    graphdef, state = nnx.split(dense.abstract_layer(CONFIG, use_bias=True))
    state = dense.with_params(state, dense.make_params(state))

    def loss(state: Any, x: Any) -> Any:
        return jnp.sum(nnx.merge(graphdef, state)(x)[0] ** 2)

    grads = jax.block_until_ready(jax.jit(jax.grad(loss))(state, tokens()))
    by_name = {path[-1]: v[...] for path, v in nnx.to_flat_state(grads)}
    assert not np.any(by_name["router_bias"]) and np.any(by_name["router"])


def test_jitter():
    """Noise with a key, none without; the same key gives the same noise, devices draw their own."""
    graphdef, state = nnx.split(dense.abstract_layer(CONFIG, router=RouterConfig(jitter=0.5)))
    layer = nnx.merge(graphdef, dense.with_params(state, dense.make_params(state)))
    program = jax.jit(lambda x, key: layer(x, key=key)[0])
    x = jnp.broadcast_to(tokens()[:1, :1], tokens().shape)  # the same token everywhere
    quiet, first, again, other = (
        np.asarray(program(x, key))
        for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    )
    np.testing.assert_array_equal(first, again)
    assert np.ptp(quiet, axis=(0, 1)).max() == 0
    assert not np.array_equal(first, quiet) and not np.array_equal(first, other)
    assert len(np.unique(first[:, 0], axis=0)) > 1  # over the devices
