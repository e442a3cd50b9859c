"""Layers whose experts compute in FP8: quantised for decoding, and in each step of training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import dense
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
import jaxmoe.linen
from jaxmoe import compress
from jaxmoe.experts import swiglu_experts
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig

FP8 = jnp.float8_e4m3fn
# On one device, and over a mesh with slices.
CONFIGS = {
    "no_mesh": dense.layer_config("no_mesh", D=144, dtype="bfloat16", wire="amax"),
    "data_expert": dense.layer_config("data_expert", D=16, dtype="bfloat16", wire="amax"),
}


def make_layer(config: cases.Config, **options: Any) -> tuple[jaxmoe.MoE, Any]:
    graphdef, state = nnx.split(dense.abstract_layer(config, **options))
    state = dense.with_params(state, dense.make_params(state))
    moe = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
    return moe, exchange.place(config, cases.slices_first(config, dense.make_tokens(config)))


def output(moe: jaxmoe.MoE, x: Any) -> np.ndarray:
    return np.asarray(nnx.jit(lambda moe, x: moe(x)[0])(moe, x), np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_layer(name: str):
    """Near the float layer of the dequantised weights: rows and hidden rows are quantised, too, by
    2^-4 of themselves at most, which errors of both signs turn into less.
    """
    moe, x = make_layer(dataclasses.replace(CONFIGS[name], wire=None), num_shared_experts=1)
    small = compress.quantize_layer(moe, "fp8_blocks")
    weights = small.expert_weights
    assert all(isinstance(w, jaxmoe.BlockQuantizedExperts) for w in weights.values())
    exact = nnx.clone(moe)
    for key, weight in weights.items():
        getattr(exact, key)[...] = weight.dequantize()
    got, want = output(small, x), output(exact, x)
    error = np.abs(got - want).max()
    assert 0 < error < 2**-4 * np.abs(want).max()
    assert output(moe, x).tobytes() != want.tobytes()
    left = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(small, nnx.Param))}
    assert left == {"router", "shared_gate", "shared_up", "shared_down"}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_in_fp8_go_straight_into_the_product(name: str):
    """As the parts, one after the other, and near the layer that quantises rows again."""
    outputs = {}
    for fp8_rows in (True, False):
        config = dataclasses.replace(CONFIGS[name], fp8_rows=fp8_rows)
        moe, _ = make_layer(config)
        x = exchange.place(config, cases.slices_first(config, dense.make_tokens(CONFIGS[name])))
        small = compress.quantize_layer(moe, "fp8_blocks")
        outputs[fp8_rows] = output(small, x)
        if name == "no_mesh":
            np.testing.assert_array_equal(outputs[fp8_rows], by_hand(small, x))
    atol = 2**-4 * np.abs(outputs[False]).max()
    np.testing.assert_allclose(outputs[True], outputs[False], rtol=0, atol=atol)


def by_hand(moe: jaxmoe.MoE, x: Any) -> np.ndarray:
    """The layer's output by the library's functions."""
    group, weights = moe.config.group, moe.expert_weights

    @jax.jit
    def run(x: Any, router: Any) -> Any:
        routing = jaxmoe.route(x.astype(jnp.float32) @ router, group.top_k, moe.config.router)
        choices = (a.reshape(-1, group.top_k) for a in (routing.expert_ids, routing.weights))
        tokens = x.reshape(-1, group.dim).astype(group.dtype)
        rows, row_weights, plan = jaxmoe.dispatch(group, tokens, *choices)
        assert isinstance(rows, jaxmoe.QuantizedRows) == (group.rows_dtype is not None)
        y = swiglu_experts(rows, plan.group_sizes, *(weights[k] for k in ("gate", "up", "down")))
        return jaxmoe.combine(group, y, row_weights, plan).reshape(x.shape).astype(x.dtype)

    return np.asarray(run(x, moe.router[...]), np.float32)


def test_a_shared_up_projection_and_replicas():
    config = dataclasses.replace(CONFIGS["no_mesh"], wire=None)
    for options in ({"shared_up": True}, {"num_experts": 4}):
        moe, x = make_layer(config)
        moe = jaxmoe.MoE(moe.config.group, dense.HIDDEN, rngs=nnx.Rngs(0), **options)
        want, got = output(moe, x), output(compress.quantize_layer(moe, "fp8_blocks"), x)
        assert 0 < np.abs(got - want).max() < 2**-3 * np.abs(want).max()


def gradients(config: MoEConfig, params: Any, x: Any) -> tuple[Any, Any]:
    def loss(params: Any, x: Any) -> Any:
        y, stats = moe_layer(config, params, x)
        return jnp.sum(y.astype(jnp.float32) ** 2) + stats.load_balance_loss

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_in_fp8(name: str):
    """The forward pass of the quantised layer; gradients of the parameters near those in floats, in
    direction and in size.
    """
    moe, x = make_layer(dataclasses.replace(CONFIGS[name], wire=None))
    params = {"router": moe.router[...], **moe.expert_weights}
    floats, fp8 = moe.config, dataclasses.replace(moe.config, expert_dtype=FP8)
    value, got = gradients(fp8, params, x)
    want_value, want = gradients(floats, params, x)
    assert value != want_value
    np.testing.assert_allclose(value, want_value, rtol=0.1)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype == jnp.float32
        assert np.linalg.norm(g - w) < 0.15 * np.linalg.norm(w)
    layer = jax.jit(functools.partial(moe_layer, fp8))
    # The step's weights were cast to bfloat16 before they were quantised.
    cast = {k: w.astype(jnp.bfloat16) for k, w in moe.expert_weights.items()}
    small = params | compress.quantize_experts(cast, "fp8_blocks")
    np.testing.assert_array_equal(layer(params, x)[0], layer(small, x)[0])


@pytest.mark.parametrize("policy", ["nothing", "names"])
def test_a_checkpointed_step(policy: str):
    moe, x = make_layer(dataclasses.replace(CONFIGS["no_mesh"], wire=None), expert_dtype=FP8)
    graphdef, state = nnx.split(moe)
    policies = jax.checkpoint_policies
    kept = policies.nothing_saveable
    if policy == "names":
        kept = policies.save_only_these_names(*jaxmoe.residuals.NAMES)

    def loss(state: Any, wrap: Any) -> Any:
        def layer(state: Any, x: Any) -> Any:
            return nnx.merge(graphdef, state)(x)[0]

        return jnp.sum(wrap(layer)(state, x).astype(jnp.float32) ** 2)

    plain = jax.jit(jax.grad(lambda s: loss(s, lambda f: f)))(state)
    again = jax.jit(jax.grad(lambda s: loss(s, functools.partial(jax.checkpoint, policy=kept))))
    for g, w in zip(jax.tree.leaves(again(state)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 * np.abs(w).max())


def test_linen():
    moe, x = make_layer(dataclasses.replace(CONFIGS["no_mesh"], wire=None), expert_dtype=FP8)
    layer = jaxmoe.linen.MoE(moe.config.group, dense.HIDDEN, expert_dtype=FP8)
    params = {"router": moe.router[...], **moe.expert_weights}
    y = jax.jit(lambda p, x: layer.apply({"params": p}, x)[0])(params, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), output(moe, x))


def test_what_is_refused():
    config = dataclasses.replace(CONFIGS["no_mesh"], fp8_rows=True)
    moe, x = make_layer(config)
    with pytest.raises(ValueError, match=r"MoE: .*rows_dtype.*experts compute in bfloat16"):
        moe(x)
    with pytest.raises(ValueError, match=r"MoE: .*rows_dtype.*Quantise them"):
        compress.quantize_layer(moe, "int8")(x)
    small = compress.quantize_layer(moe, "fp8_blocks")
    with pytest.raises(TypeError, match="derivative, but rows_dtype is float8_e4m3fn"):
        jax.grad(lambda x: small(x)[0].sum())(x)
    with pytest.raises(ValueError, match="the weights are float8_e4m3fn already"):
        compress.quantize_layer(small, "fp8_blocks")
    with pytest.raises(ValueError, match=r"expert_dtype must be float8_e4m3fn or None.*got int8"):
        dense.make_layer(config, expert_dtype="int8")
    with pytest.raises(ValueError, match=r"FP8 operands must be one of .*, got 'tokamax'"):
        jaxmoe.layer._backend(
            dataclasses.replace(moe.config, backend="tokamax"), 8, small.expert_weights
        )
    moe, x = make_layer(CONFIGS["no_mesh"], expert_dtype=FP8)
    with pytest.raises(ValueError, match="expert_dtype is float8_e4m3fn, but the weights are int8"):
        compress.quantize_layer(moe, "int8")(x)
    small = compress.quantize_layer(moe, "fp8_blocks")
    with pytest.raises(TypeError, match="asked for a derivative, but gate, up, down are in FP8"):
        jax.grad(lambda x: small(x)[0].sum())(x)
